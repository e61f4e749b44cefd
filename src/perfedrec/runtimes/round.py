"""One round, in one place: plan, the clients' work block by block, protection, aggregate, server step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import fsum
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum, check_aggregator, reduce, reduce_apart, taken_apart
from perfedrec.core.algorithm import TRAIN, Algorithm, B, C, S
from perfedrec.core.counted import counted
from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key, uniform
from perfedrec.core.robust import Robust, group_numbers
from perfedrec.core.threads import threads_for
from perfedrec.core.types import Plan, RoundReport, Update
from perfedrec.runtimes.population import Population, Users


def round_key(seed: int, number: int) -> Key:
    """The key of all random numbers of a round."""
    return Key(seed).fold("round", number)


def groups_key(algorithm: Algorithm[S, B, C], phase: str, seed: int, round_key: Key) -> Key:
    """The key by which the groups of a phase's cohort are drawn, for each round or once for the run."""
    return (Key(seed) if algorithm.protection.grouped_once(phase) else round_key).fold("groups")


def too_few(clients: int, least: int) -> str:
    """Why a sum of a number of ``clients`` is not opened."""
    return f"{counted(clients, 'client is', 'clients are')} too few for a sum; expected at least {least}"


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
    before = population.load_client_states(users, positions, algorithm.unread(phase))
    update, client_state = algorithm.client(phase, broadcast, rows, before, own)
    population.save_client_states(users, positions, client_state, before)
    return algorithm.protection.upload(phase, update, own), client_state


@dataclass(frozen=True)
class RoundTask(Generic[B]):
    """What the clients of a round are asked: the ``phase``, a function that gives users [b] their ``broadcast``, and
    the ``key`` of the round. The cohort has ``asked`` clients. Their sums have ``n_groups`` tables, of which ``n_rows``
    rows each leave the clients."""

    number: int
    phase: str
    broadcast: Callable[[Tensor], B]
    key: Key
    asked: int
    n_groups: int
    n_rows: int


@dataclass
class Tally:
    """What is counted of the clients' work: the loss of each client, and bytes (up in total, up by the client or node
    that sends most, down in total)."""

    losses: list[Tensor] = field(default_factory=list)
    up: int = 0
    up_max: int = 0
    down: int = 0

    def add(self, up: int, up_max: int, down: int) -> None:
        """Count further bytes."""
        self.up, self.up_max, self.down = self.up + up, max(self.up_max, up_max), self.down + down

    def mean_loss(self) -> float | None:
        """The mean loss, of the exact sum: it does not depend on the order of the clients. ``None`` without clients."""
        losses = torch.cat(self.losses).tolist() if self.losses else []
        return fsum(losses) / len(losses) if losses else None


class Clients(Protocol[C]):
    """The clients' side of rounds: who computes the work of a cohort. It is this process (:class:`InProcess`), or
    workers on other machines (:class:`perfedrec.runtimes.cluster.OnWorkers`)."""

    @property
    def population(self) -> Population[C]:
        """The users. Their states are those after the last round."""

    def parts(self, task: RoundTask[Any], users: Tensor, tally: Tally) -> Iterator[Aggregate]:
        """The parts of the aggregate of ``users`` [c], whose states are updated; for a rule that compares clients one
        part per client, in the order of ``users``. The ``tally`` is complete when all parts were taken."""

    def close(self) -> None:
        """End what does the work."""


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
    """Play the next round in this process; see :func:`play_with` and :class:`InProcess`."""
    clients = InProcess(algorithm, population, block_size, nodes)
    return play_with(clients, algorithm, state, seed, dropout_rate, few_threads)


def play_with(
    clients: Clients[C],
    algorithm: Algorithm[S, B, C],
    state: S,
    seed: int,
    dropout_rate: float = 0.0,
    few_threads: bool = False,
    absent: Tensor | None = None,
) -> tuple[S, RoundReport]:
    """Play the next round; return the new state and a report. The states of the ``clients`` that took part are updated.

    With ``few_threads`` a round of little work is played on one thread. Users who are ``absent`` ([n] booleans) are
    struck out of the cohort; nothing else changes for the others.
    """
    check_aggregator(algorithm.aggregator, algorithm.protection.secure)
    key = round_key(seed, state.round)
    plan = algorithm.plan(state, key.fold("plan"))
    if absent is not None:
        plan = replace(plan, cohort=plan.cohort[~absent[plan.cohort]])
    users, asked, reason = surviving(plan.cohort, dropout_rate, key), plan.cohort.numel(), None
    if users.numel() < (least := algorithm.protection.least_clients(plan.phase, asked)):
        users, reason = users[:0], too_few(users.numel(), least)
    with threads_for(clients.population.n_rows(users) * state.items.shape[1]) if few_threads else nullcontext():
        return _played(
            clients, algorithm, state, plan, users, key, reason, groups_key(algorithm, plan.phase, seed, key)
        )


