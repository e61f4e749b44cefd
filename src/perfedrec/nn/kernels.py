"""Kernels of propagation, which do what ``propagation.py`` says, and the arithmetic of vectors in other kernels.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import fast_helper, kernel


@fast_helper
def inner(one, other):  # type: ignore[no-untyped-def]
    """The inner product of two float32 vectors."""
    total = np.float32(0)
    for column in range(one.size):
        total += one[column] * other[column]
    return total


@fast_helper
def add_scaled(scale, values, out):  # type: ignore[no-untyped-def]
    """``out += scale * values``."""
    for column in range(out.size):
        out[column] += scale * values[column]


@kernel("void(float32[:, ::1], int64[::1], int64[::1], float32[::1], float32[:, ::1], int64, int64)")
def weighted_sums(table: Any, offsets: Any, items: Any, weights: Any, sums: Any, start: int, stop: int) -> None:
    """Add the rows of users' items, times their weights, to the ``sums`` of the users from ``start`` to ``stop``."""
    for user in range(start, stop):
        for row in range(offsets[user], offsets[user + 1]):
            add_scaled(weights[row], table[items[row]], sums[user])


@kernel("void(int64[::1], int64[::1], float32[::1], float32[::1])")
def edge_weights(offsets: Any, items: Any, degrees: Any, weights: Any) -> None:
    """Fill the ``weights`` of users' edges to their items."""
    for user in range(offsets.size - 1):
        count = np.float32(max(offsets[user + 1] - offsets[user], 1))
        for row in range(offsets[user], offsets[user + 1]):
            weights[row] = np.float32(1) / np.sqrt(count * max(degrees[items[row]], np.float32(1)))
