"""Kernels of random samples (:mod:`perfedrec.core.sampling`). Each does what the function that calls it says.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import helper, kernel
from perfedrec.core.kernels import FIRST
from perfedrec.core.words import GOLDEN

_GOLDEN, _SIXTEEN, _U33 = np.uint64(GOLDEN), np.uint64(16), np.uint64(33)
_IMAGES, _MARKS = 16, 16  # positions that are permuted at once, and words of 64 marks for a user's items


@kernel(
    "void(uint64[::1], int64[::1], UniTuple(int64[::1], 2), int64, UniTuple(int64, 3), UniTuple(int64[::1], 3),"
    " int64, int64)",
    makes_arrays=True,
)
def draw_outside(
    keys: Any, counts: Any, owned: Any, n_items: int, network: Any, result: Any, start: int, stop: int
) -> None:
    """For each user from ``start`` to ``stop`` draw the first ``counts`` items of its random permutation that it does
    not have. ``owned`` are the offsets of users' items and the items, ascending for each user; ``network`` the sides
    and the rounds of the permutation's network; ``result`` the offsets of what is drawn, and room for the items and for
    their users."""
    room = np.empty(_IMAGES, np.int64), np.empty(_IMAGES, np.int64), np.empty(_MARKS, np.uint64)
    _draw_outside(keys, counts, owned, n_items, network, result, (start, stop), room)


@helper
def _draw_outside(keys, counts, owned, n_items, network, result, which, room):  # type: ignore[no-untyped-def]
    (offsets, items), (limits, drawn, owners), (start, stop), (images, others, marks) = owned, result, which, room
    for user in range(start, stop):
        low, high, wanted = offsets[user], offsets[user + 1], counts[user]
        marks[:] = 0  # one bit for some items: an item without it need not be looked for
        for place in range(low, high):
            marks[(items[place] >> 6) % _MARKS] |= _bit(items[place])
        for place in range(limits[user], limits[user] + wanted):
            owners[place] = user
        found, position = 0, 0
        while found < wanted:
            _permute(keys[user], position, network, images, others)
            position += _IMAGES
            for place in range(_IMAGES):
                image = images[place]
                if image < n_items and found < wanted:
                    marked = marks[(image >> 6) % _MARKS] & _bit(image)
                    if not marked or not _has(items, low, high, image):
                        drawn[limits[user] + found] = image
                        found += 1


@helper
def _bit(item):  # type: ignore[no-untyped-def]
    return np.uint64(1) << np.uint64(item & 63)


@helper
def _has(items, low, end, item):  # type: ignore[no-untyped-def]
    """Whether the ascending ``items`` have an item between two places."""
    high = end
    while low < high:
        middle = (low + high) // 2
        if items[middle] < item:
            low = middle + 1
        else:
            high = middle
    return low < end and items[low] == item


@helper
def _permute(key, first, network, a, b):  # type: ignore[no-untyped-def]
    """Fill ``a`` with the images of the positions from the ``first`` one on; ``b`` is room. They are those of
    :func:`_permuted`, many at once: a division by a number that is known is a product."""
    left, right, rounds = network
    to_left, to_right = 1 / np.float64(left), 1 / np.float64(right)
    for place in range(a.size):
        position = np.int64(first + place)
        b[place] = _rest(position, right, to_right)
        a[place] = np.int64(np.float64(position - b[place]) * to_right + 0.5)
    for counter in range(1, rounds, 2):
        for place in range(a.size):
            a[place] = _rest(_drawn(b[place], counter, key) + a[place], left, to_left)
        for place in range(a.size):
            b[place] = _rest(_drawn(a[place], counter + 1, key) + b[place], right, to_right)
    for place in range(a.size):
        a[place] = a[place] * right + b[place]


@helper
def _drawn(side, counter, key):  # type: ignore[no-untyped-def]
    word = ((np.uint64(side) * _SIXTEEN + np.uint64(counter)) * _GOLDEN ^ key) * FIRST
    return np.int64(word >> _U33)


@helper
def _rest(number, divisor, inverse):  # type: ignore[no-untyped-def]
    """The rest of a division, whose quotient from the ``inverse`` may be wrong by 1."""
    rest = number - np.int64(np.float64(number) * inverse) * divisor
    rest += divisor if rest < 0 else 0
    return rest - (divisor if rest >= divisor else 0)


@helper
def _permuted(key, position, left, right, rounds):  # type: ignore[no-untyped-def]
    """The image of a position; see :func:`perfedrec.core.keys.shuffle`. The sides of any size fit into 32 bits, which
    are divided faster."""
    left, right = np.uint32(left), np.uint32(right)
    a, b = np.uint32(position // right), np.uint32(position % right)
    for counter in range(1, rounds, 2):  # the number of rounds is even
        a = np.uint32((np.uint32(_drawn(b, counter, key)) + a) % left)
        b = np.uint32((np.uint32(_drawn(a, counter + 1, key)) + b) % right)
    return np.int64(a) * np.int64(right) + np.int64(b)


@kernel("void(uint64, int64, UniTuple(int64, 3), int64[::1])")
def choose(key: Any, size: int, network: Any, chosen: Any) -> None:
    """Fill ``chosen`` with the first numbers below ``size`` of a random permutation, whose ``network`` is as above."""
    left, right, rounds = network
    found, position = 0, 0
    while found < chosen.size:
        image = _permuted(key, position, left, right, rounds)
        position += 1
        if image < size:
            chosen[found] = image
            found += 1
