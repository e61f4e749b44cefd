"""Kernels of the rules that compare what clients sent (:mod:`perfedrec.core.robust`), contributor by contributor of a
row. Each does what the function that calls it says.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import helper, kernel
from perfedrec.core.kernels import copy

_WIDTH = 16  # columns that are sorted at once: those of a few hundred contributors stay in the nearest cache


@helper
def _by_key(places, free, order):  # type: ignore[no-untyped-def]
    """Fill the ``order`` of the rows by their ``places`` among the keys, whose first places in it are ``free``."""
    for row in range(places.size):
        order[free[places[row]]] = row
        free[places[row]] += 1


@kernel("void(float64[:, ::1], int64[::1], int64[::1], int64[::1], float64[:, ::1])", makes_arrays=True)
def add_inner(rows: Any, places: Any, starts: Any, trimmed: Any, sums: Any) -> None:
    """Add to the ``sums`` of each key and column the numbers of its ``rows`` without the ``trimmed`` smallest and
    largest ones. ``places`` are those of the rows among the keys, ``starts`` the keys' first rows once these are in the
    order of places, and their number."""
    order, longest = np.empty(places.size, np.int64), 0
    _by_key(places, starts.copy(), order)
    for key in range(trimmed.size):
        longest = max(longest, starts[key + 1] - starts[key])
    _add_inner(rows, order, starts, trimmed, np.empty((longest, _WIDTH)), sums)


@helper
def _add_inner(rows, order, starts, trimmed, values, sums):  # type: ignore[no-untyped-def]
    for key in range(trimmed.size):
        low, count = starts[key], starts[key + 1] - starts[key]
        for column in range(0, sums.shape[1], _WIDTH):
            width = min(_WIDTH, sums.shape[1] - column)
            for place in range(count):
                copy(rows[order[low + place], column : column + width], values[place, :width])
            if trimmed[key]:
                _sort(values[:, :width], count)
            for place in range(trimmed[key], count - trimmed[key]):
                _add(values[place, :width], sums[key, column : column + width])


@helper
def _add(values, to):  # type: ignore[no-untyped-def]
    for column in range(to.size):
        to[column] += values[column]


@helper
def _sort(values, count):  # type: ignore[no-untyped-def]
    """Sort the first ``count`` numbers of each column, by merge exchange (Batcher; Knuth, The Art of Computer
    Programming, volume 3, 5.2.2, algorithm M): what is compared does not depend on the numbers, so all columns are
    compared at once."""
    top = 1
    while top < count:
        top *= 2
    p = top // 2
    while p > 0:
        q, r, d = top // 2, 0, p
        while d > 0:
            for place in range(count - d):
                if place & p == r:
                    _exchange(values[place], values[place + d])
            d, q, r = q - p, q // 2, p
        p //= 2


@helper
def _exchange(one, other):  # type: ignore[no-untyped-def]
    for column in range(one.size):
        a, b = one[column], other[column]
        one[column] = b if b < a else a
        other[column] = a if b < a else b


@kernel("void(float64[:, ::1], int64[::1], int64[::1], int64[::1], float64[:, ::1])", makes_arrays=True)
def add_products(rows: Any, owners: Any, places: Any, starts: Any, products: Any) -> None:
    """Add to the ``products`` of the parts with each other those of their ``rows``. A part of the ``owners`` has at
    most one row of a key; ``places`` and ``starts`` are as above. Products are added in the order of keys and columns,
    whatever the order of the parts."""
    order, longest = np.empty(places.size, np.int64), 0
    _by_key(places, starts.copy(), order)
    for key in range(starts.size - 1):
        longest = max(longest, starts[key + 1] - starts[key])
    _add_products(rows, owners, order, starts, np.empty((rows.shape[1], longest)), np.empty(longest), products)


@helper
def _add_products(rows, owners, order, starts, columns, sums, products):  # type: ignore[no-untyped-def]
    for key in range(starts.size - 1):
        mine = order[starts[key] : starts[key + 1]]
        for place in range(mine.size):
            for column in range(rows.shape[1]):
                columns[column, place] = rows[mine[place], column]
        for place in range(mine.size):
            own = products[owners[mine[place]]]
            for other in range(mine.size):
                sums[other] = own[owners[mine[other]]]
            for column in range(rows.shape[1]):
                _add_times(columns[column, : mine.size], columns[column, place], sums[: mine.size])
            for other in range(mine.size):
                own[owners[mine[other]]] = sums[other]


@helper
def _add_times(values, factor, to):  # type: ignore[no-untyped-def]
    for place in range(to.size):
        to[place] += values[place] * factor
