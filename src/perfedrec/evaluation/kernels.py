"""Kernels that find the best scores of each user while the scores are in the processor's cache.

A tile holds the scores of some users for some neighbouring items. One tile after the other is looked through, and each
user keeps the best scores so far. Nearly all scores are below the worst of these; they cost one comparison. For lists
of usual length it is faster to look for the worst again in all of them than to keep them in a heap.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import helper, kernel
from perfedrec.core.kernels import CHUNK, NOTHING, add_best


@kernel("void(int64[::1], int64[::1], int64, int64[:, ::1], int64[::1])", makes_arrays=True)
def sort_into_tiles(offsets: Any, items: Any, width: int, starts: Any, order: Any) -> None:
    """Where the entries of each tile are: ``order`` [E] has the entries of user b between ``starts[b, t]`` and
    ``starts[b, t + 1]`` for tile t, which holds ``width`` items.

    The entries of user b have the ``items`` [E] between ``offsets[b]`` and ``offsets[b + 1]``; those below 0 are left
    out.
    """
    n_users, n_tiles = starts.shape[0], starts.shape[1] - 1
    ends = np.empty(n_tiles, np.int64)
    for user in range(n_users):
        ends[:] = 0
        for entry in range(offsets[user], offsets[user + 1]):
            if items[entry] >= 0:
                ends[items[entry] // width] += 1
        total = offsets[user]
        for tile in range(n_tiles):
            starts[user, tile] = total
            total += ends[tile]
            ends[tile] = starts[user, tile]
        starts[user, n_tiles] = total
        for entry in range(offsets[user], offsets[user + 1]):
            if items[entry] >= 0:
                tile = items[entry] // width
                order[ends[tile]] = entry
                ends[tile] += 1


_ENTRIES = "int64[::1], int64[:, ::1], int64[::1]"


@kernel(
    "void(float32[:, :, ::1], int64[::1], UniTuple(int64, 2), Tuple((float32[:, :, ::1], float32[:, ::1])),"
    f" Tuple(({_ENTRIES}, {_ENTRIES})),"
    " Tuple((float32[:, :, ::1], int64[:, :, ::1], int64[:, ::1], float32[:, ::1])), int64, int64)",
    makes_arrays=True,
)
def scan(parts: Any, which: Any, place: Any, mix: Any, entries: Any, heaps: Any, begin: int, end: int) -> None:
    """Look through a tile of scores, and keep the best of each user from ``begin`` to ``end`` by each setting.

    ``parts`` [J, b, t] are the scores of the users ``which`` [b] for t items; they are changed. ``place`` has the first
    of these items and the number of the tile. ``mix`` has the weights [B, S, J] and the scores [E, S] of listed items:
    setting s takes ``sum_j weights[u, s, j] parts[j]`` (where there are no weights, the only part), plus the scores of
    listed items. ``entries`` are hidden items, which are left out, and listed items. Both are items, starts and order
    as :func:`sort_into_tiles` has them.

    ``heaps`` has the values [S, B, k] and items [S, B, k] of the heaps, how much of them is used [S, B], and the
    largest score that is not in a heap [S, B]: where it is equal to the smallest one in the heap, there is a choice
    between equal scores.
    """
    room = np.empty(parts.shape[2], np.float32), np.empty(CHUNK, np.int64)
    _scan(parts, which[begin:end], begin, place, mix, entries, heaps, room)


@helper
def _scan(parts, which, begin, place, mix, entries, heaps, room):  # type: ignore[no-untyped-def]
    (n_parts, _, width), (first, tile), (weights, given), (mixed, found) = parts.shape, place, mix, room
    hidden_items, hidden_starts, hidden_order, listed_items, listed_starts, listed_order = entries
    values, items, sizes, lost = heaps
    n_settings = values.shape[0]
    for row in range(begin, begin + which.size):
        user = which[row - begin]
        for setting in range(n_settings):
            scores = parts[0, row]
            if weights.size:
                scores, weight, own = mixed, weights[user, setting, 0], parts[0, row]
                for c in range(width):
                    mixed[c] = weight * own[c]
                for part in range(1, n_parts):
                    weight, own = weights[user, setting, part], parts[part, row]
                    for c in range(width):
                        mixed[c] += weight * own[c]
            for number in range(listed_starts[user, tile], listed_starts[user, tile + 1]):
                entry = listed_order[number]
                scores[listed_items[entry] - first] += given[entry, setting]
            for number in range(hidden_starts[user, tile], hidden_starts[user, tile + 1]):
                scores[hidden_items[hidden_order[number]] - first] = NOTHING
            best, places = values[setting, user], items[setting, user]
            sizes[setting, user], lost[setting, user] = add_best(
                scores, first, found, best, places, sizes[setting, user], lost[setting, user]
            )
