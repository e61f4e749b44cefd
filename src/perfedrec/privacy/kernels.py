"""Kernels of labels: which real items stay, and items with decoys among them. They do what ``labels.py`` says.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import helper, kernel
from perfedrec.core.kernels import fold_in, mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LEAST, _MOST = np.float32(2.0**-25), np.float32(1 - 2.0**-24)


@helper
def _uniform(key):  # type: ignore[no-untyped-def]
    """The first number of :func:`perfedrec.core.keys.uniform`."""
    half = np.int32(np.uint32(mix(key + _GOLDEN)))
    number = (np.float32(half >> np.int32(8)) + np.float32(0.5)) * np.float32(2.0**-23)
    return min(max((number + np.float32(1)) * np.float32(0.5), _LEAST), _MOST)


@kernel("int64(uint64[::1], int64[::1], int64[::1], float32, int64[::1], int64[::1])")
def keep(keys: Any, offsets: Any, items: Any, left_out: Any, positions: Any, kept: Any) -> int:
    """Fill the ``positions`` of the items that stay, and how many items each user has ``kept``; return how many stay.
    An item stays where its number is at least ``left_out``, or the largest of its user."""
    total = 0
    for user in range(kept.size):
        best, before = np.float32(-1), total
        for row in range(offsets[user], offsets[user + 1]):
            best = max(best, _uniform(fold_in(keys[user], np.uint64(items[row]))))
        for row in range(offsets[user], offsets[user + 1]):
            number = _uniform(fold_in(keys[user], np.uint64(items[row])))
            if number >= left_out or number == best:
                positions[total] = row
                total += 1
        kept[user] = total - before
    return total


@kernel("void(uint64[::1], int64[::1], float32, int64, int64[::1])")
def count_decoys(keys: Any, offsets: Any, share: Any, n_items: int, decoys: Any) -> None:
    """Fill the numbers of users' ``decoys``: a ``share`` of their items, rounded at random, as far as there are other
    items."""
    for user in range(keys.size):
        count = offsets[user + 1] - offsets[user]
        wanted = np.floor(np.float32(count) * share + _uniform(keys[user]))
        decoys[user] = min(np.int64(wanted), n_items - count)


@kernel(
    "void(int64[::1], UniTuple(int64[::1], 2), UniTuple(int64[::1], 2), UniTuple(int64[::1], 4),"
    " UniTuple(int64[::1], 2))"
)
def place(items: Any, real: Any, drawn: Any, labelled: Any, negatives: Any) -> None:
    """Put each user's real items and then its decoys in sequence, and the negatives apart.

    ``real`` are the positions of the real items among ``items``, and how many each user has. ``drawn`` are the items
    that were drawn for all users, decoys first, and how many these are of each user. ``labelled`` are offsets, items,
    positions (-1 for a decoy) and segments, ``negatives`` their items and owners; all but the offsets are filled.
    """
    (positions, kept), (outside, counts), (offsets, found, where, segments) = real, drawn, labelled
    own, other, negative = 0, 0, 0
    for user in range(kept.size):
        row = offsets[user]
        for _ in range(kept[user]):
            found[row], where[row], segments[row] = items[positions[own]], positions[own], user
            own += 1
            row += 1
        n_decoys = offsets[user + 1] - row
        for number in range(counts[user]):
            if number < n_decoys:
                found[row], where[row], segments[row] = outside[other], -1, user
                row += 1
            else:
                negatives[0][negative], negatives[1][negative] = outside[other], user
                negative += 1
            other += 1


@kernel("void(float32[:, ::1], int64[::1], boolean, float64[::1])", fast=True)
def add_norms(values: Any, segments: Any, l1: bool, totals: Any) -> None:
    """Add the rows' sums of absolute values (``l1``) or of squares to the ``totals`` of their users."""
    for row in range(segments.size):
        total = 0.0
        for column in range(values.shape[1]):
            value = np.float64(values[row, column])
            total += abs(value) if l1 else value * value
        totals[segments[row]] += total


@kernel("void(float32[:, ::1], int64[::1], float64[::1], float64, float32[:, ::1], int64, int64)")
def scale_to_grid(values: Any, segments: Any, factors: Any, grid: float, out: Any, start: int, stop: int) -> None:
    """``out`` are the ``values`` times the factors of their users, as multiples of ``1 / grid``, rounded towards
    zero."""
    for row in range(start, stop):
        factor = factors[segments[row]]
        for column in range(values.shape[1]):
            whole = np.trunc(np.float64(values[row, column]) * factor * grid)
            out[row, column] = np.float32(whole / grid)
