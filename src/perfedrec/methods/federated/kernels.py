"""Kernels of federated training: the server's step on its tables, and the local steps of clients.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.compiled import fast_helper, fast_part, helper, kernel, part
from perfedrec.core.kernels import AHEAD, copy, fold_in, load, mix, prefetch
from perfedrec.core.words import GOLDEN
from perfedrec.nn.kernels import add_scaled, inner

_ZERO, _ONE = np.float32(0), np.float32(1)
_UNIT = np.float64(1 / FIXED_POINT)
_GOLDEN, _LOW = np.uint64(GOLDEN), np.uint64((1 << 48) - 1)


@kernel("void(float32[:, ::1], float32[:, ::1], int64[::1], int64[::1], float32[:, ::1], int64, int64)")
def gather(table: Any, offsets: Any, items: Any, groups: Any, out: Any, start: int, stop: int) -> None:
    """``out`` are the rows of ``items`` in a table plus their rows in the offsets of the ``groups``."""
    n_items, width = table.shape
    for row in range(start, stop):
        item = items[row]
        other = groups[row] * n_items + item
        for column in range(width):
            out[row, column] = table[item, column] + offsets[other, column]


@kernel("int64(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def by_item(keys: Any, ends: Any, items: Any, limits: Any, members: Any) -> int:
    """Sort the sums with the ascending ``keys`` ``table * m + item`` by item: ``items`` occur, and the sums of the k-th
    are ``members[limits[k]:limits[k + 1]]``, by table. Returns how many occur; -1 where keys do not ascend. ``ends``
    has m zeros, and is used up."""
    first = 0
    for key in keys:
        while key >= first + ends.size:
            first += ends.size
        if key < first:
            return -1
        ends[key - first] += 1
    count, total, first = 0, 0, 0
    for item in range(ends.size):
        if ends[item]:
            items[count], limits[count] = item, total
            total, ends[item] = total + ends[item], total
            count += 1
    limits[count] = total
    for place in range(keys.size):
        while keys[place] >= first + ends.size:
            first += ends.size
        item = keys[place] - first
        members[ends[item]] = place
        ends[item] += 1
    return count


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
    "void(int64, UniTuple(float32[:, ::1], 7), UniTuple(int64[::1], 5), float64[:, ::1], float32[::1],"
    " Tuple((UniTuple(float32, 5), float64, int64)), int64, int64)",
    makes_arrays=True,
)
def step_rows(
    rule: int, tables: Any, places: Any, sums: Any, divisors: Any, options: Any, start: int, stop: int
) -> None:
    """One step of the server's optimiser ``rule`` on some rows of a table [m, d], and of the tables [K m, d] beside it,
    in place. Each sum is read once, for both.

    ``tables`` are the table, its first and second moments (without rows for FedAvg), and its running averages (without
    rows where there are none), and the tables beside it with their moments (without rows for no step there).
    ``places`` are ``items``, ``limits`` and ``members`` of :func:`by_item`, the ``keys`` of the sums, and the rounds
    after which the averages were taken. The change of ``items[r]``, for r from ``start`` to ``stop``, is the sum of
    ``sums`` over ``members[limits[r]:limits[r + 1]]``, from fixed point, divided by the first of the ``divisors``. The
    change of the row ``keys[k]`` beside it is ``sums[k]``, divided by the divisor of its table, which come next.
    ``options`` are the learning rates of both, betas and epsilon, the averages' decay, and the number of rounds that
    were played before.
    """
    room = np.empty(tables[0].shape[1], np.float64), np.empty(tables[0].shape[1], np.float32)
    _step_rows(rule, tables, places, sums, divisors, options, (start, stop), room)


@part  # with its own parts it takes a tenth less time so
def _step_rows(rule, tables, places, sums, divisors, options, which, room):  # type: ignore[no-untyped-def]
    table, first, second, averages, others, other_first, other_second = tables
    (items, limits, members, keys, since), (rates, decay, played) = places, options
    (start, stop), (total, change), width = which, room, table.shape[1]
    rate, other_rate, moves = rates[0], rates[1], rates[2:]
    for place in range(start, stop):
        later, row, begin, end = items[min(place + AHEAD, stop - 1)], items[place], limits[place], limits[place + 1]
        prefetch(table, later)
        if first.size:
            prefetch(first, later)
            prefetch(second, later)
        if averages.size:
            prefetch(averages, later)
        total[:] = 0
        for number in range(begin, end):
            member, coming = members[number], members[min(number + AHEAD, limits[stop] - 1)]
            for column in range(0, width, 8):
                load(sums, coming * width + column)
            _add_wide(sums[member], total)
            if others.size:
                key, later = keys[member], keys[coming]
                prefetch(others, later)
                if other_first.size:
                    prefetch(other_first, later)
                    prefetch(other_second, later)
                _scale_down(sums[member], divisors[1 + key // table.shape[0]], change)
                _move(rule, change, other_rate, moves, key, others, other_first, other_second)
        _scale_down(total, divisors[0], change)
        if averages.size:
            _average(table[row], averages[row], np.float32(decay ** np.float64(played - since[row])))
            since[row] = played + 1
        _move(rule, change, rate, moves, row, table, first, second)
        if averages.size:
            _average(table[row], averages[row], np.float32(decay))


@part
def _move(rule, change, rate, moves, row, table, first, second):  # type: ignore[no-untyped-def]
    """One step on a row of a table, for its mean ``change``; ``moves`` are betas and epsilon."""
    beta1, beta2, epsilon = moves
    if first.size:
        _first_moment(change, beta1, first[row])
        _second_moment(rule, change, beta2, second[row])
        _step_adaptively(first[row], second[row], epsilon, rate, table[row])
    else:
        add_scaled(rate, change, table[row])


@part
def _add_wide(values, total):  # type: ignore[no-untyped-def]
    for column in range(total.size):
        total[column] += values[column]


@part
def _scale_down(sums, divisor, change):  # type: ignore[no-untyped-def]
    """The mean change from a row of sums in fixed point."""
    for column in range(change.size):
        change[column] = np.float32(sums[column] * _UNIT) / divisor


@part
def _average(values, average, kept):  # type: ignore[no-untyped-def]
    """Bring the average of a row to a time until which its ``values`` did not change."""
    for column in range(values.size):
        average[column] = values[column] + kept * (average[column] - values[column])


@part
def _first_moment(change, beta, first):  # type: ignore[no-untyped-def]
    for column in range(change.size):
        first[column] += (_ONE - beta) * (change[column] - first[column])


@part
def _second_moment(rule, change, beta, second):  # type: ignore[no-untyped-def]
    """Update the second moment of a row: FedAdam, FedAdagrad or FedYogi."""
    rest = _ONE - beta
    if rule == 1:
        for column in range(change.size):
            second[column] = second[column] * beta + rest * (change[column] * change[column])
    elif rule == 2:
        for column in range(change.size):
            second[column] += change[column] * change[column]
    else:
        for column in range(change.size):
            square = change[column] * change[column]
            second[column] -= rest * square * np.sign(second[column] - square)


@part
def _step_adaptively(first, second, epsilon, rate, values):  # type: ignore[no-untyped-def]
    for column in range(values.size):
        values[column] += first[column] / (np.sqrt(second[column]) + epsilon) * rate


LOSSES = {"bpr": 0, "softmax": 1}
"""The numbers of the losses."""

_BETA1, _BETA2, _EPSILON = np.float32(0.9), np.float32(0.999), np.float32(1e-8)


@kernel(
    "void(UniTuple(int64[::1], 5), UniTuple(float32[:, ::1], 3), Tuple((float32, float32, float32[::1],"
    " float32[::1], float32[:, ::1], float32[:, ::1])), Tuple((int64, int64, UniTuple(float32, 4))),"
    " Tuple((UniTuple(float32[:, ::1], 4), int64[::1], float32[::1])), int64, int64)",
    fast=True,
    makes_arrays=True,
)
def local_steps(labels: Any, tables: Any, star: Any, options: Any, result: Any, start: int, stop: int) -> None:
    """The local steps of the clients from ``start`` to ``stop``. All rows of a client are read once, and are in the
    processor's cache from then on.

    ``labels`` are the offsets of the clients' positives [P] and of their negatives [N], the ``items`` [P + N] of both,
    the ``places`` [P + N] of their rows in the table, and the clients' groups [B]. ``tables`` are the table [m, d], the
    groups' tables [K m, d] as differences from it, and the offsets [P + N, d] that the rows begin with. ``star`` are
    the share of a user's own vector, the scale of all items, the positives' edges [P], the scale of each item [m], and
    what is added to the users [B, d] and to the items [m, d]. Arrays without rows stand for none. ``options`` are the
    numbers of the loss and of steps, and learning rate, users' learning rate, L2 and temperature. ``result`` are the
    users' vectors and moments [B, d], which are changed in place, the offsets [P + N, d] of the rows, the numbers of
    steps before [B], and the losses [B].

    A client has the vector ``p``, the rows ``q_r`` and the scores ``s_r = u . f_r``, where ``u = own p + sum_r edge_r
    q_r + shift`` and ``f_r = scale_r q_r + shift_r``. With the derivatives ``g_r`` of the loss by its scores, a step is
    ``q_r -= rate (scale_r g_r u + edge_r sum_k g_k f_k)``, and one of Adam on ``p`` with the gradient ``own sum_k g_k
    f_k``. The L2 term adds ``l2 q_r`` and ``l2 p`` to these gradients.
    """
    (offsets, limits, _, _, _), width, most = labels, tables[0].shape[1], 0
    for client in range(start, stop):
        most = max(most, offsets[client + 1] - offsets[client] + limits[client + 1] - limits[client])
    rows = np.empty((most, width), np.float32), np.empty((most, width), np.float32)
    factors = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.float32)
    vectors = np.empty(width, np.float32), np.empty(width, np.float32), np.zeros(width, np.float32)
    for client in range(start, stop):
        _train((labels, tables, star, options, result), client, rows, factors, vectors)


@fast_part
def _train(given, client, rows, factors, vectors):  # type: ignore[no-untyped-def]
    """The local steps of one client. There is room for its ``rows``, the ``factors`` of each row, and ``vectors``, of
    which the last is 0."""
    labels, tables, star, (loss, n_steps, (rate, user_rate, l2, temperature)), result = given
    (offsets, limits, _, _, _), begun, share, user_shift = labels, tables[2], star[0], star[4]
    ((private, first, second, delta), steps, losses), (own, final) = result, rows
    (scales, edges, slopes), (user, pull, nothing) = factors, vectors
    low, n_positives = offsets[client], offsets[client + 1] - offsets[client]
    n_rows = n_positives + limits[client + 1] - limits[client]
    beyond = offsets[-1] + limits[client] - n_positives
    _gather(
        labels, tables, star, (client, low, n_positives, n_rows, beyond), (own, final, scales, edges, nothing), delta
    )
    for step in range(n_steps):
        _scale_and_add(share, private[client], user_shift[client] if user_shift.size else nothing, user)
        for row in range(n_positives):
            add_scaled(edges[row], own[row], user)
        for row in range(n_rows):
            slopes[row] = inner(user, final[row])
        losses[client] = _ranking(loss, slopes, n_positives, n_rows, temperature)
        if l2:
            losses[client] += np.float32(0.5) * l2 * _squares(private[client], own, n_rows)
        pull[:] = 0
        for row in range(n_rows):
            add_scaled(slopes[row], final[row], pull)
        for row in range(n_rows):
            number = row + (low if row < n_positives else beyond)
            less = rate * scales[row] * slopes[row], rate * edges[row], rate * l2
            if step == 0:  # what is in ``delta`` is not read: it is not in the cache
                _offset(less, user, pull, own[row], begun[number] if begun.size else nothing, delta[number])
            else:
                _offset_more(less, user, pull, own[row], delta[number])
            if step + 1 < n_steps:
                _move_row(less, user, pull, scales[row], own[row], final[row])
        for column in range(private.shape[1]):
            pull[column] = share * pull[column] + l2 * private[client, column]
        _adam(pull, private[client], first[client], second[client], steps[client] + step + 1, user_rate)


@part
def _gather(labels, tables, star, which, rows, delta):  # type: ignore[no-untyped-def]
    """Fill the first rows: a client's item rows as they begin, their final vectors, scales and edges."""
    (_, _, items, places, groups), (table, others, begun) = labels, tables
    _, every_scale, all_edges, all_scales, _, shift = star
    (client, low, n_positives, n_rows, beyond), (own, final, scales, edges, nothing) = which, rows
    for row in range(n_rows):
        number = row + (low if row < n_positives else beyond)
        item, place = items[number], places[number]
        later = min(number + AHEAD, items.size - 1)
        prefetch(table, places[later])
        if others.size:
            prefetch(others, groups[client] * table.shape[0] + places[later])
        if shift.size:
            prefetch(shift, items[later])
        prefetch(delta, number)
        scales[row] = all_scales[item] if all_scales.size else every_scale
        edges[row] = all_edges[number] if row < n_positives and all_edges.size else _ZERO
        other = others[groups[client] * table.shape[0] + place] if others.size else nothing
        before = begun[number] if begun.size else nothing
        _begin(table[place], other, before, scales[row], shift[item] if shift.size else nothing, own[row], final[row])


