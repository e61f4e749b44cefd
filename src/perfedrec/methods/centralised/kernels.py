"""Kernels of centralised training: steps on the vectors of the batches or triples that an epoch will see.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perfedrec.core.compiled import fast_helper, fast_part, helper, kernel, part
from perfedrec.core.kernels import CHUNK, NOTHING, add_best, exp, largest, load

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_AHEAD = 6  # rows; nearer ones arrive too late, and farther ones are pushed out of the cache again
_LINE = 16  # numbers that the processor loads at once


# Parts of bpr_epoch, which shall round in the same way in every process.


@part
def _load_row(flat, start, width):  # type: ignore[no-untyped-def]
    for place in range(start, start + width, _LINE):
        load(flat, place)


@kernel(
    "void(UniTuple(int64[::1], 4), int64, int64, int32[:, ::1], UniTuple(int32[::1], 3), int64[::1], int32[::1])",
    makes_arrays=True,
)
def find_visits(triples: Any, n_users: int, size: int, places: Any, visits: Any, limits: Any, upcoming: Any) -> None:
    """List the visits of an epoch: each row of the table that a batch needs is visited once in this batch.

    ``triples`` are users [P], positives [P] and negatives [P], and the order [P] in which they come, ``size`` in a
    batch. Users are the first ``n_users`` rows of the table, items the others. Visit v is one of batch b for v from
    ``limits[b]`` to ``limits[b + 1]``. Its row, how often this row occurs in the batch, and the batch of the row's next
    visit go into ``visits``; ``upcoming`` [N] becomes the batch of each row's first visit. The number of batches stands
    where there is no visit. ``places`` [P, 3] become the visits of each triple, counted from its batch's first one: the
    complement ``~place`` where a visit occurs for the first time.
    """
    (users, positives, negatives, order), (rows, counts, following) = triples, visits
    n_batches = limits.size - 1
    latest = np.full(upcoming.size, -1, np.int32)
    visit = 0
    for batch in range(n_batches):
        first = visit
        limits[batch] = first
        for place in range(batch * size, min(order.size, (batch + 1) * size)):
            triple = order[place]
            for side in range(3):
                if side == 0:
                    row = users[triple]
                elif side == 1:
                    row = n_users + positives[triple]
                else:
                    row = n_users + negatives[triple]
                known = latest[row]
                if known < first:
                    latest[row] = visit
                    rows[visit], counts[visit] = row, 1
                    places[place, side] = ~np.int32(visit - first)
                    visit += 1
                else:
                    counts[known] += 1
                    places[place, side] = known - first
    limits[n_batches] = visit
    upcoming[:] = n_batches
    for batch in range(n_batches - 1, -1, -1):
        for visit in range(limits[batch], limits[batch + 1]):
            following[visit] = upcoming[rows[visit]]
            upcoming[rows[visit]] = batch


@part
def _between(batch, until, paths, epsilons, ratios1, ratios2):  # type: ignore[no-untyped-def]
    """The sum of the weights of the steps from a batch to before another, and the mean of epsilon over them."""
    length = paths[batch] - ratios1[until - batch] * paths[until]
    return length, (epsilons[batch] - ratios2[until - batch] * epsilons[until]) / length


@part
def _idle(vector, moment, square, factor, least):  # type: ignore[no-untyped-def]
    """Steps of a row without gradients, all at once."""
    for at in range(vector.size):
        vector[at] += factor * moment[at] / (np.sqrt(square[at]) + least)


@part
def _scale(values, factor):  # type: ignore[no-untyped-def]
    for at in range(values.size):
        values[at] *= factor


@fast_part
def _margin(user, item, other):  # type: ignore[no-untyped-def]
    """How much higher the user's score of the other item is."""
    total = _ZERO
    for at in range(user.size):
        total += user[at] * (other[at] - item[at])
    return total


@fast_part
def _add(old, scale, values, gradient):  # type: ignore[no-untyped-def]
    """``gradient = old * gradient + scale * values``; nothing is read from a gradient without an ``old`` part."""
    if old:
        for at in range(gradient.size):
            gradient[at] += scale * values[at]
    else:
        for at in range(gradient.size):
            gradient[at] = scale * values[at]


