"""Kernels of keyed random numbers, exact sums and best scores. Each does what the function that calls it says.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.compiled import fast_helper, finite_helper, helper, kernel
from perfedrec.core.words import GOLDEN

_GOLDEN = np.uint64(GOLDEN)
FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U30, _U27, _U31, _U32 = (np.uint64(each) for each in (30, 27, 31, 32))
_ROOT = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
_SIGN, _MANTISSA = np.uint32(1 << 31), np.uint32(0x7FFFFF)
_FIXED = np.float64(FIXED_POINT)
_SIZE = np.int32(0x7FFFFFFF)  # all bits but the sign
_LINE = 16  # numbers that the processor loads at once
_LOWEST = np.int32(-(1 << 31))
_LEAST = np.float32(-87)  # its exponential is nearly the smallest number with all digits

AHEAD = 8
"""Rows that are asked for before they are needed: nearer ones arrive too late."""

CHUNK = 64
"""Scores that are compared with the worst of the best at once."""

NOTHING = np.float32(-np.inf)


@intrinsic
def load(context, values, place):  # type: ignore[no-untyped-def]
    """Ask the processor to load the number at a ``place`` of an array, counted in its flat form, without waiting."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(array.data, [arguments[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(prefetch, [pointer, word(0), word(3), word(1)])  # for reading, to stay, data
        return context.get_dummy_value()

    return types.void(values, types.int64), generate


@helper
def prefetch(table, row):  # type: ignore[no-untyped-def]
    """Ask for a row of a float32 table with numbers in sequence."""
    width = table.size // table.shape[0]
    for place in range(row * width, (row + 1) * width, _LINE):
        load(table, place)


@helper
def mix(word):  # type: ignore[no-untyped-def]
    """The finaliser of SplitMix64."""
    word = (word ^ (word >> _U30)) * FIRST
    word = (word ^ (word >> _U27)) * _SECOND
    return word ^ (word >> _U31)


@kernel("void(float32[:, ::1], int64[::1], int64[::1], float32[:, ::1], int64, int64)")
def put_rows(values: Any, positions: Any, rows: Any, table: Any, start: int, stop: int) -> None:
    """Write the ``values`` from ``start`` to ``stop`` to the rows ``rows[positions]`` of the ``table``; not those with
    a position below 0."""
    for place in range(start, stop):
        later = positions[min(place + AHEAD, stop - 1)]
        if later >= 0:
            prefetch(table, rows[later])
        if positions[place] >= 0:
            copy(values[place], table[rows[positions[place]]])


@helper
def copy(values, out):  # type: ignore[no-untyped-def]
    for column in range(out.size):
        out[column] = values[column]


@kernel("void(uint64[::1])")
def mix_words(words: Any) -> None:
    """Mix the words in place."""
    for place in range(words.size):
        words[place] = mix(words[place])


@helper
def fold_in(key, number):  # type: ignore[no-untyped-def]
    """The key that follows from a key and a number, both uint64."""
    return mix(mix(number * _GOLDEN + np.uint64(1)) ^ key)


@kernel("void(uint64, int64[::1], uint64[::1])")
def spread(key: Any, ids: Any, keys: Any) -> None:
    """Fill ``keys`` with those that follow from a key and the ``ids``."""
    for place in range(ids.size):
        keys[place] = fold_in(key, np.uint64(ids[place]))


@kernel("void(uint64[::1], int64[::1], int64[::1], uint64[::1])")
def fold_rows(keys: Any, segments: Any, ids: Any, out: Any) -> None:
    """Fill ``out`` with the keys that follow from the ``keys`` of ``segments`` and the ``ids``."""
    for row in range(ids.size):
        out[row] = fold_in(keys[segments[row]], np.uint64(ids[row]))


@kernel("void(uint64[::1], uint64[:, ::1])")
def fold_numbers(keys: Any, out: Any) -> None:
    """Fill ``out`` with the keys that follow from the ``keys`` and the numbers from 0 on."""
    for place in range(keys.size):
        for number in range(out.shape[1]):
            out[place, number] = fold_in(keys[place], np.uint64(number))


@kernel("int64(int64[::1], int64[::1], int64[::1])")
def limits_of(offsets: Any, users: Any, limits: Any) -> int:
    """Fill the ``limits`` of the rows of ``users``, one after the other, from the ``offsets`` of all. Returns how many
    rows they have; -1 where there is no such user."""
    limits[0] = 0
    for place in range(users.size):
        if not 0 <= users[place] < offsets.size - 1:
            return -1
        limits[place + 1] = limits[place] + offsets[users[place] + 1] - offsets[users[place]]
    return int(limits[users.size])