def _played(
    clients: Clients[C],
    algorithm: Algorithm[S, B, C],
    state: S,
    plan: Plan,
    users: Tensor,
    key: Key,
    reason: str | None,
    grouping: Key,
) -> tuple[S, RoundReport]:
    """The work of the ``users``, and the server's. Groups of the cohort are drawn by the key ``grouping``."""
    n_groups, asked, tally = algorithm.n_groups(state), plan.cohort.numel(), Tally()
    broadcast = partial(algorithm.broadcast, state)
    task = RoundTask(state.round, plan.phase, broadcast, key, asked, n_groups, algorithm.n_rows(state))
    empty = Aggregate.empty(clients.population.n_items, n_groups, device=plan.cohort.device)
    number = algorithm.protection.n_groups(plan.phase, asked)
    if number > 1:
        numbers = group_numbers(torch.ones_like(plan.cohort), grouping.spread(plan.cohort), number)
        sums = _group_sums(clients, algorithm, task, plan, users, numbers, tally, empty)
        total = algorithm.aggregator.combine(plan.phase, sums, empty)
    else:
        total = algorithm.aggregator.combine(plan.phase, clients.parts(task, users, tally), empty)
    if not algorithm.aggregator.separate and number == 1:  # else each part already has its own noise
        total = algorithm.compress(broadcast(plan.cohort[:0]), plan.phase, total)
        total = algorithm.protection.add_noise(plan.phase, total, asked, key.fold("release"))
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=asked,
        clients=total.clients,
        loss=tally.mean_loss() if plan.phase == TRAIN.name else None,
        bytes_up=tally.up,
        bytes_up_max=tally.up_max,
        bytes_down=tally.down,
        aborted=reason,
    )
    return algorithm.server(state, plan.phase, total, key.fold("server")), report


def _group_sums(
    clients: Clients[C],
    algorithm: Algorithm[S, B, C],
    task: RoundTask[B],
    plan: Plan,
    users: Tensor,
    numbers: Tensor,
    tally: Tally,
    empty: Aggregate,
) -> Iterator[Aggregate]:
    """The opened sum of each group of the cohort, whose clients [c] have the group ``numbers`` [c] and of which
    ``users`` are left; not of a group of too few."""
    cohort, protection, phase = plan.cohort, algorithm.protection, plan.phase
    there, asked = torch.isin(cohort, users), torch.bincount(numbers).tolist()
    left = torch.bincount(numbers[there], minlength=len(asked)).tolist()
    opened = [not protection.aborted(phase, *each) for each in zip(left, asked, strict=True)]
    mine = there & torch.tensor(opened, dtype=torch.bool, device=numbers.device)[numbers]
    alone, key = task.broadcast(cohort[:0]), task.key.fold("release")
    if isinstance(clients, InProcess) and clients.nodes is None:
        places = torch.tensor(opened, dtype=torch.int64, device=numbers.device).cumsum(0) - 1
        counts = [count for count, said in zip(left, opened, strict=True) if said]
        if not counts:
            return
        whole = clients.apart(task, cohort[mine], places[numbers[mine]], len(counts), tally)
        whole = algorithm.compress(alone, phase, whole)
        yield from taken_apart(protection.add_noise(phase, whole, sum(asked), key), counts)
        return
    for each in (number for number, said in enumerate(opened) if said):
        total = Sum().combine(phase, clients.parts(task, cohort[mine & (numbers == each)], tally), empty)
        total = algorithm.compress(alone, phase, total)
        yield protection.add_noise(phase, total, asked[each], key.fold("group", each))


