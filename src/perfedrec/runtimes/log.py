"""What workers were asked since their client states were copied, so that it can be asked again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from perfedrec.runtimes.worker import Work

LOG_REQUESTS = 100
"""From how many requests on the client states are copied. A worker that takes the place of a dead one repeats at most
these, which takes about as long as they took."""

LOG_BYTES = 512 << 20
"""From how many bytes on the client states are copied. The log holds every broadcast since the last copy, in Ray's
store on the machine of the process that plays the rounds. By default this has 30 % of the memory."""


@dataclass(frozen=True)
class Request:
    """What the workers are asked at once: the ``works`` by the number of the shard, and the part of the broadcast that
    they have in ``common``, as Ray holds it. ``size`` is the bytes of all."""

    number: int
    works: dict[int, Work]
    common: Any
    size: int


@dataclass
class Log:
    """The requests since the copy of the client states was up to date, for ``n_users`` users.

    A client's new state follows from its old state, the broadcast, and the key of the round. So the log and the copy
    tell all states. ``copied`` [n] is, for each user, the number of the last request that its copied state includes.
    """

    n_users: int
    number: int = 0
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.copied = torch.zeros(self.n_users, dtype=torch.int32)

    @property
    def full(self) -> bool:
        """Whether the copy should be brought up to date, so that the log can be cleared."""
        return len(self.requests) >= LOG_REQUESTS or sum(each.size for each in self.requests) >= LOG_BYTES

    def add(self, request: Request) -> None:
        """Note the next request."""
        self.requests.append(request)
        self.number = request.number

    def users(self, shard: int) -> Tensor:
        """The users [k] of a shard whose states have changed since they were copied, ascending."""
        asked = [torch.from_numpy(each.works[shard].users) for each in self.requests if shard in each.works]
        users = torch.cat(asked).unique() if asked else torch.zeros(0, dtype=torch.int64)
        return users[self.copied[users] < self.number]

    def note_copied(self, users: Tensor) -> None:
        """Note that the copied states of ``users`` [B] include all requests."""
        self.copied[users] = self.number

    def clear(self) -> None:
        """Forget all requests: the copy is up to date."""
        self.requests = []

    def of(self, shard: int) -> Iterator[tuple[Work, Any]]:
        """What the worker of a shard has to repeat on the copied states: the work of each request, for those users
        whose copy does not include it, and the common part of its broadcast."""
        for request in self.requests:
            if (work := request.works.get(shard)) is None:
                continue
            left = (self.copied[torch.from_numpy(work.users)] < request.number).numpy()
            if left.all():
                yield work, request.common
            elif left.any():
                own = {name: each[left] for name, each in work.own.items()}
                yield replace(work, users=work.users[left], own=own), request.common