@kernel("void(int64[::1], int64[::1], UniTuple(int64[::1], 5))")
def rows_of(offsets: Any, users: Any, arrays: Any) -> None:
    """The rows of ``users``: from all ``items`` and the ``limits`` of :func:`limits_of` the items, segments and
    positions of each row."""
    items, limits, own, segments, positions = arrays
    for place in range(users.size):
        first = offsets[users[place]] - limits[place]
        for row in range(limits[place], limits[place + 1]):
            own[row], segments[row], positions[row] = items[first + row], place, first + row


@kernel("void(int64[::1], int64[::1], int64[::1], int64[::1])")
def ranges(starts: Any, limits: Any, segments: Any, positions: Any) -> None:
    """Fill the ``positions`` ``starts[k], starts[k] + 1, ...`` between ``limits[k]`` and ``limits[k + 1]``, and k into
    the ``segments``."""
    for segment in range(starts.size):
        for place in range(limits[segment], limits[segment + 1]):
            segments[place] = segment
            positions[place] = starts[segment] + place - limits[segment]


@helper
def log_of_odd(odd):  # type: ignore[no-untyped-def]
    """``log(odd / 2^24)`` for an odd number below 2^24, to within two units in the last place of float32.

    The argument is ``2^e (1 + f)`` with ``1 + f`` between sqrt(1/2) and sqrt(2). For ``s = f / (2 + f)`` the logarithm
    of ``1 + f`` is ``2 (s + s^3 / 3 + s^5 / 5 + ...)``, computed as ``f`` less what it differs from ``f``. There is no
    branch and no call, so that many logarithms are computed at once.
    """
    shifted = np.int32(np.float32(odd).view(np.int32) - _ROOT)
    exponent = np.int32(shifted >> np.int32(23)) - np.int32(24)
    f = np.int32(np.int32(shifted & np.int32(0x7FFFFF)) + _ROOT).view(np.float32) - np.float32(1)
    s = f / (np.float32(2) + f)
    z = s * s
    series = ((np.float32(2 / 9) * z + np.float32(2 / 7)) * z + np.float32(2 / 5)) * z + np.float32(2 / 3)
    half = np.float32(0.5) * f * f
    return np.float32(exponent) * np.float32(0.6931471805599453) + (f - (half - s * (half + series * z)))


@helper
def exp(x):  # type: ignore[no-untyped-def]
    """``exp(x)`` of a number below 88, to within two units in the last place of float32; what is below -87 counts as
    -87. There is no branch and no call, so that many are computed at once.

    ``x`` is ``n log(2) + r`` for a whole number n, which becomes the exponent, and the series of ``exp(r)`` is short.
    """
    x = _LEAST if x < _LEAST else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)  # of log(2), the first has few digits
    series = (np.float32(1 / 720) * r + np.float32(1 / 120)) * r + np.float32(1 / 24)
    series = ((series * r + np.float32(1 / 6)) * r + np.float32(1 / 2)) * r * r + r + np.float32(1)
    return series * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel("void(float32[:, ::1], uint64[::1], float32, float32, float32[:, ::1], int64, int64)", makes_arrays=True)
