"""A federation's run as its coordinator plays it: the server's state, the progress, and the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from perfedrec import __version__
from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import TRAIN, Algorithm, RoundState
from perfedrec.core.errors import CheckpointError
from perfedrec.core.records import copied, unflatten
from perfedrec.core.types import Plan
from perfedrec.data import Catalogue
from perfedrec.data.catalogue import ENCODING
from perfedrec.evaluation.sample import share_of
from perfedrec.federation.agreement import digest_of, evaluation_of, method_for_nodes
from perfedrec.federation.parts import Part, Parts
from perfedrec.privacy.protection import evaluations
from perfedrec.privacy.report import NO_AUDIT, NOT_KEPT, privacy_block
from perfedrec.runs import opened as opened_sums
from perfedrec.runs.checkpoint import Loaded, check_phases
from perfedrec.runs.config import NODES, Config, named_defence
from perfedrec.runs.files import CONFIG, ENVIRONMENT, ITEMS, STATUS
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.progress import Progress, round_name
from perfedrec.runs.selection import Selection
from perfedrec.runs.shared_model import STATE, USERS
from perfedrec.runs.summary import FULL, Summary
from perfedrec.runtimes.evaluation import Question, best_of
from perfedrec.runtimes.flower import Coordinator, Rejection, ServiceClient, Setup, needs_service

LINK = "superlink"
"""Folder of a run in which its SuperLink keeps its state."""

BEFORE_ROUNDS = (CONFIG, ENVIRONMENT, ITEMS, "item_attributes.csv", ENCODING, LINK, STATUS)
"""What is in the folder of a run before nodes are asked for anything."""

BEST = "best"
"""Name of the record of a checkpoint that has the served state of the best round."""

SERVICE = "mediator"
"""Name of the record of a checkpoint that has what the service gave out."""


@dataclass(frozen=True)
class Participants:
    """The users who take part in a run: their identities [n], ascending."""

    users: Tensor


class FederatedRun:
    """A run of a federated ``algorithm``: a new one, or with ``resume`` the one that ``folder`` holds.

    A new run gets the ``name``. It is written down before nodes are asked for anything; a coordinator that ended before
    that leaves a folder in which it can begin again.

    Raises :class:`CheckpointError` for a checkpoint of another configuration or catalogue, for one that cannot be
    resumed (:func:`perfedrec.runs.checkpoint.check_phases`) and, where the fingerprint of the ``data`` is known, for
    one of other data; and :class:`ConfigError` where the folder of a new run is not empty.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm[Any, Any, Any],
        catalogue: Catalogue,
        folder: RunFolder,
        name: str,
        resume: bool,
        data: str | None = None,
    ) -> None:
        if data is None:  # the nodes have them
            config = config.model_copy(update={"data": config.data.model_copy(update={"path": NODES})})
        self.config, self.algorithm, self.folder = config, algorithm, folder
        self.n_phases = len(algorithm.phases)
        self.progress = Progress(config.run.rounds + self.n_phases, config.run.select_by, n_phases=self.n_phases)
        self.selection, self.evaluation = Selection(config.run, self.progress), evaluation_of(config)
        self._state: RoundState | None = None
        self._best: RoundState | None = None
        self._why = ""  # the last evaluation has no figure; people are told once
        self.users: Tensor | None = None
        self.service_client: ServiceClient | None = None
        configuration = method_for_nodes(config, algorithm)
        digest = digest_of(configuration, config.run.seed)
        self.belongs = {"catalogue": catalogue.fingerprint, "configuration": digest}
        if data is not None:
            self.belongs["data"] = data
        self._loaded: Loaded | None = None
        unbegun = self._is_unbegun()
        if resume and not unbegun:
            name = self._restore()
        else:
            folder.claim(BEFORE_ROUNDS if unbegun else ())
        folder.write_settings(self.config)
        folder.write_catalogue(catalogue)
        self.setup = Setup(name, configuration, self.belongs["catalogue"], __version__)

    @property
    def state(self) -> RoundState:
        """The server's state after the last round."""
        assert self._state is not None, "the run has not begun"
        return self._state

    @property
    def best(self) -> RoundState:
        """The served state of the best round; of the last one, where nothing has been evaluated."""
        served: RoundState = self.algorithm.serving(self.state) if self._best is None else self._best
        return served

    @property
    def last_valid(self) -> dict[str, float] | None:
        """The validation metrics of the last evaluation; ``None`` before the first one."""
        found = [entry.valid for entry in self.folder.history() if entry.valid]
        return found[-1] if found else None

    def _is_unbegun(self) -> bool:
        """Whether the folder is that of a coordinator that ended before it asked nodes for anything."""
        folder = self.folder
        return not folder.is_federation and (folder.path / CONFIG).is_file() and folder.config().data.path == NODES

    def _restore(self) -> str:
        """Read the newest complete checkpoint, if a round has been played, and return the run's name."""
        name = self.folder.name()
        self._loaded = self.folder.newest_checkpoint(self.belongs)
        if self._loaded is not None:
            check_phases(self._loaded, self.algorithm)
            self.progress = self.progress.resumed(self._loaded.extra["standing"])
            self.selection = Selection(self.config.run, self.progress)
            self.selection.best_valid = self._loaded.extra.get("best_valid", {})  # none in versions before 0.5
            self.selection.end_early()
            self.users = self._loaded.records[USERS][0]["users"]
        self.folder.forget_after(self.progress.done)
        Parts(self.folder.path).forget_after(self.progress.done)
        return name

    def use_service(self, service: int | None, names: Mapping[int, str]) -> None:
        """Let the node ``service`` be the neighbourhood service, where the method needs one.

        It continues from what it gave out last. ``names`` are those of all nodes.
        """
        if service is None or not needs_service(self.algorithm):
            return
        held = {} if self._loaded is None else self._loaded.records.get(SERVICE, ({}, {}))[0]
        self.service_client = ServiceClient.of(service, held, dict(names))

    def begin(self, coordinator: Coordinator, users: Tensor) -> None:
        """Set the state that the run starts or continues from, for the identities [n] of its ``users``."""
        self.users, self.progress.users = users, users.numel()
        self.folder.write_name(self.setup.run)
        if self._loaded is None:
            self._state = coordinator.begin()
            return
        blank: RoundState = coordinator.blank()
        self._state = copied(unflatten(type(blank), *self._loaded.records[STATE]))
        if BEST in self._loaded.records:
            self._best = copied(unflatten(type(blank), *self._loaded.records[BEST]))

    def play(
        self, coordinator: Coordinator, names: Mapping[int, str], tell: Callable[[str], None]
    ) -> tuple[Entry, list[tuple[str, str]]]:
        """Play a round, have the nodes evaluate it if that is due, and write its checkpoint.

        Returns the entry of the history, and the names of the nodes that the round went on without, with the reasons.
        ``tell`` receives a line about each of these nodes.
        """
        start = time.perf_counter()
        self._state, report = coordinator.play(self.state)
        seconds = time.perf_counter() - start
        self.progress.count(report, seconds)
        valid = None
        if self.evaluation.rule is not None and self.selection.is_due:
            valid = self._evaluate(coordinator, tell)
            self.selection.end_early()
        without = self._record_rejections(coordinator.rejected, names, tell)
        entry = Entry(report, seconds, valid)
        self.folder.append(entry)
        self.checkpoint()
        return entry, without

    def _evaluate(self, coordinator: Coordinator, tell: Callable[[str], None]) -> dict[str, float] | None:
        """The validation metrics after the last round, whose state is kept if it is the best so far; ``None`` where no
        figure is opened."""
        choices = self._ask(coordinator, self.algorithm.serving(self.state), "valid", tell)
        valid: dict[str, float] = {}
        if choices:
            number = best_of(choices, self.config.run.select_by)
            self._state, valid = self.algorithm.choose(self.state, number), choices[number]
        if self.selection.is_better(valid):
            self._best = copied(self.algorithm.serving(self.state))
        return valid or None

    def _ask(
        self, coordinator: Coordinator, served: RoundState, part: str, tell: Callable[[str], None]
    ) -> tuple[dict[str, float], ...]:
        """The metrics of a state on a ``part`` of the held-out items, for each setting that is compared; nothing where
        no figure is opened."""
        keep = () if self._best is None else (self._best.round,)
        start = time.perf_counter()
        assert self.users is not None
        run = self.config.run
        share = share_of(self.users.numel(), run.evaluate_users) if part == "valid" else 1.0
        question = Question(part, run.cutoffs, served.round, keep, run.select_by, share)
        answers = coordinator.evaluate(served, question)
        self.progress.seconds += time.perf_counter() - start
        self.progress.bytes_up += answers.bytes_up
        self.progress.bytes_down += answers.bytes_down
        if answers.why and answers.why != self._why:
            where = round_name(served.round - 1, self.n_phases)
            tell(f"{where}: no figure of {part} is opened: {answers.why}")
        self._why = answers.why
        return answers.choices

    def test(self, coordinator: Coordinator, names: Mapping[int, str], tell: Callable[[str], None]) -> dict[str, float]:
        """The test metrics of the best round, once; empty where nothing was evaluated.

        A run that is continued after its end keeps those that it has where its best round is still the same: nodes
        open a sum once, and would refuse it where one of them is missing now.
        """
        if self.evaluation.rule is None or not self.selection.best_valid:
            return {}
        if before := self._tested():
            return before
        found = self._ask(coordinator, self.best, "test", tell)
        self._record_rejections(coordinator.rejected, names, tell)
        return found[0] if found else {}

    def _tested(self) -> dict[str, float]:
        """The test metrics of the best round from an earlier end of this run; empty where there are none."""
        with suppress(CheckpointError):  # this run has not been at its end before
            before = self.folder.summary()
            if (before.best_round, before.valid) == (self.selection.best_round, self.selection.best_valid):
                return before.test
        return {}

    def keep_opened(self, state: RoundState, plan: Plan, total: Aggregate) -> None:
        """Keep what was opened in a round, for an audit."""
        opened = opened_sums.Opened.of(self.algorithm, state, plan, total)
        if opened is not None and self.users is not None:
            opened_sums.write(self.folder.path, state.round, opened, self.users)

    def keeper(self, names: Mapping[int, str]) -> Callable[[int, int, Tensor, Aggregate], None] | None:
        """What keeps the nodes' parts of sums on disk, by ``names`` of nodes; ``None`` where they are not kept."""
        if not self.config.run.keep_uploads:
            return None
        parts = Parts(self.folder.path)

        def keep(number: int, node: int, users: Tensor, total: Aggregate) -> None:
            parts.keep(number, Part(names.get(node, str(node)), users, total))

        return keep

    def checkpoint(self) -> None:
        """Write a checkpoint after the last round."""
        assert self.users is not None
        records: dict[str, Any] = {STATE: self.state, USERS: Participants(self.users)}
        if self.service_client is not None:
            records[SERVICE] = self.service_client.tensors()
        if self._best is not None:
            records[BEST] = self._best
        extra = {"standing": asdict(self.progress), "best_valid": self.selection.best_valid}
        self.folder.save_checkpoint(self.progress.done, records, self.belongs, extra)

    def _record_rejections(
        self, rejected: list[Rejection], names: Mapping[int, str], tell: Callable[[str], None]
    ) -> list[tuple[str, str]]:
        """Record and clear the list of nodes that a round went on without."""
        without = [(names.get(each.node, str(each.node)), each.reason) for each in rejected]
        for each, (node, _) in zip(rejected, without, strict=True):
            self.folder.append_rejection(asdict(each) | {"node": node})
            where = round_name(each.round, self.n_phases)
            tell(f"{where}: went on without node {node}: {each.reason}: {each.detail}")
        rejected.clear()
        return without

    def finish(
        self,
        nodes_with_model: list[str],
        secure_aggregation: str = "SecAgg+",
        sizes: Sequence[int] = (),
        test: Mapping[str, float] | None = None,
    ) -> Summary:
        """Store the model of the best round and the summary. ``secure_aggregation`` is the name of the protocol, or
        "simulated", ``sizes`` are the numbers of users on the nodes, and ``test`` the metrics of :meth:`test`."""
        assert self.users is not None
        trained, settings = self.progress.trained, self.algorithm.settings.privacy
        best, valid = self.selection.best_round, self.selection.best_valid
        records = {STATE: self.best, USERS: Participants(self.users)}
        self.folder.save_model(records, self.belongs, {"best_round": best, "valid": valid})
        evaluated = sum(entry.valid is not None for entry in self.folder.history()) + bool(test)
        releases = [*self.algorithm.releases(max(trained, 0), self.users.numel()), evaluations(evaluated)]
        audit = NO_AUDIT if (self.folder.path / opened_sums.FOLDER).exists() else NOT_KEPT
        groups = self.algorithm.protection.n_groups(TRAIN.name, self.users.numel())
        vectors = self.algorithm.reports_vectors
        size = self.algorithm.protection.group_size
        block = privacy_block(settings, releases, secure_aggregation, vectors, sizes, audit, groups, size)
        summary = Summary(
            algorithm=self.config.algorithm,
            n_phases=self.n_phases,
            best_round=best,
            chosen=self.algorithm.chosen_options(self.best),
            valid=valid,
            test=dict(test or {}),
            protocols={"test": FULL} if test else {},
            users=self.users.numel(),
            nodes_with_model=nodes_with_model,
            communication=self.progress.sent(self.users.numel()),
            privacy=block | named_defence(self.config),
        )
        self.folder.write_summary(summary)
        return summary
