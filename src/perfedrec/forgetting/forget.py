"""Forgetting users of a simulated run: a new run folder without their influence, its certificate, and the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perfedrec.core.errors import ConfigError
from perfedrec.data import DataLike, Dataset
from perfedrec.forgetting import measures
from perfedrec.forgetting.certificate import Certificate, Cost, digest_of_model
from perfedrec.forgetting.log import Limits, Log
from perfedrec.forgetting.replay import replay
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.config import Config
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.progress import Quiet, Reporter
from perfedrec.runs.result import Result, open_run
from perfedrec.runs.training import train
from perfedrec.runtimes.simulator import PersonalRecommender

CALIBRATION = 0.04
"""Rounds in which the remaining clients adapt to a corrected model, as a share of those of the run."""

LOSS = 0.01
"""A relative loss of NDCG for the others above which a certificate has an alert: a request may be an attack."""


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
    rounds: int

    @property
    def gone(self) -> tuple[int, ...]:
        """The numbers of the users who are to be forgotten now."""
        return tuple(each for each in self.left.forgotten if each not in self.before.dataset.forgotten)


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
    them in cohorts; everything else is alike, because random numbers are keyed. "replay" plays the server's part again
    from kept uploads without those of the users, and then a number of ``rounds`` of the others (default:
    :data:`CALIBRATION` of those of the run). ``reference`` is the folder of the same request by "exact", with which the
    model is compared. ``by`` says in the log who asked.
    """

    users: Sequence[int | str]
    method: str = "exact"
    rounds: int | None = None
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
    :class:`perfedrec.core.errors.DataError` for an unknown user.
    """
    folder, output = Path(folder), Path(output)
    task = _task(folder, request, output, data, progress or Quiet())
    users = [str(each) for each in task.left.train.user_ids[list(task.gone)]]
    against = None if request.reference is None else _reference(Path(request.reference), data, task.left)
    log = Log(folder)
    log.allow(limits or Limits(), users, len(task.before.dataset.forgotten), task.left.n_users, request.by)
    made = WAYS[request.method](task)
    certificate = _certified(task, users, request.method, made, against)
    certificate.write(output)
    log.done(users, request.method, request.by, output, certificate.alerts)
    return certificate


def _task(folder: Path, request: Request, output: Path, data: DataLike | None, reporter: Reporter) -> Task:
    """What is to be done. Raises the errors of :func:`forget`."""
    if request.method not in WAYS:
        raise ConfigError(f"there is no method {request.method} of forgetting; expected {' or '.join(WAYS)}")
    if RunFolder(folder).is_federation:
        raise ConfigError(
            f"{folder}: is the run of a federation, whose data are on its nodes; expected the run of a simulation "
            "(docs/forgetting.md says what a federation can forget)"
        )
    if not request.users:
        raise ConfigError("nobody is to be forgotten; expected one or more users")
    RunFolder(output).check_free()
    before, config = open_run(folder, data, "cpu")
    left = before.dataset.without_users(request.users)
    names = tuple(str(left.train.user_ids[each]) for each in left.forgotten)
    settings = config.data.model_copy(update={"forgotten": names})
    rounds = round(CALIBRATION * max(before.best_round, 0)) if request.rounds is None else request.rounds
    return Task(folder, before, config, left, config.model_copy(update={"data": settings}), output, reporter, rounds)


def retrain(task: Task) -> Forgotten:
    """Train again without the users: the reference for all other methods."""
    start = time.perf_counter()
    result = train(task.config_left, task.left, output=task.output, progress=task.reporter)
    return Forgotten(
        result,
        result.history,
        time.perf_counter() - start,
        [
            "the users' interactions and attributes were taken out of all parts of the data",
            f"the model was trained again from seed {task.config.run.seed}, with the users struck out of every cohort; "
            "all random numbers of the others are those of the run",
        ],
        ["the whole model, with the choice of the best round and of the mix"],
        [],
    )


def replayed(task: Task) -> Forgotten:
    """Play the server's part of the run again from kept uploads without those of the users, and a few rounds."""
    algorithm, recommender = task.config.build(), task.before.recommender
    if isinstance(algorithm, Method) or not isinstance(recommender, PersonalRecommender):
        raise ConfigError(f"{task.config.algorithm} is centralised: it has no uploads; expected --method exact")
    phases = len(algorithm.phases)
    played = phases + task.before.best_round
    found = replay(algorithm, task.left, task.config.run, task.folder, recommender, played, task.rounds)
    history = [*task.before.history[:played], *found.entries]
    result = Result(
        found.recommender, task.left, task.before.best_round + task.rounds, {}, history, config=task.config_left
    )
    result.valid = result.evaluate("valid")
    result.save(task.output)
    return Forgotten(
        result,
        found.entries,
        found.seconds,
        [
            f"the server's part of {played:,} rounds was played again, from the kept uploads without the users'",
            f"then the other clients trained for {task.rounds:,} rounds, from the states that they had",
        ],
        ["item degrees, the users' edges and vectors at the neighbourhood service, and what follows from these alone"],
        ["what training made: the other clients' uploads are those that they sent while the users were there"],
    )


