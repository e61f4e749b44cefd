"""Kernels of propagation, which do what ``propagation.py`` says, and the arithmetic of vectors in other kernels.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.compiled import fast_helper, helper, kernel
from perfedrec.core.kernels import AHEAD, exp, prefetch

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_MOST = np.float32(87)  # whose exponential is still a number
_BLOCK = 128  # users whose rows fit into the processor's first caches


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
            prefetch(table, items[min(row + AHEAD, offsets[stop] - 1)])
            add_scaled(weights[row], table[items[row]], sums[user])


@kernel("void(int64[::1], int64[::1], float32[::1], float32[::1])")
def edge_weights(offsets: Any, items: Any, degrees: Any, weights: Any) -> None:
    """Fill the ``weights`` of users' edges to their items."""
    for user in range(offsets.size - 1):
        count = np.float32(max(offsets[user + 1] - offsets[user], 1))
        for row in range(offsets[user], offsets[user + 1]):
            weights[row] = np.float32(1) / np.sqrt(count * max(degrees[items[row]], np.float32(1)))


_TABLES, _ORDERS = "float32[:, :, ::1]", "int64[:, ::1], int64[:, ::1]"


@fast_helper
def _gate(vector, gate, out):  # type: ignore[no-untyped-def]
    for column in range(out.size):
        out[column] = vector[column] * gate[column]


@kernel(f"void(float32[:, ::1], {_TABLES}, {_TABLES}, int64, int64)")
def gate(vectors: Any, gates: Any, out: Any, start: int, stop: int) -> None:
    """Fill ``out`` [g, n, d] with the products of the ``gates`` [n, g, d] and ``vectors`` [n, d], of the rows from
    ``start`` to ``stop``."""
    for row in range(start, stop):
        for c in range(gates.shape[1]):
            _gate(vectors[row], gates[row, c], out[c, row])


@fast_helper
def _gate_back(grad, gate, vector, slopes, of_vector):  # type: ignore[no-untyped-def]
    for column in range(grad.size):
        part = grad[column] * gate[column]
        of_vector[column] += part
        slopes[column] = part * vector[column] * (_ONE - gate[column])


@kernel(f"void({_TABLES}, float32[:, ::1], {_TABLES}, {_TABLES}, float32[:, ::1], int64, int64)")
def gate_back(grad: Any, vectors: Any, gates: Any, slopes: Any, of_vectors: Any, start: int, stop: int) -> None:
    """Fill the ``slopes`` [n, g, d] of what the ``gates`` are sigmoids of, and the gradient of the ``vectors`` by their
    products with gates, of the rows from ``start`` to ``stop``."""
    for row in range(start, stop):
        of_vectors[row] = 0
        for c in range(gates.shape[1]):
            _gate_back(grad[c, row], gates[row, c], vectors[row], slopes[row, c], of_vectors[row])


@fast_helper
def _three_inner(one, other, third, vector):  # type: ignore[no-untyped-def]
    """The inner products of three vectors with another."""
    first, second, last = _ZERO, _ZERO, _ZERO
    for column in range(vector.size):
        value = vector[column]
        first += one[column] * value
        second += other[column] * value
        last += third[column] * value
    return first, second, last


@fast_helper
def _mix(one, other, third, shares, simple, mixed):  # type: ignore[no-untyped-def]
    first, second, last = shares
    for column in range(mixed.size):
        own = first * one[column] + second * other[column] + last * third[column]
        mixed[column] = own + _HALF * simple[column]


@kernel("void(float32[:, :, ::1], float32[::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], int64, int64)")
def attend(channels: Any, vector: Any, simple: Any, shares: Any, mixed: Any, start: int, stop: int) -> None:
    """Fill ``shares`` [3, n] and what is ``mixed`` by them, of the users from ``start`` to ``stop``."""
    one, other, third = channels[0], channels[1], channels[2]
    for user in range(start, stop):
        a, b, c = _three_inner(one[user], other[user], third[user], vector)
        top = max(a, b, c)
        a, b, c = exp(a - top), exp(b - top), exp(c - top)
        part = _ONE / (a + b + c)
        a, b, c = part * a, part * b, part * c
        shares[0, user], shares[1, user], shares[2, user] = a, b, c
        _mix(one[user], other[user], third[user], (a, b, c), simple[user], mixed[user])


@fast_helper
def _mix_back(share, slope, vector, channel, grad, of_vector, of_channel):  # type: ignore[no-untyped-def]
    for column in range(grad.size):
        of_vector[column] += slope * channel[column]
        of_channel[column] += share * grad[column] + slope * vector[column]


