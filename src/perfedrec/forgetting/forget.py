"""Forgetting users of a simulated run: a new run folder without their influence, its certificate, and the log."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError
from perfedrec.core.nearest import nearest
from perfedrec.data import DataLike, Dataset
from perfedrec.evaluation.ranking import Totals
from perfedrec.forgetting import measures, statements
from perfedrec.forgetting.resum import check_kept, resum
from perfedrec.forgetting.rows import Rows, check, correct, replay
from perfedrec.forgetting.simulated import Played, Trained
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.certificate import Certificate, Cost, digest_of_model, finite
from perfedrec.runs.config import Config
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runs.progress import Quiet, Reporter
from perfedrec.runs.result import Result, open_run
from perfedrec.runs.signals import InterruptedRunError
from perfedrec.runs.training import train
from perfedrec.runtimes.simulator import PersonalRecommender

SHARES = {"exact": 1.0, "replay": 0.09, "correction": 0.09, "resum": 0.05}
"""The share of the rounds of training that other clients play, by method. With fewer rounds, replayed rows lie so far
from all others that one can tell them; with more, they come closer to what they were (docs/forgetting.md)."""


@dataclass(frozen=True)
class Task:
    """What is to be done: the ``before`` of a run in ``folder``, with its configuration, its ``dataset``, the data that
    are ``left`` and their configuration, and the new folder ``output``."""

    folder: Path
    before: Result
    config: Config
    left: Dataset
    config_left: Config
    output: Path
    reporter: Reporter
    share: float

    @property
    def gone(self) -> tuple[int, ...]:
        """The numbers of the users who are to be forgotten now."""
        return tuple(each for each in self.left.forgotten if each not in self.before.dataset.forgotten)

    @property
    def algorithm(self) -> AnyAlgorithm:
        """The method of a federated run."""
        found = self.config.build()
        assert not isinstance(found, Method)
        return found

    @property
    def model(self) -> Trained:
        """The model of the run as it was."""
        assert isinstance(self.before.recommender, PersonalRecommender)
        return self.before.recommender

    @property
    def mixes(self) -> bool:
        """Whether held-out items have chosen a mix of models."""
        built = self.config.build()
        return not isinstance(built, Method) and bool(built.chosen_options(self.model.state))

    @property
    def trained(self) -> int:
        """The rounds of training that the model of the run has behind it."""
        return max(self.before.best_round, 0)


@dataclass(frozen=True)
class Forgotten:
    """What a method made: the ``result``, the ``entries`` of the rounds that clients played for it, the ``seconds``,
    and in sentences what was done, and which parts of the model are exactly as if the users had never been there."""

    result: Result
    entries: Sequence[Entry]
    seconds: float
    done: list[str]
    exact: list[str]
    approximate: list[str]


@dataclass(frozen=True)
class Request:
    """Who is to be forgotten, and how.

    ``users`` are ids of the data. ``method``: "exact" trains again from the seed, without the users' data and without
    them in cohorts; everything else is alike, because random numbers are keyed. "replay" trains the rows of the users'
    items again (:func:`perfedrec.forgetting.rows.replay`), "correction" takes the users' gradients out of them
    (:func:`perfedrec.forgetting.rows.correct`), and "resum" plays the server's part again from kept uploads without
    those of the users (:func:`perfedrec.forgetting.resum.resum`). All but the first ask other clients for some rounds:
    a ``share`` of those of the run (default: :data:`SHARES`). ``reference`` is the folder of the same request by
    "exact", with which the model is compared. ``by`` says in the log who asked.
    """

    users: Sequence[int | str]
    method: str = "exact"
    share: float | None = None
    reference: str | Path | None = None
    by: str = "operator"


def forget(
    folder: str | Path,
    request: Request,
    output: str | Path,
    *,
    data: DataLike | None = None,
    limits: Limits | None = None,
    progress: Reporter | None = None,
) -> Certificate:
    """Forget users of the finished run in ``folder``: write the run without them to the new folder ``output``, with its
    certificate, and return the certificate. The old run stays as it is, and gets a line in its log.

    ``limits`` bound how many users may be forgotten. ``data`` are those of the run, if they have moved.

    Raises :class:`ConfigError` for a run or a method that cannot be used, and where the limits do not allow it;
    :class:`perfedrec.core.errors.DataError` for an unknown user; :class:`InterruptedRunError` where a signal ended
    it, of which the log has a line.
    """
    folder, output = Path(folder), Path(output)
    task = _task(folder, request, output, data, progress or Quiet())
    users = [str(each) for each in task.left.train.user_ids[list(task.gone)]]
    against = None if request.reference is None else _reference(Path(request.reference), data, task.left)
    log = Log(folder)
    log.allow(limits or Limits(), users, len(task.before.dataset.forgotten), task.left.n_users, request.by)
    try:
        made = WAYS[request.method](task)
        certificate = _certified(task, users, request.method, made, against)
        certificate.write(output)
    except (InterruptedRunError, KeyboardInterrupt) as error:
        log.add("interrupted", users=users, by=request.by, method=request.method, output=str(output))
        number = error.exit_code - 128 if isinstance(error, InterruptedRunError) else signal.SIGINT
        raise InterruptedRunError(statements.interrupted(folder, output), number) from None
    log.done(users, request.method, request.by, output, certificate.alerts)
    return certificate


def _task(folder: Path, request: Request, output: Path, data: DataLike | None, reporter: Reporter) -> Task:
    """What is to be done. Raises the errors of :func:`forget`."""
    if request.method not in WAYS:
        near = nearest(request.method, WAYS)
        raise ConfigError(f"there is no method {request.method} of forgetting; expected {' or '.join(WAYS)}{near}")
    if RunFolder(folder).is_federation:
        raise ConfigError(
            f"{folder}: is the run of a federation, whose data are on its nodes; expected the run of a simulation "
            "(docs/forgetting.md says what a federation can forget)"
        )
    if not request.users:
        raise ConfigError("nobody is to be forgotten; expected one or more users")
    RunFolder(output).check_free(resumable=False)
    before, config = open_run(folder, data, "cpu")
    left = before.dataset.without_users(request.users)
    names = tuple(str(left.train.user_ids[each]) for each in left.forgotten)
    settings = config.data.model_copy(update={"forgotten": names})
    without = config.model_copy(update={"data": settings})
    share = SHARES[request.method] if request.share is None else request.share
    task = Task(folder, before, config, left, without, output, reporter, share)
    CHECKS[request.method](task)
    return task


def retrain(task: Task) -> Forgotten:
    """Train again without the users: the reference for all other methods."""
    start = time.perf_counter()
    result = train(task.config_left, task.left, output=task.output, progress=task.reporter)
    return Forgotten(
        result,
        result.history,
        time.perf_counter() - start,
        statements.trained_again(task.config.build(), task.config.run.seed, task.left.user_attributes is not None),
        [statements.whole(task.mixes)],
        [],
    )


def summed_again(task: Task) -> Forgotten:
    """Play the server's part of the run again from kept uploads without those of the users, and a few rounds."""
    algorithm, rounds = task.algorithm, round(task.share * task.trained)
    played = len(algorithm.phases) + task.before.best_round
    found = resum(algorithm, task.left, task.config.run, task.folder, task.model, played, rounds)
    done = [
        f"the server's part of {counted(played, 'round')} was played again, from the kept uploads without the users'",
        f"then the other clients trained for {counted(rounds, 'round')}, from the states that they had",
    ]
    exact, rest = [*statements.at_service(algorithm), statements.SUMS], statements.summed(algorithm)
    return _stored(task, found, task.before.best_round + rounds, done, exact, rest)


