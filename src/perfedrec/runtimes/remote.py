"""Users whose client states are on workers: how they are cut into shards, and how their states are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from perfedrec.core.algorithm import C
from perfedrec.core.errors import ConfigError
from perfedrec.core.records import Segment
from perfedrec.runtimes.population import Population


class Holder(Protocol[C]):
    """Who holds the client states of users."""

    def load(self, users: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The client states of ``users`` [B]: for each worker that holds some of them their places [b] among the users,
        and their fields."""

    def up_to_date(self) -> Population[C]:
        """The copy of all client states in this process, after all that changed since has been fetched."""

    def restore(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> None:
        """Continue with other client states."""

    def let_go(self) -> None:
        """Let go of the copy of all client states. Nobody asks for any afterwards."""


class Remote(Population[C]):
    """A population whose client states are on workers. Some users' states are read there; all of them are read from
    the copy in this process, so that what has not changed since does not travel again."""

    def __init__(self, like: Population[C], workers: Holder[C]) -> None:
        super().__init__(like.offsets, like.items, like.n_items, like.attributes)
        self._algorithm, self._key, self._like, self._workers = like._algorithm, like._key, like._like, workers

    def load_client_states(self, users: Tensor, positions: Tensor, unread: Collection[str] = ()) -> C:
        counts = self.offsets[users + 1] - self.offsets[users]
        found: dict[str, Tensor] = {}
        if not users.numel():  # no worker answers
            found = {name: getattr(self._like, name)[:0] for name in self._layout()}
        for places, states in self._workers.load(users):
            mine = torch.zeros(users.numel(), dtype=torch.bool)
            mine[places] = True
            for name, per_row in self._layout().items():
                where, size = (mine.repeat_interleave(counts), positions.numel()) if per_row else (mine, users.numel())
                like = states[name]
                found.setdefault(name, like.new_empty(size, *like.shape[1:]))[where] = like
        return cast(C, replace(cast(Any, self._like), **found))

    def stored(self) -> dict[str, Tensor]:
        return self._workers.up_to_date().stored()

    def segments(self) -> tuple[Segment, ...]:
        return self._workers.up_to_date().segments()

    def restore(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> None:
        self._workers.restore(stored)

    def let_go(self) -> None:
        self._workers.let_go()

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