@fast_part
def _begin(values, other, before, scale, shift, own, final):  # type: ignore[no-untyped-def]
    """A row as it begins, and its final vector. What there is not is 0: to add it costs less than a second loop."""
    for column in range(own.size):
        value = values[column] + other[column] + before[column]
        own[column] = value
        final[column] = scale * value + shift[column]


@fast_helper
def _scale_and_add(scale, one, other, out):  # type: ignore[no-untyped-def]
    for column in range(out.size):
        out[column] = scale * one[column] + other[column]


@fast_part
def _offset(less, user, pull, own, begun, delta):  # type: ignore[no-untyped-def]
    """The offset of an item row after the first step. Its gradient is ``slope user + edge pull + decay own``, of which
    ``less`` has the three factors, times the learning rate."""
    slope, edge, decay = less
    for column in range(delta.size):
        delta[column] = begun[column] - (slope * user[column] + edge * pull[column] + decay * own[column])


@fast_part
def _offset_more(less, user, pull, own, delta):  # type: ignore[no-untyped-def]
    """The same after another step."""
    slope, edge, decay = less
    for column in range(delta.size):
        delta[column] -= slope * user[column] + edge * pull[column] + decay * own[column]


@fast_part
def _move_row(less, user, pull, scale, own, final):  # type: ignore[no-untyped-def]
    """The item row itself and its final vector, for the next step."""
    slope, edge, decay = less
    for column in range(own.size):
        change = slope * user[column] + edge * pull[column] + decay * own[column]
        own[column] -= change
        final[column] -= scale * change