@fast_part
def _add_difference(old, scale, plus, minus, gradient):  # type: ignore[no-untyped-def]
    """:func:`_add` of the vector ``plus`` less the vector ``minus``."""
    if old:
        for at in range(gradient.size):
            gradient[at] += scale * (plus[at] - minus[at])
    else:
        for at in range(gradient.size):
            gradient[at] = scale * (plus[at] - minus[at])


@part
def _pair(table, rows, first, triple, gradients):  # type: ignore[no-untyped-def]
    """The loss of one triple of visits, counted from the batch's ``first`` one; adds its gradients. A complement
    ``~place`` is a visit's first contribution, which replaces what was there."""
    places = max(triple[0], ~triple[0]), max(triple[1], ~triple[1]), max(triple[2], ~triple[2])
    user, item, other = (
        table[rows[first + places[0]], 0],
        table[rows[first + places[1]], 0],
        table[rows[first + places[2]], 0],
    )
    x = _margin(user, item, other)
    decayed = np.float32(math.exp(-abs(x)))
    slope = (_ONE if x >= _ZERO else decayed) / (_ONE + decayed)
    _add_difference(triple[0] >= 0, slope, other, item, gradients[places[0]])
    _add(triple[1] >= 0, -slope, user, gradients[places[1]])
    _add(triple[2] >= 0, slope, user, gradients[places[2]])
    return np.float64(max(x, _ZERO) + np.float32(math.log1p(decayed)))


@fast_part
def _visit(vector, moment, square, gradient, weights, steps):  # type: ignore[no-untyped-def]
    """The steps of a row from a visit to before the next one, in place; returns the vector's squared norm before. The
    ``weights`` are those of the gradient and of the vector in it."""
    (weight, l2), (decay1, decay2, rest1, rest2, factor, least), squares = weights, steps, _ZERO
    for at in range(vector.size):
        value = vector[at]
        squares += value * value
        slope = (gradient[at] + l2 * value) * weight
        moment[at] = decay1 * moment[at] + rest1 * slope
        square[at] = decay2 * square[at] + rest2 * (slope * slope)
        vector[at] = value + factor * moment[at] / (np.sqrt(square[at]) + least)
    return squares


@kernel(
    "float64(float32[:, :, ::1], int32[:, ::1], UniTuple(int32[::1], 3), int64[::1], int32[::1], int64,"
    " UniTuple(float64, 4), UniTuple(float64[::1], 2))",
    fast=True,
    makes_arrays=True,
)
def bpr_epoch(
    table: Any, places: Any, visits: Any, limits: Any, upcoming: Any, size: int, options: Any, later_steps: Any
) -> float:
    """Train a ``table`` [N, 3, d] of vectors and their two moments of Adam on all batches of an epoch, in place; return
    the sum of the loss over its triples. The arguments up to ``size`` are those of :func:`find_visits`; ``options`` are
    the weight of the L2 term, the learning rate and Adam's two betas.

    Adam moves every row in every step, also where its gradient is 0. Here a row is touched in its visits alone: each
    visit makes the step of its own batch and those of the batches until the next visit, in which the moments shrink by
    ``beta1`` and ``beta2`` a step. ``later_steps`` [number of batches + 1] sum the weights of all steps from a
    batch on, and these weights times Adam's epsilon; see :func:`perfedrec.methods.centralised.mf.later_steps`. The
    difference between two such sums is what lies between two visits. So the steps are those of Adam, but for epsilon,
    for which its mean over these steps is taken.
    """
    n_batches = limits.size - 1
    powers = options[2] ** np.arange(n_batches + 2), options[3] ** np.arange(n_batches + 2)
    ratios = powers[0] / np.sqrt(powers[1]), powers[0] / powers[1]
    room = np.empty((3 * size, table.shape[2]), np.float32), np.full(table.shape[0], -1, np.int32)
    return float(
        _bpr_epoch(table, (places, limits, upcoming, size), visits, options, later_steps, powers, ratios, room)
    )


