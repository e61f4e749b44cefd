"""One round, in one place: plan, the clients' work block by block, protection, aggregate, server step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum, check_aggregator, reduce
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key, uniform
from perfedrec.core.threads import threads_for
from perfedrec.core.types import Plan, RoundReport, Update
from perfedrec.runtimes.population import Population, Users


def round_key(seed: int, number: int) -> Key:
    """The key of all random numbers of a round."""
    return Key(seed).fold("round", number)


def too_few(clients: int, least: int) -> str:
    """Why a sum of a number of ``clients`` is not opened."""
    return f"{clients} clients are too few for a sum; expected at least {least}"


def surviving(cohort: Tensor, dropout_rate: float, key: Key) -> Tensor:
    """The users of a cohort who do not drop out. Each user stays with probability ``1 - dropout_rate``."""
    if not dropout_rate:
        return cohort
    return cohort[uniform(key.fold("drop-out").spread(cohort), 1).squeeze(1) >= dropout_rate]


def contribute(
    algorithm: Algorithm[S, B, C], phase: str, broadcast: B, population: Users[C], users: Tensor, key: Key
) -> tuple[Update, C]:
    """Do the work of ``users`` [B] where their data are, and store their new client states.

    Returns the update with privacy applied, and the new client states. ``key`` is the key of the round.
    """
    rows, positions = population.rows(users)
    own = key.fold("client")
    before = population.load_client_states(users, positions)
    update, client_state = algorithm.client(phase, broadcast, rows, before, own)
    population.save_client_states(users, positions, client_state, before)
    return algorithm.protection.upload(phase, update, own), client_state


def play_round(
    algorithm: Algorithm[S, B, C],
    state: S,
    population: Population[C],
    seed: int,
    dropout_rate: float = 0.0,
    block_size: int = 1024,
    nodes: Tensor | None = None,
    few_threads: bool = False,
) -> tuple[S, RoundReport]:
    """Play the next round; return the new state and a report. The states of the clients that took part are updated.

    Bytes are counted per user or, with ``nodes`` [n] (the node of each user), per node, which sends the sum of its
    users. Nothing else depends on ``nodes``. With ``few_threads`` a round of little work is played on one thread.
    """
    check_aggregator(algorithm.aggregator, algorithm.protection.secure)
    key = round_key(seed, state.round)
    plan = algorithm.plan(state, key.fold("plan"))
    users, asked, reason = surviving(plan.cohort, dropout_rate, key), plan.cohort.numel(), None
    if users.numel() < (least := algorithm.protection.least_clients(plan.phase, asked)):
        users, reason = users[:0], too_few(users.numel(), least)
    work = _Work(algorithm, state, plan, population, key, block_size, nodes)
    with threads_for(population.n_rows(users) * state.items.shape[1]) if few_threads else nullcontext():
        return _played(work, users, asked, reason)


def _played(work: _Work[S, B, C], users: Tensor, asked: int, reason: str | None) -> tuple[S, RoundReport]:
    """The work of the ``users``, and the server's. The cohort had ``asked`` users."""
    algorithm, state, plan, population, key = work.algorithm, work.state, work.plan, work.population, work.key
    empty = Aggregate.empty(population.n_items, work.n_groups, device=plan.cohort.device)
    total = algorithm.aggregator.combine(plan.phase, work.parts(users), empty)
    if not algorithm.aggregator.separate:  # else each part already has its own noise
        total = algorithm.compress(work.broadcast(), plan.phase, total)
        total = algorithm.protection.add_noise(plan.phase, total, asked, key.fold("release"))
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=asked,
        clients=total.clients,
        loss=float(torch.cat(work.losses).double().mean()) if work.losses and plan.phase == "train" else None,
        bytes_up=work.up,
        bytes_up_max=work.up_max,
        bytes_down=work.down,
        aborted=reason,
    )
    return algorithm.server(state, plan.phase, total, key.fold("server")), report


@dataclass
class _Work(Generic[S, B, C]):
    """The clients' side of a simulated round: it yields the parts of the aggregate and counts the bytes and losses of
    the work."""

    algorithm: Algorithm[S, B, C]
    state: S
    plan: Plan
    population: Population[C]
    key: Key
    block_size: int
    nodes: Tensor | None
    losses: list[Tensor] = field(default_factory=list)
    up: int = 0
    up_max: int = 0
    down: int = 0

    def __post_init__(self) -> None:
        self.n_groups, self.n_rows = self.algorithm.n_groups(self.state), self.algorithm.n_rows(self.state)

    def broadcast(self) -> B:
        """What everybody receives, whoever it is."""
        return self.algorithm.broadcast(self.state, self.plan.cohort[:0])

    def parts(self, users: Tensor) -> Iterator[Aggregate]:
        """The parts of the aggregate: one per block or, for a rule that compares clients, one per client."""
        separate = self.algorithm.aggregator.separate
        for members in _together(users, self.nodes):
            blocks = []
            for block in members.split(self.block_size):
                update = self._contribute(block)
                if separate:
                    yield from self._each(update)
                if separate and self.nodes is None:
                    continue
                blocks.append(reduce(update, self.population.n_items, self.n_groups))
                if not separate:
                    yield blocks[-1]
            if self.nodes is not None:
                self._count_node(members, blocks)

    def _contribute(self, block: Tensor) -> Update:
        """The update of a block of users [b]; counts bytes and losses."""
        broadcast, protection = self.algorithm.broadcast(self.state, block), self.algorithm.protection
        update, client_state = contribute(self.algorithm, self.plan.phase, broadcast, self.population, block, self.key)
        if self.nodes is None:
            rows = self.n_groups * self.n_rows if protection.sums else None
            sent = update.upload_bytes(rows, 8 if protection.secure else 4)
            self._count(int(sent.sum()), int(sent.max()), broadcast.download_bytes() * block.numel())
        if update.deltas is not None:
            self.losses.append(client_state.loss)
        return update

    def _each(self, update: Update) -> Iterator[Aggregate]:
        """One part per client of the ``update``, each with its own noise. A client whose numbers no sum can hold is
        left out: the rule is there to bound what one client does."""
        own, asked = self.key.fold("release"), self.plan.cohort.numel()
        for place, user in enumerate(update.users.tolist()):
            try:
                part = reduce(update.of_user(place), self.population.n_items, self.n_groups)
            except DivergedError:
                continue
            yield self.algorithm.protection.add_noise(self.plan.phase, part, asked, own.fold("client", user))

    def _count_node(self, members: Tensor, blocks: list[Aggregate]) -> None:
        """Count the bytes of the node with the users ``members``, which sends their sum."""
        protection, phase = self.algorithm.protection, self.plan.phase
        own = self.key.fold("release").fold("node", int(members.min()))
        here = self.algorithm.compress(self.broadcast(), phase, Sum().combine(phase, blocks, blocks[0]))
        leaving = here if protection.secure else protection.add_noise(phase, here, self.plan.cohort.numel(), own)
        size = leaving.upload_bytes(masked=protection.secure)
        self._count(size, size, self.algorithm.broadcast(self.state, members).download_bytes(together=True))

    def _count(self, up: int, up_max: int, down: int) -> None:
        self.up, self.up_max, self.down = self.up + up, max(self.up_max, up_max), self.down + down


def _together(users: Tensor, nodes: Tensor | None) -> list[Tensor]:
    """The users of each node that has any; without ``nodes`` [n] all users together."""
    if nodes is None or not users.numel():
        return [users] if users.numel() else []
    on = nodes[users]
    order = on.argsort(stable=True)
    return list(users[order].split(on[order].unique_consecutive(return_counts=True)[1].tolist()))
