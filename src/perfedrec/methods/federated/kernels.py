"""Kernels of federated training: the server's step on its tables, and the local steps of clients.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.compiled import helper, kernel

_ONE = np.float32(1)
_BATCH, _LINE = 16, 16  # rows; numbers in a cache line
_UNIT = np.float64(1 / FIXED_POINT)


@kernel("void(float32[:, ::1], float32[:, ::1], int64[::1], int64[::1], float32[:, ::1], int64, int64)")
def gather(table: Any, offsets: Any, items: Any, groups: Any, out: Any, start: int, stop: int) -> None:
    """``out`` are the rows of ``items`` in a table plus their rows in the offsets of the ``groups``."""
    n_items, width = table.shape
    for row in range(start, stop):
        item = items[row]
        other = groups[row] * n_items + item
        for column in range(width):
            out[row, column] = table[item, column] + offsets[other, column]


@kernel("void(int16[:, ::1], boolean[::1])")
def filled(rows: Any, out: Any) -> None:
    """``out`` says which rows have an entry that is not 0."""
    for row in range(out.size):
        out[row] = False
        for column in range(rows.shape[1]):
            if rows[row, column]:
                out[row] = True
                break


RULES = {"fedavg": 0, "fedadam": 1, "fedadagrad": 2, "fedyogi": 3}
"""The numbers of the server's optimisers."""


@kernel(
    "void(int64, UniTuple(float32[:, ::1], 4), UniTuple(int64[::1], 4), float64[:, ::1], float32[::1],"
    " Tuple((UniTuple(float32, 4), float64, int64)), int64, int64)"
)
def step_rows(
    rule: int, tables: Any, places: Any, sums: Any, divisors: Any, options: Any, start: int, stop: int
) -> None:
    """One step of the server's optimiser ``rule`` on some rows of a table, in place.

    ``tables`` are the table, its first and second moments (without rows for FedAvg), and its running averages (without
    rows where there are none). ``places`` are the ``rows`` to change, ``limits`` and ``members`` that say which sums
    belong to each of them, and the rounds after which the averages were taken. The change of ``rows[r]``, for r from
    ``start`` to ``stop``, is the sum of ``sums`` over ``members[limits[r]:limits[r + 1]]``, from fixed point, divided
    by ``divisors[r]``. ``options`` are learning rate, betas and epsilon, the averages' decay, and the number of rounds
    that were played before.
    """
    (table, first, second, averages), (rows, limits, members, since) = tables, places
    (rate, beta1, beta2, epsilon), decay, played = options
    width = table.shape[1]
    change = np.empty(width, np.float32)
    total = np.empty(width, np.float64)
    rest1, averaged = _ONE - beta1, averages.shape[0] > 0
    for place in range(start, stop):
        if (place - start) % _BATCH == 0:
            change[0] = _touch_rows(tables, rows, place, min(place + _BATCH, stop))  # used, so that it is not left out
        row, divisor, begin = rows[place], divisors[place], limits[place]
        member = members[begin]
        for column in range(width):
            total[column] = sums[member, column]
        for other in range(begin + 1, limits[place + 1]):
            member = members[other]
            for column in range(width):
                total[column] += sums[member, column]
        for column in range(width):
            change[column] = np.float32(total[column] * _UNIT) / divisor
        if averaged:
            _average(table, averages, row, np.float32(decay ** np.float64(played - since[row])))
            since[row] = played + 1
        if rule == 0:
            for column in range(width):
                table[row, column] += change[column] * rate
        else:
            for column in range(width):
                first[row, column] += rest1 * (change[column] - first[row, column])
            _second_moment(rule, second, row, change, beta2)
            for column in range(width):
                table[row, column] += first[row, column] / (np.sqrt(second[row, column]) + epsilon) * rate
        if averaged:
            _average(table, averages, row, np.float32(decay))


@helper
def _touch_rows(tables, rows, start, stop):  # type: ignore[no-untyped-def]
    """Read a number of each cache line of some rows of all tables. All lines are then fetched at once, and not one
    after the other when they are needed."""
    total = np.float32(0)
    for place in range(start, stop):
        row = rows[place]
        for column in range(0, tables[0].shape[1], _LINE):
            total += tables[0][row, column]
            if tables[1].shape[0]:
                total += tables[1][row, column] + tables[2][row, column]
            if tables[3].shape[0]:
                total += tables[3][row, column]
    return total


@helper
def _average(table, averages, row, kept):  # type: ignore[no-untyped-def]
    """Bring the average of a row to a time until which the row did not change."""
    for column in range(table.shape[1]):
        value = table[row, column]
        averages[row, column] = value + kept * (averages[row, column] - value)