def trained_rows(task: Task) -> Forgotten:
    """Train the rows of the users' items again, from their start."""
    rows = _rows(task)
    found = replay(rows, task.share)
    count = int(rows.touched.sum())
    done = [
        *statements.phases_again(task.algorithm),
        f"the rows of the users' {counted(count, 'item')} were put back to their start, and trained again in "
        f"{counted(len(found.entries), 'round')} by clients who have these items, and a few others",
    ]
    exact, rest = statements.at_service(task.algorithm), statements.kept_rows(task.model.state)
    return _stored(task, found, task.before.best_round, done, exact, rest)


def corrected(task: Task) -> Forgotten:
    """Take the users' gradients out of the rows of their items, and let others repair these."""
    rows = _rows(task)
    found = correct(rows, task.model, torch.tensor(task.gone), task.share)
    count = int(rows.touched.sum())
    done = [
        *statements.phases_again(task.algorithm),
        f"the users' gradients were taken out of the rows of their {counted(count, 'item')}, with the help of their "
        "nodes",
        f"these rows were repaired in {counted(len(found.entries), 'round')} by clients who have these items, and a "
        "few others",
    ]
    exact, rest = statements.at_service(task.algorithm), statements.kept_rows(task.model.state)
    return _stored(task, found, task.before.best_round, done, exact, rest)


