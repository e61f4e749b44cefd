"""Forgetting item by item: only the rows of items that the forgotten users have are changed, by the clients who have
them too.

Two methods share this. Replay trains these rows again from their start, in rounds of the run; correction takes the
users' gradients out of the rows, and lets the others repair them. Both begin with the phases before training as they
are without the users, which are exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.aggregate import reduce
from perfedrec.core.algorithm import TRAIN, AnyAlgorithm
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import uniform
from perfedrec.core.types import RoundReport, Update
from perfedrec.data import Dataset
from perfedrec.forgetting.simulated import Played, Trained, adopt, chosen_as, simulated, touched_items
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.state import OptimizerState
from perfedrec.methods.federated.tables import Average, Moments
from perfedrec.runs.config import RunSettings
from perfedrec.runs.folder import Entry
from perfedrec.runtimes.round import round_key
from perfedrec.runtimes.simulator import Simulator

OTHERS = 8
"""Clients without any of the items who are asked in each round besides, for their negatives; their weight is that of
all such clients of the round."""


def check(algorithm: AnyAlgorithm) -> None:
    """Raise :class:`ConfigError` for a method or a privacy profile under which rows cannot be changed apart."""
    privacy = algorithm.settings.privacy
    if not isinstance(algorithm, FedMF) or algorithm.settings.privacy.aggregation != "sparse" or privacy.noise.any:
        raise ConfigError(
            "rows of single items are changed where clients send the rows of their items (aggregation sparse, no noise)"
            " and the method scores with vectors (fedmf, fedgnn, perfedrec, perfedrec_pp); expected --method exact"
        )
    if algorithm.settings.model.model_dump().get("attributes"):
        raise ConfigError("networks of attributes belong to no item; expected --method exact")


@dataclass
class Rows:
    """The rows of ``touched`` items [m] of a run, in a simulator whose state is being changed. ``holders`` [n] are the
    remaining users who have one of these items, and ``played`` is the number of rounds of training of the run."""

    simulator: Simulator[Any, Any, Any]
    touched: Tensor
    holders: Tensor
    played: int
    first: Any

    @staticmethod
    def of(
        algorithm: AnyAlgorithm, left: Dataset, run: RunSettings, before: Trained, played: int, gone: Tensor
    ) -> Rows:
        """The rows that the users ``gone`` [k] touched in a run of ``played`` rounds of training with the model
        ``before``. The phases before training are those of the data that are ``left``."""
        simulator, touched = simulated(algorithm, left, run), touched_items(before, gone)
        for _ in algorithm.phases:
            simulator.play()
        first = simulator.state
        adopt(simulator.population, before, simulator.absent)
        holders = torch.zeros(left.n_users, dtype=torch.bool)
        rows, _ = simulator.population.rows(simulator.population.everyone())
        holders[rows.segments[touched[rows.items]]] = True
        found = Rows(simulator, touched, holders, played, first)
        simulator.state = found._joined(algorithm, before.state)
        return found

    @property
    def algorithm(self) -> Any:
        return self.simulator.algorithm

    def _joined(self, algorithm: AnyAlgorithm, old: Any) -> Any:
        """The state after the phases, with the trained tables of the state ``old``. The optimiser begins anew."""
        first = self.first
        names = {each.name for each in fields(first)}
        kept = {name: getattr(old, name) for name in ("clusters", "dense") if name in names}
        items, offsets = old.items.clone(), None if old.offsets is None else old.offsets.clone()
        start = replace(first, items=items, offsets=offsets, round=old.round, **kept)
        moments = OptimizerState(*(None if each is None else Moments.zeros(each) for each in (items, offsets, None)))
        adaptive = algorithm.settings.server.optimizer != "fedavg"
        average = Average.start(items) if algorithm.settings.server.averaging else None
        start = replace(start, optimizer=moments if adaptive else OptimizerState(), average=average)
        return self._with_neighbours(chosen_as(start, old))

    def _with_neighbours(self, state: Any) -> Any:
        """The state with neighbour sums of the vectors that the remaining users have at the end, without those of the
        forgotten ones: the service has all vectors, and asks nobody."""
        algorithm, population = self.algorithm, self.simulator.population
        if not isinstance(algorithm, GraphMethod) or not algorithm.neighbours or state.service.graph is None:
            return state
        service, absent = state.service, self.simulator.absent
        reports = torch.zeros_like(service.reports)
        everyone = population.everyone()
        for users in (everyone if absent is None else everyone[~absent]).split(1024):
            rows, positions = population.rows(users)
            broadcast, own = algorithm.broadcast(state, users), population.load_client_states(users, positions)
            vectors = algorithm.layers(broadcast, rows, algorithm.private_of(broadcast, own))
            reports[service.places(users)] = vectors[:, : reports.shape[1]]
        service = replace(service, reports=reports)
        sums = neighbourhood.neighbour_sums(service.graph, reports, algorithm.settings.model.n_layers)
        sums = sums if state.tokens is None else sums[:, state.tokens]
        return replace(state, service=service, neighbours=sums)

    def reset(self) -> None:
        """Put the touched rows of all tables back to what they were before training."""
        state, first = self.simulator.state, self.first
        state.items[self.touched] = first.items[self.touched]
        if state.offsets is not None and first.offsets is not None:
            places = self.touched.repeat(state.offsets.shape[0] // self.touched.numel())
            state.offsets[places] = first.offsets[places]
        if state.average is not None:
            self.simulator.state = replace(state, average=Average.start(state.items))

    def cohort(self, number: int) -> tuple[Tensor, Tensor]:
        """The clients of the round of training ``number`` who have touched items, and a few of the others with the
        weight of each: users [c] and weights [c]."""
        simulator, algorithm = self.simulator, self.algorithm
        key = round_key(simulator.seed, number)
        users = algorithm.plan(replace(simulator.state, round=number), key.fold("plan")).cohort
        users = users if simulator.absent is None else users[~simulator.absent[users]]
        mine, others = users[self.holders[users]], users[~self.holders[users]]
        some = others[uniform(key.fold("others").spread(others), 1).squeeze(1).argsort(stable=True)[:OTHERS]]
        weights = torch.ones(mine.numel() + some.numel())
        weights[mine.numel() :] = others.numel() / max(some.numel(), 1)
        return torch.cat([mine, some]), weights

    def numbers(self, share: float) -> list[int]:
        """A ``share`` of the rounds of training, at even distances."""
        first = len(self.algorithm.phases)
        return [] if not share else list(range(first, first + self.played, max(round(1 / share), 1)))

    def play(self, numbers: list[int]) -> Iterator[Entry]:
        """Play the clients' part of rounds again for the touched rows; everything else stays as it is, also what
        clients keep."""
        for number in numbers:
            begin = time.perf_counter()
            users, weights = self.cohort(number)
            if not users.numel():
                continue
            update = self._update(number, users)
            self._step(number, replace(update, weights=update.weights * weights))
            sent = int(update.upload_bytes().sum())
            received = self.algorithm.broadcast(self.simulator.state, users).download_bytes() * users.numel()
            report = RoundReport(number, TRAIN.name, users.numel(), users.numel(), None, sent, sent, received)
            yield Entry(report, time.perf_counter() - begin)

    def undo(self, before: Trained, gone: Tensor) -> int:
        """Take the gradients of the users ``gone`` [k] out of the touched rows, at the state as it is: each row moves
        against the user's local change of it, as often as the user took part, by the user's share of the item's users.
        Returns how often users took part. The users' nodes have to help: nobody else has their states."""
        population, state = before.population, self.simulator.state
        rows, positions = population.rows(gone)
        own = population.load_client_states(gone, positions)
        key = round_key(self.simulator.seed, state.round)
        update, _ = self.algorithm.client(TRAIN.name, self.algorithm.broadcast(state, gone), rows, own, key)
        assert update.deltas is not None
        assert update.items is not None
        assert update.segments is not None
        n_items = self.touched.numel()
        degrees = torch.bincount(self.simulator.population.items, minlength=n_items) + 1.0
        often = own.participations.to(torch.float32)[update.segments] / degrees[update.items]
        mine = self.touched[update.items]
        change = (update.deltas * often[:, None])[mine]
        state.items.index_add_(0, update.items[mine], -change)
        if state.average is not None:
            self.simulator.state = replace(state, average=Average.start(state.items))
        return int(own.participations.sum())

    def _update(self, number: int, users: Tensor) -> Update:
        """What users [c] send in a round for the state as it is. They keep nothing of it."""
        key, population = round_key(self.simulator.seed, number).fold("client"), self.simulator.population
        rows, positions = population.rows(users)
        own, state = population.load_client_states(users, positions), replace(self.simulator.state, round=number)
        update, _ = self.algorithm.client(TRAIN.name, self.algorithm.broadcast(state, users), rows, own, key)
        return self.algorithm.protection.upload(TRAIN.name, update, key)  # type: ignore[no-any-return]

    def _step(self, number: int, update: Update) -> None:
        """The server's step of the touched rows."""
        state, n_items = replace(self.simulator.state, round=number), self.touched.numel()
        total = reduce(replace(update, reports=None, edges=None), n_items, self.algorithm.n_groups(state))
        mine = self.touched[total.keys % n_items]
        self.algorithm.server_step(state, replace(total, keys=total.keys[mine], sums=total.sums[mine], dense=None))
        self.simulator.state = replace(state, round=number + 1)

    def finished(self, entries: list[Entry], seconds: float) -> Played:
        """What was made, after the last round of the run."""
        done = len(self.algorithm.phases) + self.played
        self.simulator.state = replace(self.simulator.state, round=done)
        return Played(self.simulator.recommender(), entries, seconds)