@fast_part
def _bpr_epoch(table, batches, visits, options, later_steps, powers, ratios, room):  # type: ignore[no-untyped-def]
    (places, limits, upcoming, size), (gradients, last) = batches, room
    (rows, counts, following), (paths, epsilons), (powers1, powers2) = visits, later_steps, powers
    l2, (learning_rate, beta1, beta2), (ratios1, ratios2) = np.float32(options[0]), options[1:], ratios
    width, n_batches, flat = table.shape[2], limits.size - 1, table.reshape(-1)
    for row in range(table.shape[0]):
        if upcoming[row]:  # the steps before the first visit
            length, small = _between(0, upcoming[row], paths, epsilons, ratios1, ratios2)
            factor, least = -learning_rate * length * beta1 / math.sqrt(beta2), small / math.sqrt(beta2)
            _idle(table[row, 0], table[row, 1], table[row, 2], np.float32(factor), np.float32(least))
    total = 0.0
    for batch in range(n_batches):
        first, begin, end = limits[batch], batch * size, min(places.shape[0], (batch + 1) * size)
        for place in range(begin, end):
            for side in range(3):
                later = places[min(place + _AHEAD, end - 1), side]
                _load_row(flat, np.int64(rows[first + max(later, ~later)]) * 3 * width, width)
            total += _pair(table, rows, first, places[place], gradients)
        weight = np.float32(1 / (end - begin))
        rest1, rest2 = np.float32(1 - beta1), np.float32(1 - beta2)
        for visit in range(first, limits[batch + 1]):
            later = rows[min(visit + _AHEAD, limits[batch + 1] - 1)]
            _load_row(flat, np.int64(later) * 3 * width, 3 * width)
            row, count = rows[visit], np.float32(counts[visit])
            decay1, decay2 = np.float32(powers1[batch - last[row]]), np.float32(powers2[batch - last[row]])
            last[row] = batch
            length, mean = _between(batch, following[visit], paths, epsilons, ratios1, ratios2)
            steps = decay1, decay2, rest1, rest2, np.float32(-learning_rate * length), np.float32(mean)
            weights = weight, l2 * count
            squares = _visit(table[row, 0], table[row, 1], table[row, 2], gradients[visit - first], weights, steps)
            total += np.float64(_HALF * l2 * count * squares)
    for row in range(table.shape[0]):  # the steps after the last visit
        idle = n_batches - 1 - last[row]
        _scale(table[row, 1], np.float32(powers1[idle]))
        _scale(table[row, 2], np.float32(powers2[idle]))
    return total


@fast_helper
def _step_triple(user, item, other, rate, kept, slope):  # type: ignore[no-untyped-def]
    """A plain step on the three rows of a triple, in place; ``kept`` of a row is left by the L2 term. Each number is
    read and written once."""
    for at in range(user.size):
        one, two, three = user[at], item[at], other[at]
        user[at] = kept * one + rate * slope * (two - three)
        item[at] = kept * two + rate * slope * one
        other[at] = kept * three - rate * slope * one


@fast_helper
def _compare(user, item, other):  # type: ignore[no-untyped-def]
    """:func:`_margin`, and the squared norm of all three."""
    total, squares = _ZERO, _ZERO
    for at in range(user.size):
        one, two, three = user[at], item[at], other[at]
        total += one * (three - two)
        squares += one * one + two * two + three * three
    return total, squares