def _rows(task: Task) -> Rows:
    run = task.config.run
    return Rows.of(task.algorithm, task.left, run, task.model, task.trained, torch.tensor(task.gone))


def _stored(
    task: Task, found: Played, best_round: int, done: list[str], exact: list[str], approximate: list[str]
) -> Forgotten:
    """Write the run with the model that was made: its history is that of the run, and the rounds that were added."""
    played = len(task.algorithm.phases) + task.before.best_round
    history = [*task.before.history[:played], *found.entries]
    result = Result(found.recommender, task.left, best_round, {}, history, config=task.config_left)
    result.valid = result.evaluate("valid")
    result.save(task.output)
    return Forgotten(result, found.entries, found.seconds, done, exact, approximate)


WAYS: dict[str, Callable[[Task], Forgotten]] = {
    "exact": retrain,
    "replay": trained_rows,
    "correction": corrected,
    "resum": summed_again,
}
"""The methods of forgetting, by name."""


def check_federated(task: Task) -> None:
    """Raise :class:`ConfigError` for a run that only exact retraining suits."""
    if isinstance(task.config.build(), Method):
        raise ConfigError(f"{task.config.algorithm} is centralised; expected --method exact")
    if task.before.best_round < 0:
        raise ConfigError("the model is that of a phase before training; expected --method exact")


def check_rows(task: Task) -> None:
    """Raise :class:`ConfigError` for a run whose rows cannot be changed apart."""
    check_federated(task)
    check(task.algorithm)


def check_summable(task: Task) -> None:
    """Raise :class:`ConfigError` for a run of which nobody can have kept uploads, and :class:`CheckpointError` where
    they were not kept."""
    built = task.config.build()
    if not isinstance(built, Method) and built.settings.privacy.aggregation == "secure":
        raise ConfigError(
            f"{task.folder}: has secure aggregation, with which nobody has single uploads; expected --method exact"
        )
    check_federated(task)
    check_kept(task.folder)


CHECKS: dict[str, Callable[[Task], None]] = {
    "exact": lambda task: None,
    "replay": check_rows,
    "correction": check_rows,
    "resum": check_summable,
}
"""What is refused before anything is noted or written."""


def _reference(folder: Path, data: DataLike | None, left: Dataset) -> Result:
    """The run that was trained again without the users. Raises :class:`ConfigError` for another run."""
    result, _ = open_run(folder, data, "cpu")
    if result.dataset.fingerprint != left.fingerprint:
        raise ConfigError(
            f"{folder}: is not this run without these users; expected the output of perfedrec forget --method exact "
            "for the same users"
        )
    return result


def cost_of(entries: Sequence[Entry], seconds: float) -> Cost:
    """The cost of rounds."""
    reports = [each.report for each in entries]
    return Cost(
        rounds=len(reports),
        clients=sum(each.clients for each in reports),
        bytes_up=sum(each.bytes_up for each in reports),
        bytes_down=sum(each.bytes_down for each in reports),
        seconds=round(seconds, 3),
    )