@dataclass(frozen=True)
class InProcess(Generic[S, B, C]):
    """Clients whose work is done here, ``block_size`` at once.

    Bytes are counted per user or, with ``nodes`` [n] (the node of each user), per node, which sends the sum of its
    users. Nothing else depends on ``nodes``. ``keep`` receives each block's update as it leaves the clients.
    """

    algorithm: Algorithm[S, B, C]
    population: Population[C]
    block_size: int = 1024
    nodes: Tensor | None = None
    keep: Callable[[RoundTask[B], Update], None] | None = None

    def parts(self, task: RoundTask[B], users: Tensor, tally: Tally) -> Iterator[Aggregate]:
        """One part per block or, for a rule that compares clients, one per client. What a rule can make of all clients
        at once is one part."""
        aggregator, protection = self.algorithm.aggregator, self.algorithm.protection
        alone = self.nodes is None and not protection.sums and 0 < users.numel() <= self.block_size
        if not alone or not isinstance(aggregator, Robust) or not aggregator.separate:
            yield from (part for _, part in self.parts_of(task, users, tally))
            return
        update, n_items = self._contribute(task, users, tally), self.population.n_items
        whole = aggregator.at_once(task.phase, update, n_items, task.n_groups)
        if whole is not None:
            yield whole
        else:
            yield from (part for _, part in client_parts(self.algorithm, task, update, n_items))

    def apart(self, task: RoundTask[B], users: Tensor, numbers: Tensor, n_parts: int, tally: Tally) -> Aggregate:
        """The sums of ``n_parts`` groups of ``users`` [c] with the ``numbers`` [c], as those of
        :func:`~perfedrec.core.aggregate.reduce_apart`. A block has users of several groups, which is faster than blocks
        of a group."""
        n_items, n_groups = self.population.n_items, task.n_groups
        total = Aggregate.empty(n_items, n_parts * n_groups, device=users.device)
        for block in torch.arange(users.numel(), device=users.device).split(self.block_size):
            if block.numel():
                update = self._contribute(task, users[block], tally)
                found = reduce_apart(update, numbers[block], n_parts, n_items, n_groups)
                total = total + found if total.clients else found
        return total

    def close(self) -> None:
        """Nothing has to be ended here."""

    def parts_of(self, task: RoundTask[B], users: Tensor, tally: Tally) -> Iterator[tuple[int, Aggregate]]:
        """The parts, each with the number of its (first) user."""
        separate = self.algorithm.aggregator.separate
        for members in together(users, self.nodes):
            blocks = []
            for block in members.split(self.block_size):
                update = self._contribute(task, block, tally)
                if separate:
                    yield from client_parts(self.algorithm, task, update, self.population.n_items)
                if separate and self.nodes is None:
                    continue
                blocks.append(reduce(update, self.population.n_items, task.n_groups))
                if not separate:
                    yield int(block[0]), blocks[-1]
            if self.nodes is not None:
                self._count_node(task, members, blocks, tally)

    def _contribute(self, task: RoundTask[B], block: Tensor, tally: Tally) -> Update:
        """The update of a block of users [b]; counts bytes and losses."""
        broadcast, protection = task.broadcast(block), self.algorithm.protection
        update, client_state = contribute(self.algorithm, task.phase, broadcast, self.population, block, task.key)
        if not protection.secure:  # who sees an upload checks it
            update = protection.hold_rows(task.phase, update)
        if self.nodes is None:
            rows = task.n_groups * task.n_rows if protection.sums else None
            sent = update.upload_bytes(rows, 8 if protection.secure else 4)
            tally.add(int(sent.sum()), int(sent.max()), broadcast.download_bytes() * block.numel())
        if update.deltas is not None:
            tally.losses.append(client_state.loss)
        if self.keep is not None:
            self.keep(task, update)
        return update

    def _count_node(self, task: RoundTask[B], members: Tensor, blocks: list[Aggregate], tally: Tally) -> None:
        """Count the bytes of the node with the users ``members``, which sends their sum."""
        protection, phase = self.algorithm.protection, task.phase
        own = task.key.fold("release").fold("node", int(members.min()))
        here = self.algorithm.compress(task.broadcast(members[:0]), phase, Sum().combine(phase, blocks, blocks[0]))
        leaving = here if protection.secure else protection.add_noise(phase, here, task.asked, own)
        size = leaving.upload_bytes(masked=protection.secure)
        tally.add(size, size, task.broadcast(members).download_bytes(together=True))


def client_parts(
    algorithm: Algorithm[S, B, C], task: RoundTask[B], update: Update, n_items: int
) -> Iterator[tuple[int, Aggregate]]:
    """One part per client of the ``update``, with the client's number, each with its own noise. A client whose numbers
    no sum can hold is left out: the rule is there to bound what one client does."""
    own = task.key.fold("release")
    for place, user in enumerate(update.users.tolist()):
        try:
            part = reduce(update.of_user(place), n_items, task.n_groups)
        except DivergedError:
            continue
        yield user, algorithm.protection.add_noise(task.phase, part, task.asked, own.fold("client", user))


def together(users: Tensor, nodes: Tensor | None) -> list[Tensor]:
    """The users of each node that has any; without ``nodes`` [n] all users together."""
    if nodes is None or not users.numel():
        return [users] if users.numel() else []
    on = nodes[users]
    order = on.argsort(stable=True)
    return list(users[order].split(on[order].unique_consecutive(return_counts=True)[1].tolist()))