def clip_and_add_laplace(values: Any, keys: Any, clip: Any, scale: Any, out: Any, start: int, stop: int) -> None:
    """``out = clamp(values, -clip, clip) + scale * laplace(keys)`` for the rows from ``start`` to ``stop``."""
    width = values.shape[1]
    halves = np.empty(width + 1, np.uint32)
    for row in range(start, stop):
        key = keys[row]
        for pair in range((width + 1) // 2):
            word = mix(key + np.uint64(pair + 1) * _GOLDEN)
            halves[2 * pair] = np.uint32(word)
            halves[2 * pair + 1] = np.uint32(word >> _U32)
        for place in range(width):
            half = halves[place]
            noise = np.float32(log_of_odd(np.int32((half & _MANTISSA) * np.uint32(2) + np.uint32(1))))
            signed = np.uint32(noise.view(np.uint32) ^ (half & _SIGN)).view(np.float32)
            value = values[row, place]  # one that is not a number stays so, and is refused by the sums
            value = -clip if value < -clip else value
            out[row, place] = (clip if value > clip else value) + scale * signed


@kernel("Tuple((float64, boolean))(int64[::1], float32[::1], float64[::1])")
def add_weights(groups: Any, weights: Any, totals: Any) -> Any:
    """Add the ``weights`` in fixed point to the ``totals`` of their ``groups``. Returns the sum of squares of what was
    added, and whether the totals have all groups; otherwise nothing was added."""
    for place in range(groups.size):
        if not 0 <= groups[place] < totals.size:
            return 0.0, False
    squares = 0.0
    for place in range(groups.size):
        whole = np.rint(np.float64(weights[place]) * _FIXED)
        squares += whole * whole
        totals[groups[place]] += whole
    return squares, True


@helper
def _number(keys, present, found):  # type: ignore[no-untyped-def]
    """See :func:`distinct`."""
    for row in range(keys.size):
        present[keys[row]] = 1
    count = 0
    for key in range(present.size):  # without a branch, which would often be foreseen wrongly
        here = present[key]
        present[key] = count
        found[count] = key
        count += here
    for row in range(keys.size):
        keys[row] = present[keys[row]]
    return count


@kernel("int64(int64[::1], int64[::1], int64[::1])")
def distinct(keys: Any, present: Any, found: Any) -> int:
    """Fill the distinct values of ``keys``, ascending, into ``found``, and replace each key by its place among them;
    return how many there are. ``present`` has a zero for each possible value, and is used up; ``found`` has room for
    one number more than there are keys."""
    return int(_number(keys, present, found))


@kernel("int64(UniTuple(int64[::1], 4), int64, int64[::1], int64[::1], int64[::1])")
def find_keys(rows: Any, n_items: int, places: Any, present: Any, found: Any) -> int:
    """:func:`distinct` for the keys ``table * n_items + item`` of some ``rows``; fills their ``places``. ``rows`` are
    the groups of users and the rows' segments, tables and items; where there are no groups, the tables are given, and
    otherwise they are the groups of the segments."""
    groups, segments, tables, items = rows
    for row in range(items.size):
        table = groups[segments[row]] if groups.size else tables[row]
        places[row] = table * n_items + items[row]
    return int(_number(places, present, found))


@kernel("void(int64[::1], int64[::1], int64[::1])")
def by_place(places: Any, starts: Any, order: Any) -> None:
    """Sort rows by their ``places``: those of place p are ``order[starts[p]:starts[p + 1]]``. ``starts`` begins as
    zeros."""
    for row in range(places.size):
        starts[places[row] + 1] += 1
    for place in range(1, starts.size):
        starts[place] += starts[place - 1]
    for row in range(places.size):  # each start is moved to the next one
        order[starts[places[row]]] = row
        starts[places[row]] += 1
    for place in range(starts.size - 1, 0, -1):
        starts[place] = starts[place - 1]
    starts[0] = 0


@kernel(
    "float64(float32[:, ::1], UniTuple(int64[::1], 3), float32[::1], float64[::1], float64[:, ::1], int64, int64)",
    fast=True,
)
def sum_fixed(values: Any, rows: Any, weights: Any, shares: Any, sums: Any, start: int, stop: int) -> float:
    """Fill the ``sums`` from ``start`` to ``stop`` with the ``values`` in fixed point, times the ``weights`` of their
    segments. ``rows`` are the order and the starts of :func:`by_place`, and the segments; each sum has a row. Where
    there are ``shares`` of the segments, these are taken of the numbers in fixed point. Returns the sum of squares of
    what was added."""
    (order, starts, segments), total = rows, 0.0
    for place in range(start, stop):
        into = sums[place]
        for number in range(starts[place], starts[place + 1]):
            prefetch(values, order[min(number + AHEAD, starts[stop] - 1)])
            row = order[number]
            factor = _fixed_factor(weights, segments[row])
            if number == starts[place] and shares.size:
                into[:] = 0
            if shares.size:
                total += _add_shares(values[row], factor, shares[segments[row]], into)
            elif number == starts[place]:
                total += _first_fixed(values[row], factor, into)
            else:
                total += _add_fixed(values[row], factor, into)
    return total


@helper
def _fixed_factor(weights, segment):  # type: ignore[no-untyped-def]
    return np.float64(weights[segment]) * _FIXED


@fast_helper
def _first_fixed(values, factor, sums):  # type: ignore[no-untyped-def]
    """:func:`_add_fixed` for the first row of a sum: what is in the sum is not read."""
    squares = 0.0
    for column in range(sums.size):
        whole = np.rint(np.float64(values[column]) * factor)
        squares += whole * whole
        sums[column] = whole
    return squares


@fast_helper
def _add_fixed(values, factor, sums):  # type: ignore[no-untyped-def]
    squares = 0.0
    for column in range(sums.size):
        whole = np.rint(np.float64(values[column]) * factor)
        squares += whole * whole
        sums[column] += whole
    return squares


@fast_helper
def _add_shares(values, factor, share, sums):  # type: ignore[no-untyped-def]
    squares = 0.0
    for column in range(sums.size):
        whole = np.rint(np.rint(np.float64(values[column]) * factor) * share)
        squares += whole * whole
        sums[column] += whole
    return squares


@kernel("void(int32[:, ::1], int64[::1], int32[::1])")
def largest_of_parts(values: Any, segments: Any, largest: Any) -> None:
    """Raise ``largest`` to the largest size of the float32 ``values`` of each segment. Both are given by their bits,
    whose order without the sign is that of sizes; what is not finite is larger than all numbers."""
    for row in range(segments.size):
        largest[segments[row]] = max(largest[segments[row]], _largest(values[row]))


@helper
def _largest(values):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for column in range(values.size):
        largest = max(largest, values[column] & _SIZE)
    return largest


@kernel("void(float32[:, ::1], float32[:, ::1], float32[::1])", fast=True)
def row_lengths(table: Any, others: Any, lengths: Any) -> None:
    """Fill the ``lengths`` of the rows of a ``table`` [m, d], or of their sums with the rows of ``others`` [K m, d]."""
    for row in range(lengths.size):
        own = table[row % table.shape[0]]
        lengths[row] = np.sqrt(_summed_squares(own, others[row]) if others.size else _own_squares(own))


@fast_helper
def _own_squares(values):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for column in range(values.size):
        total += values[column] * values[column]
    return total


@fast_helper
def _summed_squares(one, other):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for column in range(one.size):
        value = one[column] + other[column]
        total += value * value
    return total


@kernel("void(float32[:, ::1], float32[::1], int64[::1], float64[::1], float64[::1])", fast=True)
def squares_of_parts(values: Any, weights: Any, segments: Any, scales: Any, squares: Any) -> None:
    """Add to ``squares`` those of the ``values`` of each segment, in fixed point, times its weight and then its scale,
    and rounded."""
    for row in range(segments.size):
        segment = segments[row]
        squares[segment] += _squares(values[row], _fixed_factor(weights, segment), scales[segment])


@fast_helper
def _squares(values, factor, scale):  # type: ignore[no-untyped-def]
    squares = 0.0
    for column in range(values.size):
        whole = np.rint(np.rint(np.float64(values[column]) * factor) * scale)
        squares += whole * whole
    return squares


@finite_helper
def _smallest(values):  # type: ignore[no-untyped-def]
    smallest = values[0]
    for place in range(1, values.size):
        smallest = min(smallest, values[place])
    return smallest


@helper
def _place_of(value, values):  # type: ignore[no-untyped-def]
    place = 0
    while values[place] != value:
        place += 1
    return place


@helper
def add_best(scores, first, found, best, places, size, out):  # type: ignore[no-untyped-def]
    """Put the best ``scores`` of items from ``first`` on among the ``size`` best so far. Returns the new size, and the
    largest of ``out`` and the scores that are not among them, as far as these are not below all that are."""
    worst = _smallest(best) if size == best.size else _threshold(scores, best.size)
    for start in range(0, scores.size, CHUNK):
        chunk = scores[start : start + CHUNK]
        if not _any_above(chunk, worst):
            continue
        n_found = np.uint64(0)
        for c in range(chunk.size):  # without a branch, which would often be foreseen wrongly
            found[n_found] = c
            n_found += np.uint64(chunk[c] >= worst)
        for number in range(n_found):
            place = found[number]
            score = chunk[place]
            if size < best.size:
                best[size], places[size] = score, first + start + place
                size += 1
                if size == best.size:
                    worst = _smallest(best)
            elif score > worst:
                out = max(out, worst)
                to = _place_of(worst, best)
                best[to], places[to] = score, first + start + place
                worst = _smallest(best)
            else:
                out = max(out, score)
    return size, out


@fast_helper
def _any_above(scores, least):  # type: ignore[no-untyped-def]
    count = np.float32(0)  # of the same width as the scores, so that they are compared many at once
    for c in range(scores.size):
        count += np.float32(1) if scores[c] >= least else np.float32(0)
    return count > 0


@partial(helper, makes_arrays=True)
def _threshold(scores, k):  # type: ignore[no-untyped-def]
    """A score that at least ``k`` of the ``scores`` reach, and not many more: the k-th best of the largest scores of 64
    groups. Without it nearly all scores would enter a heap that is empty."""
    if k >= CHUNK or scores.size < 4 * CHUNK:
        return NOTHING
    largest = scores[:CHUNK].copy()
    for start in range(CHUNK, scores.size - CHUNK + 1, CHUNK):
        _larger(scores[start : start + CHUNK], largest)
    best = largest[:k].copy()
    worst = _smallest(best)
    for place in range(k, CHUNK):
        if largest[place] > worst:
            best[_place_of(worst, best)] = largest[place]
            worst = _smallest(best)
    return worst


@helper
def largest(values):  # type: ignore[no-untyped-def]
    """The largest of float32 ``values`` without NaN. The bits of floats, taken as whole numbers, are in the same order
    once those of negative ones are turned over. Of whole numbers, many are compared at once."""
    bits, top = values.view(np.int32), _LOWEST
    for place in range(bits.size):
        top = max(top, _in_order(bits[place]))
    return np.int32(_in_order(top)).view(np.float32)


@helper
def _in_order(bits):  # type: ignore[no-untyped-def]
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@helper
def _larger(values, largest):  # type: ignore[no-untyped-def]
    for c in range(largest.size):
        largest[c] = values[c] if values[c] > largest[c] else largest[c]
