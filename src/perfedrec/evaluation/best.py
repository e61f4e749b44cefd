"""The best items of a block of users, by scores that are computed piece by piece.

On a processor the scores of many items never leave its cache: the product of some users and some items is one tile,
in which the best are found at once (:mod:`perfedrec.evaluation.kernels`). Elsewhere, and where there are few items, all
scores of a block are computed, and :func:`perfedrec.evaluation.ranking.rank_block` ranks them. Which way is taken
depends on the number of items and on the machine, so that a node and a simulator take the same one. Both find the same
lists, but for items whose scores differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.compiled import spread, usable
from perfedrec.core.products import inner_products
from perfedrec.core.scoring import Scoring
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import mask_seen, rank_block, settle

MANY_ITEMS = 4096
"""From how many items on scores are computed tile by tile."""

USERS, ITEMS = 256, 2048
"""The size of a tile: it fits into the second-level cache."""

AT_ONCE = 64
"""Users whose scores are all computed where scores are equal at the end of their lists."""


def rank_scoring(
    scoring: Scoring, k: int, users: Tensor, order: RandomOrder, segments: Tensor, hidden: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """For each setting the ``k`` best items of each of ``users`` [B], as :func:`rank_block` gives them: scores and
    items [B, min(k, m)], best first.

    Items are left out where a pair of ``segments`` [R] (a place in the block) and ``hidden`` [R] (an item) says so.
    """
    k = min(k, scoring.n_items)
    if not _in_tiles(scoring):
        return [rank_block(mask_seen(each, segments, hidden), k, users, order) for each in scoring.each()]
    found, cut = [], []
    for best, items, lost in zip(*_heaps(scoring, k, segments, hidden), strict=True):
        best, places = best.sort(dim=1, descending=True, stable=True)
        items = items.gather(1, places)
        settle(best, items, users, order)
        found.append((best, items))
        cut.append((best[:, -1] == lost) & (lost > -torch.inf))
    _choose(scoring, torch.stack(cut), found, users, order, segments, hidden)
    return found


def _in_tiles(scoring: Scoring) -> bool:
    """Whether scores are computed tile by tile."""
    tensors = [scoring.known] if scoring.known is not None else [part.users for part in scoring.parts]
    if scoring.n_items < MANY_ITEMS or not usable(*tensors):
        return False
    return all(each.dtype == torch.float32 for each in tensors)


def _heaps(scoring: Scoring, k: int, segments: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` best scores and their items [S, B, k], in any order, and the best score that is not among them
    [S, B]. Unused places have the score minus infinity and item 0."""
    from perfedrec.evaluation import kernels

    n_users, n_items, n_settings = scoring.n_users, scoring.n_items, scoring.n_settings
    values = np.full((n_settings, n_users, k), -np.inf, np.float32)
    items, sizes = np.zeros(values.shape, np.int64), np.zeros(values.shape[:2], np.int64)
    heaps = values, items, sizes, np.full(values.shape[:2], -np.inf, np.float32)
    width = n_items if scoring.known is not None else ITEMS

    def in_tiles(limits: Tensor, wanted: Tensor) -> tuple[NDArray[np.int64], ...]:
        """Items of the users as the kernel takes them, from the limits [B + 1] of each user's items."""
        starts, order = np.zeros((n_users, -(-n_items // width) + 1), np.int64), np.empty(wanted.numel(), np.int64)
        kernels.sort_into_tiles(limits.numpy(), wanted.numpy(), width, starts, order)
        return wanted.numpy(), starts, order

    limits = torch.zeros(n_users + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(segments, minlength=n_users), 0, out=limits[1:])
    without = in_tiles(limits, hidden[segments.argsort(stable=True)])
    weights, given = np.zeros((0, 0, 0), np.float32), np.zeros((0, n_settings), np.float32)
    if scoring.weights is not None:
        weights = scoring.weights.to(torch.float32).contiguous().numpy()
    if (lists := scoring.lists) is None:
        listed = in_tiles(torch.zeros_like(limits), hidden[:0])
    else:
        listed = in_tiles(torch.arange(n_users + 1) * lists.items.shape[1], lists.items.reshape(-1))
        given = lists.values.reshape(-1, n_settings).to(torch.float32).contiguous().numpy()

    def scan(parts: Tensor, which: Tensor, first: int) -> None:
        place, mix, entries = (first, first // width), (weights, given), (*without, *listed)
        work = partial(kernels.scan, parts.numpy(), which.numpy(), place, mix, entries, heaps)
        spread(work, which.numel(), parts.numel() // 64)

    if scoring.known is not None:
        scan(scoring.known[None], torch.arange(n_users), 0)
    else:
        for parts, which, first in _tiles(scoring):
            scan(parts, which, first)
    return torch.from_numpy(values), torch.from_numpy(items), torch.from_numpy(heaps[3])


def _tiles(scoring: Scoring) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The scores [J, b, t] by each part, tile by tile, with their users' places [b] in the block and the first of their
    items. Of the tables only the rows of a tile are there at once."""
    for group, members in scoring.by_group():
        blocks = [(which, [part.users[which] for part in scoring.parts]) for which in members.split(USERS)]
        for first in range(0, scoring.n_items, ITEMS):
            tables = [part.table(group, slice(first, first + ITEMS)) for part in scoring.parts]
            for which, own in blocks:
                found = [inner_products(users, table) for users, table in zip(own, tables, strict=True)]
                yield torch.stack(found) if len(found) > 1 else found[0][None], which, first


def _choose(
    scoring: Scoring,
    cut: Tensor,
    found: list[tuple[Tensor, Tensor]],
    users: Tensor,
    order: RandomOrder,
    segments: Tensor,
    hidden: Tensor,
) -> None:
    """Rank users again, by all their scores, where ``cut`` [S, B] says that scores are equal at the end of a list: a
    heap keeps any of them. What is ``found`` is changed."""
    for which in cut.any(0).nonzero().squeeze(1).split(AT_ONCE):
        place = torch.full((scoring.n_users,), -1)
        place[which] = torch.arange(which.numel())
        here = place[segments] >= 0
        pairs = place[segments[here]], hidden[here]
        for scores, own, (best, items) in zip(scoring.each(which), cut[:, which], found, strict=True):
            if bool(own.any()):
                again = which[own]
                mask_seen(scores, *pairs)
                best[again], items[again] = rank_block(scores[own], best.shape[1], users[again], order)
