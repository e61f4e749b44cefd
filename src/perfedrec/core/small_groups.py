"""Rules for sums of small groups before training, which are opened item by item: what one group may count of an item,
and how long its row of an item in a pass over all users may be.

All clients are split once into groups, each with a secure sum of its own. A client that lies then reaches no further
than its group: of an item that few groups have, a group counts 1 at most, and its row is not longer than such rows
usually are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Aggregator
from perfedrec.core.robust import FEWEST, Stack, ceil, total

MORE = 1
"""A group may count an item this many times more often than the groups that are taken for honest."""

STEP = 0.5
"""Items are compared with those that up to ``2^STEP`` times as many groups have."""


def held_counts(parts: list[Aggregate], share: float) -> Aggregate:
    """The sum of counts of items, where ``share`` of the groups may have a client that lies.

    Of each item a group counts at least 0, and at most :data:`MORE` more than the largest count of all groups but the
    ``share`` with the largest ones (a winsorised sum). Of a rare item, which most groups lack, that is 1.
    """
    stack = Stack.of(parts, filled=True)
    counts = stack.rows.view(len(parts), -1)
    honest = max(ceil(len(parts) * (1 - share)), 1)
    most = counts.sort(0).values[honest - 1].clamp(min=0) + MORE * FIXED_POINT
    sums = torch.minimum(counts.clamp(min=0), most).sum(0)
    return replace(total(parts), keys=stack.keys, sums=sums[:, None])


def held_rows(parts: list[Aggregate], multiple: float) -> Aggregate:
    """The sum of the groups' rows by item, each at most ``multiple`` times as long as such rows usually are.

    What is usual is a median over groups. Of an item that more than half of the groups have, it is that of its own
    rows. A rarer item could have more rows of liars than of others; so it is the median of the rows of all items that
    about as many groups have (:data:`STEP`).
    """
    stack = Stack.of(parts)
    lengths = stack.rows.square().sum(1).sqrt()
    longest = multiple * _usual(lengths, stack.places, stack.keys.numel(), len(parts))
    factors = (longest / lengths.clamp(min=1e-30)).clamp(max=1.0)
    return replace(total(parts), sums=stack.summed((stack.rows * factors[:, None]).round()))


def _usual(lengths: Tensor, places: Tensor, n_items: int, n_parts: int) -> Tensor:
    """[R] the usual length of each row of ``lengths`` [R], which belongs to the item ``places`` [R]; see
    :func:`held_rows`. Rows of zeros count for nothing."""
    there = lengths > 0
    having = torch.bincount(places[there], minlength=n_items)
    levels = (having.clamp(min=1).to(torch.float64).log2() / STEP).floor().to(torch.int64)
    own = torch.arange(n_items, device=lengths.device) + int(levels.max()) + 1 if n_items else levels
    pools = torch.where(having * 2 > n_parts, own, levels)[places]
    order = lengths.argsort(stable=True)
    order = order[there[order]]
    order = order[pools[order].argsort(stable=True)]  # by pool, and in a pool by length
    found, sizes = pools[order].unique_consecutive(return_counts=True)
    medians = lengths[order][sizes.cumsum(0) - sizes + (sizes - 1).div(2, rounding_mode="floor")]
    usual = lengths.new_zeros(int(pools.max()) + 1 if pools.numel() else 0)
    return usual.index_copy_(0, found, medians)[pools]


@dataclass(frozen=True)
class SmallGroups:
    """An :class:`~perfedrec.core.aggregate.Aggregator` for sums of small groups: :func:`held_counts` in the phases
    ``counts``, where ``share`` of the groups may have a client that lies, and :func:`held_rows` in the phases ``rows``
    with the ``multiple``. In other phases it is the rule ``other``."""

    other: Aggregator
    counts: frozenset[str]
    rows: frozenset[str]
    share: float
    multiple: float

    @property
    def separate(self) -> bool:
        return self.other.separate

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """The aggregate by the phase's rule; see :class:`perfedrec.core.aggregate.Aggregator`."""
        if phase not in self.counts | self.rows:
            return self.other.combine(phase, parts, empty)
        found = [each for each in parts if each.clients]
        if not found:
            return empty
        if len(found) < FEWEST or not any(each.sums.shape[1] for each in found):
            return total(found)
        return held_counts(found, self.share) if phase in self.counts else held_rows(found, self.multiple)