def replay(rows: Rows, share: float) -> Played:
    """Train the touched rows again, from what they are before training without the forgotten users: clients who have
    these items do their part of a ``share`` of the rounds of the run again. All other rows stay, and so does what
    clients keep.

    FRU (Yuan et al., WSDM 2023, arXiv 2210.10958) rolls back to where the user joined, and replays updates that clients
    have stored, calibrated by new ones. Departs from the paper: nothing has to be stored, because cohorts and draws are
    keyed, and clients compute their part anew at the tables as they are now; and only rows of the user's items are
    rolled back. The phases before training cost nothing: the service has the edges, and asks nobody.
    """
    start = time.perf_counter()
    rows.reset()
    return rows.finished(list(rows.play(rows.numbers(share))), time.perf_counter() - start)


def correct(rows: Rows, before: Trained, gone: Tensor, share: float) -> Played:
    """Take the gradients of the users ``gone`` [k] out of the touched rows (:meth:`Rows.undo`), and let the clients who
    have these items repair them in a ``share`` of the rounds of the run, as in :func:`replay`.

    Gradient ascent with repair, as Halimi et al. (Federated unlearning: how to efficiently erase a client in FL?, 2022)
    do it. Departs from the paper: the step has a length from the user's share of the item's users instead of a bound on
    the distance to a reference model, and only rows of the user's items are changed.
    """
    start = time.perf_counter()
    rows.undo(before, gone)
    return rows.finished(list(rows.play(rows.numbers(share))), time.perf_counter() - start)