@kernel("boolean(int64[::1], float32, int64, int64[::1], float32[::1], int64[::1])")
def find_quotas(labels: Any, share: Any, size: int, sizes: Any, rests: Any, quotas: Any) -> bool:
    """Count the ``sizes`` of the clusters, and fill their ``quotas`` of a cohort: their sizes times the ``share``,
    rounded down, and one more for the largest ``rests`` until there are ``size``. Returns whether all labels fit."""
    for user in range(labels.size):
        if not 0 <= labels[user] < sizes.size:
            return False
        sizes[labels[user]] += 1
    for cluster in range(sizes.size):
        exact = np.float32(sizes[cluster]) * share
        quotas[cluster] = np.int64(np.floor(exact))
        rests[cluster] = exact - np.float32(quotas[cluster])
        size -= quotas[cluster]
    for _ in range(size):
        most = 0
        for cluster in range(1, sizes.size):
            most = cluster if rests[cluster] > rests[most] else most
        quotas[most], rests[most] = quotas[most] + 1, -_ONE
    return True


@kernel("int64(uint64, int64[::1], int64[::1], int64[::1], int64[::1])")
def first_draws(key: Any, labels: Any, small: Any, draws: Any, users: Any) -> int:
    """Find the users whose draw is below what is ``small`` in their cluster: fill their ``draws``, with the cluster in
    the bits from 48 on, and the ``users``. Returns how many there are."""
    count = 0
    for user in range(labels.size):
        draw = np.int64(mix(fold_in(key, np.uint64(user)) + _GOLDEN) & _LOW)
        if draw < small[labels[user]]:
            draws[count], users[count] = (labels[user] << 48) | draw, user
            count += 1
    return count


