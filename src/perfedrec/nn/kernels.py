"""Kernels of propagation. They do what ``propagation.py`` says.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

from perfedrec.core.compiled import kernel


@kernel("void(float32[:, ::1], int64[::1], int64[::1], float32[::1], float32[:, ::1], int64, int64)")
def weighted_sums(table: Any, offsets: Any, items: Any, weights: Any, sums: Any, start: int, stop: int) -> None:
    """Add the rows of users' items, times their weights, to the ``sums`` of the users from ``start`` to ``stop``."""
    for user in range(start, stop):
        for row in range(offsets[user], offsets[user + 1]):
            item, weight = items[row], weights[row]
            for column in range(table.shape[1]):
                sums[user, column] += weight * table[item, column]
