"""Users whose client states are on workers: how they are cut into shards, and how their states are read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from perfedrec.core.algorithm import C
from perfedrec.core.errors import ConfigError
from perfedrec.core.records import Segment
from perfedrec.runtimes.population import USERS_OF, Population


class Holder(Protocol):
    """Who holds the client states of users, in ``shards`` of consecutive users."""

    shards: list[Tensor]

    def load(self, users: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The client states of ``users`` [B]: for each shard of some of them their places [b] among the users, and
        their fields."""

    def stored(self) -> list[dict[str, Tensor]]:
        """What was written of the client states of each shard, whose users are numbered from 0."""

    def restore(self, stored: list[dict[str, Tensor]]) -> None:
        """Continue with other client states of each shard."""


class Remote(Population[C]):
    """A population whose client states are on workers."""

    def __init__(self, like: Population[C], workers: Holder) -> None:
        super().__init__(like.offsets, like.items, like.n_items, like.attributes)
        self._algorithm, self._key, self._like, self._workers = like._algorithm, like._key, like._like, workers

    def load_client_states(self, users: Tensor, positions: Tensor) -> C:
        counts = self.offsets[users + 1] - self.offsets[users]
        found: dict[str, Tensor] = {}
        for places, states in self._workers.load(users):
            mine = torch.zeros(users.numel(), dtype=torch.bool)
            mine[places] = True
            for name, per_row in self._layout().items():
                where, size = (mine.repeat_interleave(counts), positions.numel()) if per_row else (mine, users.numel())
                like = states[name]
                found.setdefault(name, like.new_empty(size, *like.shape[1:]))[where] = like
        return cast(C, replace(cast(Any, self._like), **found))

    def stored(self) -> dict[str, Tensor]:
        parts, found = self._workers.stored(), {}
        for name in self._layout():
            users = [
                which if each.get(USERS_OF + name) is None else which[each[USERS_OF + name]]
                for each, which in zip(parts, self._workers.shards, strict=True)
                if name in each
            ]
            if users:
                found[name] = torch.cat([each[name] for each in parts if name in each])
                if sum(each.numel() for each in users) < self.n_users:
                    found[USERS_OF + name] = torch.cat(users)
        return found

    def segments(self) -> tuple[Segment, ...]:
        """What was written, as one segment."""
        stored = self.stored()
        return (Segment(stored),) if stored else ()

    def restore(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> None:
        whole = self.with_client_states(stored).stored()  # of all that is stored the newest, under its present name
        self._workers.restore([self._of_shard(whole, users) for users in self._workers.shards])

    def _of_shard(self, stored: Mapping[str, Tensor], shard: Tensor) -> dict[str, Tensor]:
        """What :meth:`stored` returned, for the users of a shard alone, who are numbered from 0."""
        first, last, found = int(shard[0]), int(shard[-1]), {}
        for name, per_row in self._layout().items():
            users = stored.get(USERS_OF + name, self.everyone())
            start, stop = (int(torch.searchsorted(users, limit)) for limit in (first, last + 1))
            if name not in stored or start == stop:
                continue
            if stop - start < shard.numel():
                found[USERS_OF + name] = users[start:stop] - first
            if per_row:
                counts = (self.offsets[users + 1] - self.offsets[users]).cumsum(0)
                start, stop = (int(counts[place - 1]) if place else 0 for place in (start, stop))
            found[name] = stored[name][start:stop]
        return found

    @property  # type: ignore[misc]  # it is read alone
    def client_state(self) -> C:
        """The client states of all users. Tests and small data alone have use for it."""
        return self.with_client_states(self.stored()).client_state


def shards(population: Population[Any], n: int, nodes: Tensor | None = None) -> list[Tensor]:
    """The users of each of ``n`` shards: consecutive ones, with about the same number of interactions in each shard.

    The users of a node (``nodes`` [n], ascending) are not parted. Raises :class:`ConfigError` where there are too few.
    """
    everyone = population.everyone()
    firsts = everyone if nodes is None else torch.cat([everyone[:1], everyone[1:][nodes.diff() > 0]])
    if firsts.numel() < n:
        what = "users" if nodes is None else "nodes"
        raise ConfigError(f"run.workers is {n}, and the data have {firsts.numel()} {what}; expected not more workers")
    load = population.offsets[firsts].to(torch.float64) / max(int(population.offsets[-1]), 1)
    cuts = torch.searchsorted(load, torch.arange(n, dtype=torch.float64) / n)
    low, high = torch.arange(n), firsts.numel() - n + torch.arange(n)  # at least one for each
    cuts = torch.maximum((torch.minimum(cuts, high) - low).cummax(0).values + low, low)
    limits = [*firsts[cuts].tolist(), population.n_users]
    return [torch.arange(start, stop) for start, stop in pairwise(limits)]
