"""A worker: a process of a cluster that holds the data and client states of some users, and does their work in rounds.

Every user's states are on two workers, the one that computes and one that keeps a copy. New states are kept aside on
both until the round is complete. So a round that a worker did not survive is done again from the states before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum
from perfedrec.core.algorithm import Algorithm, C
from perfedrec.core.keys import Key
from perfedrec.core.records import Scalar, flatten, unflatten
from perfedrec.runtimes.hosted import Hosted
from perfedrec.runtimes.round import InProcess, RoundTask, Tally

R = TypeVar("R")

Arrays = tuple[dict[str, np.ndarray], dict[str, Scalar]]
"""A record in its flat form, with arrays in place of tensors: these travel without a copy."""

Changes = list[tuple[Tensor, dict[str, Tensor]]]
"""New client states of blocks of users: the users, and the fields that changed."""


def packed(record: Any) -> Arrays:
    """The flat form of a record."""
    tensors, scalars = flatten(record)
    return arrays(tensors), scalars


def unpacked(cls: type[R], given: Arrays) -> R:
    """The record of type ``cls`` that :func:`packed` made. It shares the memory of the arrays, which nobody may change
    if they were received."""
    return unflatten(cls, tensors(given[0]), given[1])


def arrays(given: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays, without a copy where they are in sequence."""
    return {name: tensor.detach().contiguous().numpy() for name, tensor in given.items()}


def tensors(given: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to them
        return {name: torch.from_numpy(array) for name, array in given.items()}


def version() -> str:
    """The version of this package that is installed."""
    try:
        return metadata.version("perfedrec")
    except metadata.PackageNotFoundError:  # used from its sources
        return "of unknown version"


@dataclass(frozen=True)
class Work:
    """What a worker is asked in a round: a :class:`~perfedrec.runtimes.round.RoundTask` without the broadcast, whose
    fields with one row per user are ``own``. ``users`` [b] are those of the cohort that it hosts."""

    number: int
    phase: str
    key: int
    asked: int
    n_groups: int
    n_rows: int
    users: np.ndarray
    own: dict[str, np.ndarray]


@dataclass(frozen=True)
class Done:
    """What was counted of a worker's part of a round, and, for a rule that compares clients, the user of each part."""

    losses: list[np.ndarray]
    up: int
    up_max: int
    down: int
    owners: list[int]


class Shard(Hosted[C]):
    """Users of a worker, whose new states are ``pending`` until the round is complete."""

    pending: Changes

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        """Keep new states aside; those of a block of ``users`` [B]."""
        changed = {}
        for each in fields(cast(Any, client_state)):
            value = getattr(client_state, each.name)
            if before is None or value is not getattr(before, each.name) or value._version:  # changed in place
                changed[each.name] = value.clone()  # parts of an update may share its memory
        self.pending.append((users, changed))

    def commit(self) -> None:
        """Store what is pending."""
        for users, changed in self.pending:
            positions = self.rows(users)[1]
            before = self.load_client_states(users[:0], positions[:0])
            after = replace(cast(Any, before), **changed)
            super().save_client_states(users, positions, after, before)
        self.pending = []


class Worker:
    """The process that does the work of the users of some shards. Its methods are called by the process that plays the
    rounds, one after the other, and what they take and return is arrays."""

    def __init__(
        self,
        algorithm: Algorithm[Any, Any, Any],
        seed: int,
        block_size: int,
        threads: int,
        nodes: np.ndarray | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.algorithm, self.seed, self.block_size = algorithm, seed, block_size
        self.nodes = None if nodes is None else torch.from_numpy(nodes)
        self.shards: dict[int, Shard[Any]] = {}

    def version(self) -> str:
        """The version of this package on the worker's machine."""
        return version()

    # --- client states ---

    def host(self, shard: int, n_items: int, data: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]) -> None:
        """Take the users of a shard, with the client states that :meth:`stored` returned; their first ones where it is
        empty. ``data`` are the fields of a :class:`~perfedrec.runtimes.hosted.Hosted`."""
        given = tensors(data)
        users, attributes = given["users"].clone(), given.get("attributes")
        here: Shard[Any] = Shard(users, given["offsets"], given["items"], n_items, attributes)
        here.init_clients(self.algorithm, self.seed)
        here.pending, self.shards[shard] = [], here
        if stored:
            here.restore(tensors(stored))

    def load(self, shard: int, users: np.ndarray) -> dict[str, np.ndarray]:
        """The client states of ``users`` [B]."""
        here, which = self.shards[shard], torch.from_numpy(users)
        return packed(here.load_client_states(which, here.rows(which)[1]))[0]

    def stored(self, shard: int) -> dict[str, np.ndarray]:
        """What was written of a shard's client states."""
        return arrays(self.shards[shard].stored())

    def restore(self, shard: int, stored: Mapping[str, np.ndarray]) -> None:
        """Continue with other client states of a shard."""
        self.shards[shard].restore(tensors(stored))

    # --- rounds ---

    def play(self, shard: int, work: Work, common: Arrays) -> tuple[Done, list[Arrays], Any]:
        """Do the work of users of a shard. Returns what was counted, the parts of the aggregate (their sum, unless the
        method's rule compares clients), and the new client states, which are pending here."""
        here, users, tally = self.shards[shard], torch.from_numpy(work.users), Tally()
        here.pending = []  # of a round that is done again
        clients = InProcess(self.algorithm, here, self.block_size, self.nodes)
        parts = clients.parts_of(self._task(work, users, common), users, tally)
        if self.algorithm.aggregator.separate:
            made = list(parts)
            owners, found = [user for user, _ in made], [part for _, part in made]
        else:
            empty = Aggregate.empty(here.n_items, work.n_groups)
            owners, found = [], [Sum().combine(work.phase, (part for _, part in parts), empty)]
        losses = [each.numpy() for each in tally.losses]
        changes = [(block.numpy(), arrays(changed)) for block, changed in here.pending]
        done = Done(losses, tally.up, tally.up_max, tally.down, owners)
        return done, [packed(part) for part in found], changes

    def _task(self, work: Work, users: Tensor, common: Arrays) -> RoundTask[Any]:
        """The task of a round, with the broadcast that was received."""
        numbers, order = users.sort()
        cls, shared, own = self.algorithm.broadcast_type, tensors(common[0]), tensors(work.own)

        def broadcast(block: Tensor) -> Any:
            places = order[torch.searchsorted(numbers, block)]
            mine = {name: each.index_select(0, places) for name, each in own.items()}
            return unflatten(cls, shared | mine, common[1])

        return RoundTask(work.number, work.phase, broadcast, Key(work.key), work.asked, work.n_groups, work.n_rows)

    def add(self, one: list[Arrays], other: list[Arrays]) -> list[Arrays]:
        """The sum of two sums."""
        return [packed(unpacked(Aggregate, one[0]) + unpacked(Aggregate, other[0]))]

    def keep(self, shard: int, changes: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> None:
        """Take the new client states of a shard that another worker computed; they are pending."""
        self.shards[shard].pending = [(torch.from_numpy(users), tensors(changed)) for users, changed in changes]

    def commit(self) -> None:
        """Store all that is pending: the round is complete."""
        for each in self.shards.values():
            each.commit()
