"""Kernels of federated training: the server's step on its tables, and the local steps of clients.

This module needs numba. It is imported where :func:`perfedrec.core.compiled.usable` holds, and not before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.compiled import helper, kernel

_ONE = np.float32(1)
_UNIT = np.float64(1 / FIXED_POINT)

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
