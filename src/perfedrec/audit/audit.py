"""The audit of a run: it replays the run from its seed, captures its uploads, and attacks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perfedrec.audit import attacks
from perfedrec.audit.attacks import Finding
from perfedrec.audit.canary import Bound, bounds
from perfedrec.audit.opened import SumAttacks
from perfedrec.audit.recipients import attack_factor, by_passes
from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.algorithm import AnyAlgorithm, ClientRecord, Protects, Received, RoundState
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.types import Plan, Rows, Update, block_rows
from perfedrec.data import Interactions
from perfedrec.methods.centralised.method import Method
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.report import without_result
from perfedrec.runs.config import RunSettings
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.opened import Opened
from perfedrec.runs.result import Result, open_run
from perfedrec.runs.validation import Validation
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.simulator import PersonalRecommender, Simulator

SPARSE, DENSE = 200, 40  # clients of a captured round whose uploads are attacked one by one
MEMBERS = 1000  # users whose membership is attacked
REPLAYED = 60  # training rounds that are replayed at least, if the run has them: some users then take part often
PARTICIPATIONS = (1, 2, 5)
PRETRAINING = 0  # the number under which the last pass before training is captured


@dataclass
class Captured:
    """What the coordinator received in a round: the uploads or, if it cannot see them, only their sum. Also what an
    attacker might know besides: the users' vectors [B, d] at that time (``None`` if the method does not score with
    vectors). The first ``n_models`` tables of the sum are changes of item tables; ``table_seen`` [m, d] is their sum by
    item, as far as the coordinator can tell it from ``total``."""

    update: Update
    vectors: Tensor | None
    table: Tensor
    n_models: int
    phase: str
    total: Aggregate | None = None
    table_seen: Tensor | None = None


class Tap:
    """An algorithm that records what leaves the clients, after protection. It passes everything else on to the real
    algorithm."""

    def __init__(self, algorithm: AnyAlgorithm, rounds: Iterable[int]) -> None:
        self.algorithm, self.rounds, self.number = algorithm, set(rounds), 0
        self.protection = TappedProtection(self, algorithm.protection)
        self.captured: dict[int, Captured] = {}
        self.row_sets: dict[int, list[Tensor]] = {}
        self.reports: dict[int, list[Tensor]] = {}
        self.opened: SumAttacks | None = None
        self._work: tuple[Received, Rows, ClientRecord] | None = None
        self._users: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def unread(self, phase: str) -> frozenset[str]:
        return frozenset()  # users' vectors may be asked for afterwards

    def client(
        self, phase: str, broadcast: Received, rows: Rows, client_state: ClientRecord, key: Key
    ) -> tuple[Update, ClientRecord]:
        self._work = broadcast, rows, client_state
        return self.algorithm.client(phase, broadcast, rows, client_state, key)

    def server(self, state: RoundState, phase: str, aggregate: Aggregate, key: Key) -> RoundState:
        number = self._wanted(phase)
        if number in self.captured and aggregate.clients:
            self.captured[number].table_seen = self._by_item(state, phase, aggregate, self.captured[number].n_models)
        if self.opened is not None and self._users is not None:
            opened = Opened.of(self.algorithm, state, Plan(phase, self._users), aggregate)
            if opened is not None:
                self.opened.see(opened)
        after: RoundState = self.algorithm.server(state, phase, aggregate, key)
        return after

    def _by_item(self, state: RoundState, phase: str, total: Aggregate, n_models: int) -> Tensor:
        """[m, d] the sum of the changes of all models by item."""
        total = self.algorithm.lift(state, phase, total)
        models = total.keys < n_models * total.n_items
        table = torch.zeros(total.n_items, total.sums.shape[1])
        return table.index_add_(0, total.keys[models] % total.n_items, from_fixed(total.sums[models]))

    def see_update(self, phase: str, sent: Update) -> None:
        """Record what clients send in a phase."""
        assert self._work is not None
        self._users = sent.users
        if phase == "train":
            self._collect(sent)
        broadcast = self._work[0]
        own_columns = getattr(broadcast, "probe", None) is not None  # a pass that shows nothing of user vectors
        if self._wanted(phase) is not None and not own_columns:
            offsets = getattr(broadcast, "offsets", None)
            n_models = 1 if offsets is None else offsets.shape[0] // broadcast.items.shape[0]
            vectors = self.algorithm.user_vectors(*self._work)
            self.captured[self._wanted(phase) or 0] = Captured(sent, vectors, broadcast.items.clone(), n_models, phase)

    def see_total(self, phase: str, total: Aggregate) -> None:
        """Record a sum of a phase."""
        number = self._wanted(phase)
        if number in self.captured:
            self.captured[number].total = total

    def _wanted(self, phase: str) -> int | None:
        """The number under which the current round is captured; ``None`` if it is not."""
        if phase == "spectral" or (phase == "clusters" and not self.algorithm.protection.sums):
            return PRETRAINING
        return self.number if phase == "train" and self.number in self.rounds else None

    def _collect(self, sent: Update) -> None:
        """Record the row sets of all uploads that the coordinator sees, and the vectors of each user's first two
        participations."""
        privacy = self.algorithm.settings.privacy
        visible = privacy.aggregation == "sparse" or (privacy.aggregation == "dense" and not privacy.noise.training)
        if not visible or sent.segments is None or sent.items is None:
            return
        sizes = torch.bincount(sent.segments, minlength=sent.users.numel()).tolist()
        by_user = sent.items[sent.segments.argsort(stable=True)].split(sizes)
        for place, (user, items) in enumerate(zip(sent.users.tolist(), by_user, strict=True)):
            self.row_sets.setdefault(user, []).append(items)
            if sent.reports is not None and len(self.reports.setdefault(user, [])) < 2:
                self.reports[user].append(sent.reports[place].mean(0))


class TappedProtection:
    """A method's protection whose results a :class:`Tap` records."""

    def __init__(self, tap: Tap, protection: Protects) -> None:
        self.tap, self.protection = tap, protection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protection, name)

    def upload(self, phase: str, update: Update, key: Key) -> Update:
        sent = self.protection.upload(phase, update, key)
        self.tap.see_update(phase, sent)
        return sent

    def add_noise(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        total = self.protection.add_noise(phase, aggregate, asked, key)
        self.tap.see_total(phase, total)
        return total


@dataclass
class Audit:
    """The findings of the attacks, the lower bounds on epsilon next to the claims, and notes on attacks that were not
    made."""

    findings: list[Finding] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(each.failed for each in self.bounds)

    def without_result(self) -> list[str]:
        """The attacks on opened sums that found no group of rows at all."""
        return without_result([asdict(each) for each in self.findings])

    def plain(self) -> dict[str, Any]:
        """The audit as plain values for JSON."""
        return {
            "failed": self.failed,
            "findings": [asdict(each) for each in self.findings],
            "bounds": [{**asdict(each), "failed": each.failed} for each in self.bounds],
            "notes": self.notes,
        }


def audit(
    folder: Path,
    rounds: Sequence[int] = (1,),
    trials: int = 100_000,
    data: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Attack a finished run, and write the result to ``audit.json`` in its ``folder``.

    ``rounds`` are the training rounds to capture, counted from 1; ``trials`` is the number of canaries. The run is
    replayed from its seed, on the CPU, and every round is compared with the recorded one. Raises
    :class:`CheckpointError` if they differ, because the attacks would not see the uploads that were sent, and
    :class:`ConfigError` for a centralised method, a round that was not played, or fewer than 1000 trials.
    """
    if trials < 1000:
        raise ConfigError(f"{trials} canaries are too few for a bound; expected at least 1000")
    result, config = open_run(folder, data, "cpu")
    algorithm, history = config.build(), RunFolder(folder).history()
    if isinstance(algorithm, Method):
        raise ConfigError(
            f"{folder}: {config.algorithm} is centralised: no client sends data that could be attacked; expected a "
            "run of a federated method"
        )
    played = len(history) - len(algorithm.phases)
    if wrong := [each for each in rounds if not 1 <= each <= played and played > 0]:
        raise ConfigError(f"there is no round {wrong[0]} to capture; expected 1 to {played}, rounds of training")
    recommender = result.recommender
    assert isinstance(recommender, PersonalRecommender)
    found, population = Audit(), recommender.population
    if _drawn_anew(algorithm):
        found.notes.append("noise: OpenDP's noise cannot be drawn again, so the attacks used fresh noise")
    degrees = torch.bincount(population.items, minlength=population.n_items).to(torch.float32)
    releases = algorithm.releases(max(played, 0), population.n_users)
    found.bounds = bounds(protection_of(algorithm), releases, trials, Key(config.run.seed).fold("audit"))
    tap = Tap(algorithm, rounds if played > 0 else ())
    if algorithm.protection.secure:
        lists = population.offsets, population.items
        tap.opened = SumAttacks(degrees, lists, rounds, directions(algorithm), config.run.seed)
    _replay(tap, result, config.run, history, progress)
    for number, captured in sorted(tap.captured.items()):
        found.findings += _from_uploads(algorithm, captured, number, population, degrees)
    if tap.opened is not None:
        found.findings += tap.opened.findings()
    if not algorithm.reports_vectors:
        found.notes.append("fit and linkage of user vectors: clients send no vectors")
    if tap.row_sets:
        found.findings += _over_rounds(tap, population, degrees)
    else:
        found.notes.append("intersection of row sets: the coordinator sees no row sets")
    if played <= 0:
        found.notes.append("uploads of training: the run has no training rounds")
    if any(each.vectors is None for each in tap.captured.values()):
        found.notes.append(f"items from uploads by the user's vector: {config.algorithm} does not score with one")
    found.findings += _membership(result, degrees, tap.opened)
    RunFolder(folder).write("audit.json", json.dumps(found.plain(), indent=1).encode())
    return found


def read_audit(folder: Path) -> dict[str, Any] | None:
    """What :func:`audit` wrote, ``None`` if the run was not audited. Raises :class:`CheckpointError` for a damaged
    file."""
    path = folder / "audit.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged audit: {error}; expected valid JSON: remove the file, or repeat the audit"
        ) from None


def _replay(
    tap: Tap, result: Result, run: RunSettings, history: Sequence[Entry], progress: Callable[[int, int], None]
) -> None:
    """Replay the run with a :class:`Tap` and compare each round with its record. Raises :class:`CheckpointError` if
    they differ."""
    algorithm, rounds, phases = tap.algorithm, tap.rounds, len(tap.algorithm.phases)
    validation = Validation(result.dataset, run, torch.device("cpu"))
    everybody = result.dataset.n_users  # in one block, so that a round is captured whole
    simulator = Simulator(
        cast(AnyAlgorithm, tap),
        result.dataset,
        seed=run.seed,
        device="cpu",
        block_size=everybody,
        dropout_rate=run.dropout_rate,
    )
    total = min(len(history), phases + max(*rounds, REPLAYED, 0) if rounds else phases)
    for number in range(total):
        tap.number = number - phases + 1
        report, recorded = simulator.play(), history[number].report
        if (report.clients, report.loss) != (recorded.clients, recorded.loss) and not _drawn_anew(algorithm):
            raise CheckpointError(
                f"round {number} cannot be repeated: {recorded.clients} clients with loss {recorded.loss} are "
                f"recorded, but the replay gave {report.clients} with {report.loss}; expected the machine and "
                "versions of the run"
            )
        valid = history[number].valid  # pre-training has no loss to compare
        if report.loss is None and valid is not None and not _drawn_anew(algorithm):
            again = validation.evaluate(simulator)
            if again != valid:
                raise CheckpointError(
                    f"round {number} of pre-training cannot be repeated: {run.select_by} {valid[run.select_by]} is "
                    f"recorded, but the replay gave {again[run.select_by]}; expected the run's machine and versions"
                )
        progress(number + 1, total)


def directions(algorithm: AnyAlgorithm) -> int:
    """In how many directions the rows of one client's training lie at most: its vector, its gradient, and one more for
    each local step."""
    client = getattr(algorithm.settings, "client", None)
    return int(getattr(client, "local_steps", 1)) + 2


def protection_of(algorithm: AnyAlgorithm) -> Protection:
    """The method's protection with its full interface, which the protocol :class:`Protects` narrows."""
    return cast(Protection, algorithm.protection)


def _drawn_anew(algorithm: AnyAlgorithm) -> bool:
    """Whether the run's noise cannot be drawn again from a seed."""
    privacy = protection_of(algorithm).settings
    return privacy.noise_source == "opendp" and (privacy.noise.any or privacy.noise_scale > 0)


def _own(population: Population[ClientRecord], users: Tensor) -> list[Tensor]:
    """The items of each of ``users`` [B]."""
    rows, _ = population.rows(users)
    return list(rows.items.split(rows.counts.tolist()))


def _from_uploads(
    algorithm: AnyAlgorithm, captured: Captured, number: int, population: Population[ClientRecord], degrees: Tensor
) -> list[Finding]:
    """Item inference from what the coordinator received in one round, and the fit of that round's user vectors."""
    settings, sent, n_items = algorithm.settings.privacy, captured.update, population.n_items
    assert sent.deltas is not None
    assert sent.segments is not None
    assert sent.items is not None
    every, n = torch.arange(n_items), min(sent.users.numel(), DENSE if settings.aggregation == "dense" else SPARSE)
    if settings.aggregation == "sparse":
        own_rows = [sent.segments == place for place in range(n)]
        uploads, where = [(sent.items[mine], sent.deltas[mine]) for mine in own_rows], "one sparse upload"
    elif settings.aggregation == "dense":
        mine = sent.segments < n
        if sent.tables is not None:
            mine &= sent.tables < captured.n_models
        few = Update(
            sent.users[:n], sent.groups[:n], sent.weights[:n], sent.segments[mine], sent.items[mine], sent.deltas[mine]
        )
        seen = protection_of(algorithm).as_seen(captured.phase, few, n_items, Key(number).fold("audit"))
        uploads, where = [(every, table) for table in seen], "one dense upload"
    else:
        assert captured.table_seen is not None
        assert captured.total is not None
        uploads, where = [(every, captured.table_seen)] * n, f"the sum of {captured.total.clients} uploads"
    where += "" if number else " of pre-training"
    real = _own(population, sent.users[:n])
    found = []
    if captured.vectors is not None:
        found += attacks.infer_items(uploads, real, captured.vectors[:n], degrees, where)
    if settings.aggregation != "secure":
        found += attacks.infer_items(uploads, real, None, degrees, where)
    if sent.reports is not None:
        users = _own(population, sent.users)
        found.append(attacks.fit_vectors(sent.reports.mean(1), captured.table, users, degrees))
    return [replace(each, round=number) for each in found]


def _over_rounds(tap: Tap, population: Population[ClientRecord], degrees: Tensor) -> list[Finding]:
    """Intersection of row sets, and linkage of the vectors of each user's first two participations."""
    users = list(tap.row_sets)
    real = _own(population, torch.tensor(users, dtype=torch.int64))
    sets = [tap.row_sets[user] for user in users]
    crossed = [attacks.intersect(sets, real, after, degrees) for after in PARTICIPATIONS]
    found = [each for each in crossed if each is not None]
    pairs = [each for each in tap.reports.values() if len(each) == 2]
    if len(pairs) > 1:
        before, after = (torch.stack([pair[place] for pair in pairs]) for place in (0, 1))
        found.append(attacks.link_vectors(before, after))
    return found


def _membership(result: Result, degrees: Tensor, opened: SumAttacks | None) -> list[Finding]:
    """Train items against the same user's held-out items: by the scores of the final personal model, by the factor of
    the neighbourhood model, which everybody receives, and by one that passes over all users give."""
    recommender, dataset = result.recommender, result.dataset
    users = torch.arange(min(MEMBERS, dataset.n_users))
    rows, _ = block_rows(recommender.offsets, recommender.items, users)
    scores = recommender.raw_scores(users)

    def items_of(part: Interactions, user: int) -> Tensor:
        return torch.tensor(part.items[part.offsets[user] : part.offsets[user + 1]], dtype=torch.int64)

    parts = [dataset.valid] if dataset.new_users is not None else [dataset.valid, dataset.test]  # of users of training
    held = [torch.cat([items_of(part, user) for part in parts]) for user in users.tolist()]
    own = rows.items.split(rows.counts.tolist())
    found = [attacks.infer_membership(scores, own, held, degrees)]
    received = getattr(getattr(recommender, "state", None), "low_rank", None)
    factors = {"the factor that all receive": None if received is None else received.factor}
    if opened is not None:
        factors["the passes over all users"] = by_passes([each.sums[0] for each in opened.passes])
    known = {source: factor for source, factor in factors.items() if factor is not None}
    if known:
        together = _together(dataset.train)
        for source, factor in known.items():
            found += attack_factor(factor.cpu(), own, held, together, degrees, source)
    return found


def _together(train: Interactions) -> sparse.csr_array:
    """[m, m] the number of users who have both items of each pair."""
    ones = np.ones(train.items.size, dtype=np.int32)
    by_user = sparse.csr_array((ones, train.items, train.offsets), shape=(train.offsets.size - 1, train.n_items))
    return sparse.csr_array(by_user.T @ by_user)