@kernel("float64(float32[:, ::1], float32[:, ::1], UniTuple(int64[::1], 4), float32, float32)", fast=True)
def bpr_triples(users: Any, items: Any, triples: Any, rate: Any, l2: Any) -> float:
    """Train the vectors of ``users`` [n, d] and ``items`` [m, d] on all triples of an epoch, one after the other, in
    place; return the sum of the loss. ``triples`` are users [P], positives [P] and negatives [P], and the order [P] in
    which they come; ``rate`` is the learning rate, and ``l2`` the weight of the L2 term."""
    (owners, positives, negatives, order), width = triples, users.shape[1]
    flat_users, flat_items, kept = users.reshape(-1), items.reshape(-1), _ONE - rate * l2
    total = 0.0
    for place in range(order.size):
        later = order[min(place + _AHEAD, order.size - 1)]
        _load_row(flat_users, owners[later] * width, width)
        _load_row(flat_items, positives[later] * width, width)
        _load_row(flat_items, negatives[later] * width, width)
        triple = order[place]
        user, item, other = users[owners[triple]], items[positives[triple]], items[negatives[triple]]
        x, squares = _compare(user, item, other)
        decayed = np.float32(math.exp(-abs(x)))
        slope = (_ONE if x >= _ZERO else decayed) / (_ONE + decayed)
        total += np.float64(max(x, _ZERO) + np.float32(math.log1p(decayed)) + _HALF * l2 * squares)
        _step_triple(user, item, other, rate, kept, slope)
    return total


@fast_helper
def _powers(values, scale, largest, powers):  # type: ignore[no-untyped-def]
    """Fill ``powers`` with the exponentials of ``scale`` times the ``values`` less the ``largest``; return the sum."""
    total = _ZERO
    for at in range(powers.size):
        power = exp(scale * (values[at] - largest))
        powers[at] = power
        total += power
    return total


@helper
def _mix(share, values, other_share, others, mixed):  # type: ignore[no-untyped-def]
    for at in range(mixed.size):
        mixed[at] = share * values[at] + other_share * others[at]


@helper
def _contrast(cosines, scale, positives, powers, known):  # type: ignore[no-untyped-def]
    """The contrast of a user in a view, whose gradient takes the place of the ``cosines``. ``powers`` and ``known`` are
    room for numbers of all users and of the ``positives``."""
    for number in range(known.size):
        known[number] = cosines[positives[number]]
    top, nearest = largest(cosines), largest(known)
    total, share = _powers(cosines, scale, top, powers), _ZERO
    for number in range(known.size):
        known[number] = np.float32(math.exp(scale * (known[number] - nearest)))
        share += known[number]
    for at in range(cosines.size):
        cosines[at] = scale / total * powers[at]
    for number in range(known.size):
        cosines[positives[number]] -= scale / share * known[number]
    return np.float64(scale * (top - nearest)) + math.log(total) - math.log(share)


@kernel("float64(float32[:, :, ::1], int64, int64, float32, int64, int64)", makes_arrays=True)
def tri_training(cosines: Any, n_users: int, n_positives: int, scale: Any, start: int, stop: int) -> float:
    """The sum of the contrasts of users from ``start`` to ``stop`` in three views, as
    :class:`perfedrec.methods.centralised.sept.SEPT` says; ``scale`` is 1 / t. Of the ``cosines`` [3, c, N], those with
    the first ``n_users`` count, and gradients take their place."""
    powers, shares, mixed = np.empty((3, n_users), np.float32), np.empty(3, np.float32), np.empty(n_users, np.float32)
    best, positives, found = (
        np.empty(n_positives, np.float32),
        np.empty(n_positives, np.int64),
        np.empty(CHUNK, np.int64),
    )
    room, lists = (powers, shares, mixed), (best, positives, found)
    return float(_tri_training(cosines, n_users, scale, room, lists, start, stop))


@helper
def _tri_training(cosines, n_users, scale, room, lists, start, stop):  # type: ignore[no-untyped-def]
    (powers, shares, mixed), (best, positives, found), total = room, lists, 0.0
    for user in range(start, stop):
        for view in range(3):
            shares[view] = _ONE / _powers(cosines[view, user], _ONE, _ZERO, powers[view])
        for view in range(3):
            _mix(shares[view - 1], powers[view - 1], shares[view - 2], powers[view - 2], mixed)  # the other two
            add_best(mixed, 0, found, best, positives, 0, NOTHING)
            total += _contrast(cosines[view, user, :n_users], scale, positives, mixed, best)
    return total
