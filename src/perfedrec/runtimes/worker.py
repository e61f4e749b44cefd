"""A worker: a process of a cluster that holds the data and client states of some users, and does their work in rounds.

A worker stores new states at once, and keeps its last answer. Where a request is repeated, because another worker has
died, it gives this answer again. A worker that takes the place of a dead one gets states of an earlier round, and does
again what was asked since then.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum
from perfedrec.core.algorithm import Algorithm
from perfedrec.core.keys import Key
from perfedrec.core.records import Scalar, flatten, unflatten
from perfedrec.core.version import __version__
from perfedrec.runtimes.hosted import Hosted
from perfedrec.runtimes.round import InProcess, RoundTask, Tally

R = TypeVar("R")

Arrays = tuple[dict[str, np.ndarray], dict[str, Scalar]]
"""A record in its flat form, with arrays in place of tensors: these travel without a copy."""


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


def owned(total: Aggregate, received: list[Aggregate]) -> Aggregate:
    """A sum of parts that were ``received``, with memory of its own: theirs can only be read."""
    theirs = {each.data_ptr() for part in received for each in flatten(part)[0].values()}
    mine = flatten(total)[0].items()
    return replace(total, **cast(Any, {name: each.clone() for name, each in mine if each.data_ptr() in theirs}))


@dataclass(frozen=True)
class Work:
    """What a worker is asked: a :class:`~perfedrec.runtimes.round.RoundTask` without the broadcast, whose fields with
    one row per user are ``own``. ``users`` [b] are those of the cohort that it holds. ``request`` counts what workers
    are asked; a round has several requests where its sums are opened in groups."""

    request: int
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


class Worker:
    """The process that does the work of the users of a shard. Its methods are called by the process that plays the
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
        self._answered = 0
        self._answer: tuple[Done, list[Arrays]] | None = None

    def version(self) -> str:
        """The version of this package on the worker's machine."""
        return __version__

    # --- client states ---

    def host(self, n_items: int, data: Mapping[str, np.ndarray]) -> None:
        """Take users with their first client states. ``data`` are the fields of a
        :class:`~perfedrec.runtimes.hosted.Hosted`."""
        given = tensors(data)
        users, attributes = given["users"].clone(), given.get("attributes")
        self.population: Hosted[Any] = Hosted(users, given["offsets"], given["items"], n_items, attributes)
        self.reset()

    def reset(self) -> None:
        """Let every user have its first client state."""
        self.population.init_clients(self.algorithm, self.seed)

    def write(self, written: Mapping[str, np.ndarray]) -> None:
        """Write client states that :meth:`written` returned, here or elsewhere."""
        self.population.write(tensors(written))

    def written(self, users: np.ndarray) -> dict[str, np.ndarray]:
        """What was written of the client states of ``users`` [B]."""
        return arrays(self.population.written(torch.from_numpy(users)))

    def load(self, users: np.ndarray) -> dict[str, np.ndarray]:
        """The client states of ``users`` [B]."""
        which = torch.from_numpy(users)
        return packed(self.population.load_client_states(which, self.population.rows(which)[1]))[0]

    # --- rounds ---

    def play(self, work: Work, common: Arrays) -> tuple[Done, list[Arrays]]:
        """Do the work of users, and store their new states. Returns what was counted, and the parts of the aggregate:
        their sum, unless the method's rule compares clients. The last work is not done twice; its answer is kept."""
        if self._answer is None or self._answered != work.request:
            self._answer = None
            self._answer, self._answered = self._played(work, common), work.request
        return self._answer

    def replay(self, work: Work, common: Arrays) -> None:
        """Do work that another worker did before it died. Its answer is known, unless it is that of the last work."""
        self.play(work, common)

    def _played(self, work: Work, common: Arrays) -> tuple[Done, list[Arrays]]:
        users, tally = torch.from_numpy(work.users), Tally()
        clients = InProcess(self.algorithm, self.population, self.block_size, self.nodes)
        parts = clients.parts_of(self._task(work, users, common), users, tally)
        if self.algorithm.aggregator.separate:
            made = list(parts)
            owners, found = [user for user, _ in made], [part for _, part in made]
        else:
            empty = Aggregate.empty(self.population.n_items, work.n_groups)
            owners, found = [], [Sum().combine(work.phase, (part for _, part in parts), empty)]
        losses = [each.numpy() for each in tally.losses]
        return Done(losses, tally.up, tally.up_max, tally.down, owners), [packed(part) for part in found]

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