@kernel(
    f"float32[::1]({_TABLES}, float32[::1], float32[:, ::1], float32[:, ::1], {_TABLES}, int64, int64)",
    makes_arrays=True,
)
def attend_back(channels: Any, vector: Any, shares: Any, grad: Any, of_channels: Any, start: int, stop: int) -> Any:
    """Add the gradient of the ``channels`` to ``of_channels``, of the users from ``start`` to ``stop``, and return that
    of the ``vector``."""
    of_vector = np.zeros_like(vector)
    _attend_back(channels, vector, shares, grad, (of_vector, of_channels), start, stop)
    return of_vector


@helper
def _attend_back(channels, vector, shares, grad, out, start, stop):  # type: ignore[no-untyped-def]
    of_vector, of_channels = out
    for user in range(start, stop):
        row = grad[user]
        a, b, c = _three_inner(channels[0, user], channels[1, user], channels[2, user], row)
        mean = shares[0, user] * a + shares[1, user] * b + shares[2, user] * c
        for number, slope in enumerate((a, b, c)):
            share = shares[number, user]
            _mix_back(
                share, share * (slope - mean), vector, channels[number, user], row, of_vector, of_channels[number, user]
            )


@fast_helper
def _change(other, columns, own, vector, centre, change):  # type: ignore[no-untyped-def]
    """Fill the ``change`` of a row; return its inner products with two vectors."""
    local, whole = _ZERO, _ZERO
    for column in range(change.size):
        value = other[columns[column]] - own[column]
        change[column] = value
        local += vector[column] * value
        whole += centre[column] * value
    return local, whole


@fast_helper
def _change_back(shares, vector, centre, change, of_vector, of_change, of_centre):  # type: ignore[no-untyped-def]
    local, whole = shares[0], shares[1]
    for column in range(change.size):
        of_change[column] = local * vector[column] + whole * centre[column]
        of_centre[column] += whole * change[column]
        of_vector[column] = local * change[column]


@fast_helper
def _put_back(moved, places, own, of_centre, of_near):  # type: ignore[no-untyped-def]
    for column in range(of_near.size):
        of_near[column] = moved[places[column]] - own[column] + of_centre[column]


@fast_helper
def _shares(scores, part, shares):  # type: ignore[no-untyped-def]
    """Fill the ``shares`` with the sigmoids of the ``scores``, times a number."""
    for place in range(scores.size):
        shares[place] = part / (_ONE + exp(min(-scores[place], _MOST)))


@kernel(
    f"void({_TABLES}, {_TABLES}, float32[:, ::1], {_ORDERS}, float32, {_TABLES}, UniTuple({_TABLES}, 2))",
    makes_arrays=True,
)
def agree(vectors: Any, near: Any, centres: Any, rows: Any, columns: Any, share: Any, scores: Any, grads: Any) -> None:
    """Fill the ``scores`` [2, c, n], which are the inner products of ``vectors`` and of ``centres`` with the change
    from ``near`` to itself in another order of ``rows`` and ``columns``; and ``grads``, those of the ``vectors`` and
    of ``near`` by a ``share`` of the sum of the softplus of these."""
    n, d = vectors.shape[1:]
    change, of_change = np.empty((_BLOCK, d), np.float32), np.empty((n, d), np.float32)
    shares, places = np.empty((2, _BLOCK), np.float32), np.empty_like(columns[0])
    _agree(
        (vectors, near, centres, rows, columns),
        share,
        scores,
        grads,
        (change, of_change, shares, centres[0].copy()),
        places,
    )


@helper
def _agree(given, share, scores, grads, room, places):  # type: ignore[no-untyped-def]
    (vectors, near, centres, rows, columns), (of_vectors, of_near) = given, grads
    (change, of_change, shares, of_centre), (n, d) = room, vectors.shape[1:]
    for c in range(vectors.shape[0]):
        of_centre[:] = 0
        for column in range(d):
            places[columns[c, column]] = column
        for first in range(0, n, _BLOCK):
            stop = min(first + _BLOCK, n)
            for user in range(first, stop):
                other, own = near[c, rows[c, user]], near[c, user]
                found = _change(other, columns[c], own, vectors[c, user], centres[c], change[user - first])
                scores[0, c, user], scores[1, c, user] = found
            for kind in range(2):
                _shares(scores[kind, c, first:stop], share, shares[kind, : stop - first])
            for user in range(first, stop):
                both, row, out = shares[:, user - first], change[user - first], of_vectors[c, user]
                _change_back(both, vectors[c, user], centres[c], row, out, of_change[user], of_centre)
        for column in range(d):
            of_centre[column] /= np.float32(n)
        for user in range(n):
            row = rows[c, user]
            _put_back(of_change[user], places, of_change[row], of_centre, of_near[c, row])