def _certified(task: Task, users: list[str], method: str, made: Forgotten, against: Result | None) -> Certificate:
    """The certificate of what was ``made``: all figures are measured here."""
    before, left, after = task.before, task.left, made.result
    seen = _seen(task, after, against)
    ranked = [measures.accuracy(each.recommender, left, before.test_share) for each in (before, after)]
    measured = _measured(task, after, seen, ranked)
    alerts, unmeasured = statements.fallen(measures.Change.of("ndcg@20", *ranked))
    if isinstance(task.config.build(), Method):
        unmeasured.append("membership: new users of centralised methods are not attacked")
    elif not seen["after"].cases:
        unmeasured.append("membership: no forgotten user has held-out items to compare with")
    elif seen["after"].cases == 1:
        unmeasured.append("the interval of the membership AUC: for one user the AUC is about few items")
    if against is not None:
        measured |= _compared(task, after, against, seen)
    elif method != "exact":
        unmeasured.append("distance to the model trained again: no reference was given")
    if method != "exact":  # which has not seen the users: a difference is chance
        others = {"before": "the model before", "never": "who never took part"}
        alerts += [
            line for name in others if name in seen for line in statements.told(seen["after"], seen[name], others[name])
        ]
    data = {"data before": before.dataset.fingerprint, "data after": left.fingerprint}
    models = {"model before": digest_of_model(task.folder), "model after": digest_of_model(task.output)}
    return Certificate(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        users=users,
        method=method,
        run={"folder": task.folder.name, "algorithm": task.config.algorithm, **data, **models},
        done=made.done,
        exact=made.exact,
        approximate=made.approximate,
        cost=cost_of(made.entries, made.seconds),
        cost_of_run=cost_of(before.history, sum(each.seconds for each in before.history)),
        measured=finite(measured),
        unmeasured=unmeasured,
        not_covered=[*statements.NOT_COVERED, *([] if method == "exact" else statements.not_exact(task.mixes))],
        alerts=alerts,
    )


def _seen(task: Task, after: Result, against: Result | None) -> dict[str, measures.Membership]:
    """The membership of the forgotten users in the model "before", "after", and "never", the one that was trained again
    without them, where it is there. Nothing for a centralised method."""
    if isinstance(task.config.build(), Method):
        return {}
    models = {"before": task.before, "after": after} | ({} if against is None else {"never": against})
    return {
        name: measures.membership(each.recommender, task.before.dataset, task.gone) for name, each in models.items()
    }


def _measured(
    task: Task, after: Result, seen: Mapping[str, measures.Membership], ranked: Sequence[Totals]
) -> dict[str, Any]:
    """The figures that need no reference. ``ranked`` is how the models before and after rank for the others."""
    changed = measures.distance(after.recommender, task.before.recommender, measures.remaining(task.left))
    found: dict[str, Any] = {
        f"accuracy of the others, {name}": _few(each) for name, each in zip(("before", "after"), ranked, strict=True)
    }
    found["lists before and after"] = {f"overlap@{measures.LENGTH}": changed.overlap}
    if seen:
        auc = {name: seen[name].mean for name in ("before", "after")}
        found["membership AUC"] = {**auc, "users": seen["after"].cases}
    return found


def _compared(task: Task, after: Result, against: Result, seen: Mapping[str, measures.Membership]) -> dict[str, Any]:
    """The figures in comparison with the model that was trained again."""
    apart = measures.distance(after.recommender, against.recommender, measures.remaining(task.left))
    accuracy = measures.accuracy(against.recommender, task.left, task.before.test_share)
    found: dict[str, Any] = {
        "distance to the model trained again": {f"overlap@{measures.LENGTH}": apart.overlap, "scores": apart.scores},
        "accuracy of the others, trained again": _few(accuracy),
    }
    if seen:
        above, half = seen["after"].above(seen["never"])
        figures = {"AUC": seen["never"].mean, "after minus this": above, "±": half}
        found["membership AUC of who never took part"] = figures
    return found


def _few(ranked: Totals) -> dict[str, float]:
    figures = ranked.means()
    return {name: figures[name] for name in ("recall@20", "ndcg@20") if name in figures}