@kernel("int64(int64[::1], UniTuple(int64[::1], 3), int64[::1])")
def first_of_each(quotas: Any, ordered: Any, chosen: Any) -> int:
    """Fill ``chosen`` with the first users of each cluster, as many as its quota, which is used up. ``ordered`` are the
    users in an order, their draws with the clusters in the bits from 48 on, and their numbers. Returns how many there
    are."""
    (order, draws, users), count = ordered, 0
    for place in order:
        if quotas[draws[place] >> 48] > 0:
            quotas[draws[place] >> 48] -= 1
            chosen[count] = users[place]
            count += 1
    return count


@kernel("void(int64[::1], int64[::1])")
def invert(positions: Any, sources: Any) -> None:
    """``sources`` are the places at which the numbers 0, 1, 2, ... occur among ``positions``, -1 where they do not."""
    sources[:] = -1
    for place in range(positions.size):
        if positions[place] >= 0:
            sources[positions[place]] = place


@kernel("void(float32[:, ::1], int64[::1], float32[:, ::1], float32[:, ::1], int64, int64)")
def keep_rows(kept: Any, sources: Any, before: Any, out: Any, start: int, stop: int) -> None:
    """``out`` are the rows ``sources`` of ``kept``, and those of ``before`` where the source is -1."""
    for row in range(start, stop):
        if sources[row] >= 0:
            copy(kept[sources[row]], out[row])
        else:
            copy(before[row], out[row])