WAYS: dict[str, Callable[[Task], Forgotten]] = {"exact": retrain, "replay": replayed}


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
    measured, unmeasured = _measured(task, after), []
    if isinstance(task.config.build(), Method):
        unmeasured.append("membership: new users of centralised methods are not attacked")
    elif not measured["membership AUC"]["users"]:
        unmeasured.append("membership: no forgotten user has held-out items to compare with")
    if against is not None:
        measured |= _compared(task, after, against)
    elif method != "exact":
        unmeasured.append("distance to the model trained again: no reference was given")
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
        measured=measured,
        unmeasured=unmeasured,
        not_covered=[*NOT_COVERED, *([] if method == "exact" else NOT_EXACT)],
        alerts=_alerts(measured),
    )


def _measured(task: Task, after: Result) -> dict[str, Any]:
    """The figures that need no reference."""
    before, share = task.before, task.before.test_share
    accuracy = [_few(measures.accuracy(each.recommender, task.left, share)) for each in (before, after)]
    changed = measures.distance(after.recommender, before.recommender, measures.remaining(task.left))
    found: dict[str, Any] = {BEFORE: accuracy[0], AFTER: accuracy[1]}
    found["lists before and after"] = {f"overlap@{measures.LENGTH}": changed.overlap}
    if not isinstance(task.config.build(), Method):
        seen = [measures.membership(each.recommender, before.dataset, task.gone) for each in (before, after)]
        found["membership AUC"] = {"before": seen[0].mean, "after": seen[1].mean, "users": seen[1].cases}
    return found


def _compared(task: Task, after: Result, against: Result) -> dict[str, Any]:
    """The figures in comparison with the model that was trained again."""
    apart = measures.distance(after.recommender, against.recommender, measures.remaining(task.left))
    never = measures.membership(against.recommender, task.before.dataset, task.gone)
    above, half = measures.membership(after.recommender, task.before.dataset, task.gone).above(never)
    accuracy = measures.accuracy(against.recommender, task.left, task.before.test_share)
    return {
        "distance to the model trained again": {f"overlap@{measures.LENGTH}": apart.overlap, "scores": apart.scores},
        "accuracy of the others, trained again": _few(accuracy),
        "membership AUC of who never took part": {"AUC": never.mean, "after minus this": above, "±": half},
    }


BEFORE, AFTER = "accuracy of the others, before", "accuracy of the others, after"
"""Names of figures in a certificate."""

NOT_COVERED = [
    "the folder of the run before, with its model, checkpoints and uploads: delete it when it is no longer needed",
    "the file of the data, in which the users' lines still are: delete them there",
    "copies of the model before, and lists that it made, wherever they are: who has both models can compare them",
    "options and preprocessing that were chosen while the users' data were there",
]
"""What no method covers."""

NOT_EXACT = [
    "what other clients learned from the users through the model stays in their own parts, except as measured",
    "the best round and the mix of models, which were chosen while the users' held-out items counted",
]
"""What methods other than exact retraining do not cover besides."""


def _few(figures: dict[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in ("recall@20", "ndcg@20") if name in figures}


def _alerts(measured: dict[str, Any]) -> list[str]:
    """What the operator should look at before the model is used."""
    before, after = (measured[name].get("ndcg@20", 0.0) for name in (BEFORE, AFTER))
    if before and after < before * (1 - LOSS):
        return [
            f"NDCG@20 of the others fell from {before:.4f} to {after:.4f}, by more than {LOSS:.0%}: by chance, or "
            "because the requests to forget are an attack on the model; look at who asked before it is used"
        ]
    return []