@helper
def _second_moment(rule, second, row, change, beta):  # type: ignore[no-untyped-def]
    """Update the second moment of a row: FedAdam, FedAdagrad or FedYogi."""
    rest = _ONE - beta
    if rule == 1:
        for column in range(change.size):
            second[row, column] = second[row, column] * beta + rest * (change[column] * change[column])
    elif rule == 2:
        for column in range(change.size):
            second[row, column] += change[column] * change[column]
    else:
        for column in range(change.size):
            square = change[column] * change[column]
            second[row, column] -= rest * square * np.sign(second[row, column] - square)


LOSSES = {"bpr": 0, "softmax": 1}
"""The numbers of the losses."""

_BETA1, _BETA2, _EPSILON = np.float32(0.9), np.float32(0.999), np.float32(1e-8)


@kernel(
    "void(UniTuple(int64[::1], 4), UniTuple(float32[:, ::1], 3), Tuple((float32, float32, float32[::1],"
    " float32[::1], float32[:, ::1], float32[:, ::1])), Tuple((int64, int64, UniTuple(float32, 4))),"
    " Tuple((UniTuple(float32[:, ::1], 4), int64[::1], float32[::1])), int64, int64)",
    fast=True,
)
def local_steps(labels: Any, received: Any, star: Any, options: Any, result: Any, start: int, stop: int) -> None:
    """The local steps of the clients from ``start`` to ``stop``.

    ``labels`` are the offsets of the clients' positives and of their negatives, and the items of both. ``received`` are
    the rows [P, d] and [N, d] of these, and the offsets [P + N, d] that they begin with. ``star`` are the share of a
    user's own vector, the scale of all items, the positives' edges [P], the scale of each item [m], and what is added
    to the users [B, d] and to the items [m, d]. Arrays without rows stand for none. ``options`` are the numbers of the
    loss and of steps, and learning rate, users' learning rate, L2 and temperature. ``result`` are the users' vectors
    and moments [B, d], which are changed in place, the offsets [P + N, d] of the rows, the numbers of steps before [B],
    and the losses [B].
    """
    (offsets, limits, _, _), (loss, n_steps, rates), (n_up, width) = labels, options, received[0].shape
    (private, first, second, delta), steps, losses = result
    most, rate, l2 = 0, rates[0], rates[2]
    for client in range(start, stop):
        most = max(most, offsets[client + 1] - offsets[client] + limits[client + 1] - limits[client])
    own, final = np.empty((most, width), np.float32), np.empty((most, width), np.float32)
    less = np.empty(width, np.float32)
    slopes, user, pull = np.empty(most, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for client in range(start, stop):
        low, negative = offsets[client], limits[client]
        n_positives, n_negatives = offsets[client + 1] - low, limits[client + 1] - negative
        n_rows = n_positives + n_negatives
        slopes[:1] = _touch(labels, star, client)  # used, so that it is not left out
        _load(labels, received, star, client, (own, final))
        for number in range(n_steps):
            _user(private, client, low, n_positives, star, own, user)
            for row in range(n_rows):
                total = np.float32(0)
                for column in range(width):
                    total += user[column] * final[row, column]
                slopes[row] = total
            losses[client] = _ranking(loss, slopes, n_positives, n_rows, rates[3])
            if l2:
                losses[client] += np.float32(0.5) * l2 * _squares(private, client, own, n_rows)
            pull[:] = 0
            for row in range(n_rows):
                for column in range(width):
                    pull[column] += slopes[row] * final[row, column]
            last = number + 1 == n_steps
            for row in range(n_rows):
                positive, place = row < n_positives, negative + row - n_positives
                scale = _scale(star, labels[2][low + row] if positive else labels[3][place])
                edge = rate * star[2][low + row] if positive and star[2].size else np.float32(0)
                slope, decay = rate * slopes[row] * scale, rate * l2
                for column in range(width):
                    less[column] = slope * user[column] + edge * pull[column] + decay * own[row, column]
                _move(delta, low + row if positive else n_up + place, received[2], number == 0, less)
                if not last:
                    for column in range(width):
                        own[row, column] -= less[column]
                        final[row, column] -= scale * less[column]
            for column in range(width):
                pull[column] = star[0] * pull[column] + l2 * private[client, column]
            _adam(pull, private, first, second, client, steps[client] + number + 1, rates[1])


@helper
def _touch(labels, star, client):  # type: ignore[no-untyped-def]
    """Read a number of each cache line of what is added to the client's items, as :func:`_touch_rows` does."""
    total = np.float32(0)
    for side in range(2 if star[5].shape[0] else 0):
        limits, items = labels[side], labels[side + 2]
        for place in range(limits[client], limits[client + 1]):
            for column in range(0, star[5].shape[1], _LINE):
                total += star[5][items[place], column]
    return total


@helper
def _load(labels, received, star, client, tables):  # type: ignore[no-untyped-def]
    """Fill the first rows of ``tables``: the client's item rows as they begin, their final vectors, and offsets."""
    (offsets, limits, positives, negatives), (up, down, begun), row = labels, received, 0
    for place in range(offsets[client], offsets[client + 1]):
        _load_row(up, place, begun, place, star, positives[place], tables, row)
        row += 1
    for place in range(limits[client], limits[client + 1]):
        _load_row(down, place, begun, up.shape[0] + place, star, negatives[place], tables, row)
        row += 1


@helper
def _load_row(received, place, begun, number, star, item, tables, row):  # type: ignore[no-untyped-def]
    (own, final), scale = tables, _scale(star, item)
    if star[5].shape[0] and not begun.shape[0]:
        for column in range(own.shape[1]):
            own[row, column] = received[place, column]
            final[row, column] = scale * received[place, column] + star[5][item, column]
        return
    for column in range(own.shape[1]):
        own[row, column] = received[place, column]
        final[row, column] = scale * received[place, column]
    if begun.shape[0]:
        for column in range(own.shape[1]):
            own[row, column] += begun[number, column]
            final[row, column] += scale * begun[number, column]
    if star[5].shape[0]:
        for column in range(own.shape[1]):
            final[row, column] += star[5][item, column]


@helper
def _move(delta, place, begun, first, less):  # type: ignore[no-untyped-def]
    """Subtract ``less`` from an item's offset; ``first`` says that no step was taken before."""
    if first and not begun.shape[0]:
        for column in range(less.size):
            delta[place, column] = -less[column]
    elif first:
        for column in range(less.size):
            delta[place, column] = begun[place, column] - less[column]
    else:
        for column in range(less.size):
            delta[place, column] -= less[column]


@helper
def _scale(star, item):  # type: ignore[no-untyped-def]
    return star[3][item] if star[3].size else star[1]


@helper
def _user(private, client, low, n_positives, star, own, user):  # type: ignore[no-untyped-def]
    """The user's final vector."""
    for column in range(user.size):
        user[column] = star[0] * private[client, column]
    if star[2].size:
        for row in range(n_positives):
            edge = star[2][low + row]
            for column in range(user.size):
                user[column] += edge * own[row, column]
    if star[4].shape[0]:
        for column in range(user.size):
            user[column] += star[4][client, column]


@helper
def _ranking(loss, scores, n_positives, n_rows, temperature):  # type: ignore[no-untyped-def]
    """The ranking loss of a client, from the ``scores`` of its positives and then of its negatives. Its derivative by
    each score takes the score's place."""
    total, n_negatives = np.float32(0), n_rows - n_positives
    if n_negatives == 0:
        scores[:n_positives] = 0
    elif loss == 0:
        for row in range(n_positives):  # a negative that is used several times keeps its score until its last use
            apart = scores[n_positives + row % n_negatives] - scores[row]
            total += _softplus(apart)
            scores[row] = -_sigmoid(apart)
        for row in range(n_negatives):
            slope = np.float32(0)
            for place in range(row, n_positives, n_negatives):
                slope -= scores[place]
            scores[n_positives + row] = slope
    else:
        largest = np.max(scores[n_positives:n_rows]) / temperature
        shared = np.float32(0)
        for row in range(n_positives, n_rows):
            scores[row] = np.exp(scores[row] / temperature - largest)
            shared += scores[row]
        level, all_slopes = largest + np.log(shared), np.float32(0)
        for row in range(n_positives):
            apart = level - scores[row] / temperature
            total += _softplus(apart)
            scores[row] = -_sigmoid(apart) / temperature
            all_slopes -= scores[row]
        for row in range(n_positives, n_rows):
            scores[row] *= all_slopes / shared
    return total


@helper
def _squares(private, client, own, n_rows):  # type: ignore[no-untyped-def]
    """The squared norms of a client's parameters."""
    total = np.float32(0)
    for column in range(private.shape[1]):
        total += private[client, column] * private[client, column]
    for row in range(n_rows):
        for column in range(own.shape[1]):
            total += own[row, column] * own[row, column]
    return total


@helper
def _softplus(x):  # type: ignore[no-untyped-def]
    return max(x, np.float32(0)) + np.log1p(np.exp(-abs(x)))


@helper
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + np.exp(-x))


@helper
def _adam(gradient, vectors, first, second, row, step, rate):  # type: ignore[no-untyped-def]
    """One step of Adam (:func:`perfedrec.nn.optim.adam`) on a row, in place."""
    scale1 = _ONE / (_ONE - np.float32(np.exp(step * np.log(0.9))))
    scale2 = _ONE / (_ONE - np.float32(np.exp(step * np.log(0.999))))
    for column in range(gradient.size):
        slope = gradient[column]
        one = slope + _BETA1 * (first[row, column] - slope)
        two = slope * slope + _BETA2 * (second[row, column] - slope * slope)
        first[row, column], second[row, column] = one, two
        vectors[row, column] -= rate * (one * scale1 / (np.sqrt(two * scale2) + _EPSILON))