@helper
def _ranking(loss, scores, n_positives, n_rows, temperature):  # type: ignore[no-untyped-def]
    """The ranking loss of a client, from the ``scores`` of its positives and then of its negatives. Its derivative by
    each score takes the score's place."""
    total, n_negatives = np.float64(0), n_rows - n_positives
    if n_negatives == 0:
        scores[:n_positives] = 0
    elif loss == 0:
        product = np.float64(1)
        for row in range(n_positives):  # a negative that is used several times keeps its score until its last use
            slope, apart, factor = _logistic(scores[n_positives + row % n_negatives] - scores[row])
            total, product = _add_log(total + apart, product * factor)
            scores[row] = -slope
        total += np.log(product)
        for row in range(n_negatives):
            slope = np.float32(0)
            for place in range(row, n_positives, n_negatives):
                slope -= scores[place]
            scores[n_positives + row] = slope
    else:
        largest = scores[n_positives]
        for row in range(n_positives + 1, n_rows):
            largest = max(largest, scores[row])
        largest /= temperature
        shared, product = np.float32(0), np.float64(1)
        for row in range(n_positives, n_rows):
            scores[row] = np.exp(scores[row] / temperature - largest)
            shared += scores[row]
        level, all_slopes = largest + np.log(shared), np.float32(0)
        for row in range(n_positives):
            slope, apart, factor = _logistic(level - scores[row] / temperature)
            total, product = _add_log(total + apart, product * factor)
            scores[row] = -slope / temperature
            all_slopes -= scores[row]
        total += np.log(product)
        for row in range(n_positives, n_rows):
            scores[row] *= all_slopes / shared
    return np.float32(total)


@helper
def _logistic(x):  # type: ignore[no-untyped-def]
    """``1 / (1 + exp(-x))``, and a and b with ``log(1 + exp(x)) = a + log(b)``."""
    decayed = np.exp(-abs(x))
    return (_ONE if x >= 0 else decayed) / (_ONE + decayed), max(x, _ZERO), np.float64(_ONE + decayed)


@helper
def _add_log(total, product):  # type: ignore[no-untyped-def]
    """A sum of logarithms as a number and the logarithm of a ``product``, which is kept small: one logarithm is
    computed for many factors."""
    if product > 1e200:
        return total + np.log(product), np.float64(1)
    return total, product


@helper
def _squares(private, own, n_rows):  # type: ignore[no-untyped-def]
    """The squared norms of a client's parameters."""
    total = inner(private, private)
    for row in range(n_rows):
        total += inner(own[row], own[row])
    return total


@fast_helper
def _adam(gradient, vector, first, second, step, rate):  # type: ignore[no-untyped-def]
    """One step of Adam (:func:`perfedrec.nn.optim.adam`) on a vector, in place."""
    scale1 = _ONE / (_ONE - np.float32(np.exp(step * np.log(0.9))))
    scale2 = _ONE / (_ONE - np.float32(np.exp(step * np.log(0.999))))
    for column in range(gradient.size):
        slope = gradient[column]
        one = slope + _BETA1 * (first[column] - slope)
        two = slope * slope + _BETA2 * (second[column] - slope * slope)
        first[column], second[column] = one, two
        vector[column] -= rate * (one * scale1 / (np.sqrt(two * scale2) + _EPSILON))
