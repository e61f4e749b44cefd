"""Sums as a protocol of secure aggregation adds them up: flat vectors of whole numbers.

A simulation sums in the clear (:func:`perfedrec.core.aggregate.reduce`), which computes what a protocol computes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update

EXACT = 2**53
"""Whole numbers up to here are exact in float64."""


def alone(update: Update, place: int) -> Update:
    """What the client at one place hands over to a sum."""
    return replace(update.of_user(place), reports=None, edges=None)


def to_words(total: Aggregate) -> Tensor:
    """[G m d + D] int64: a sum in fixed point with a row for every item of every group, as protocols add it up.

    Raises :class:`PerfedrecError` where a number is too large. With numbers below 2^53 in magnitude the sum of 1,024
    such vectors stays below 2^63, so that no sum modulo 2^64 is ever another than the sum of whole numbers.
    """
    rows, dim = total.weights.numel() * total.n_items, total.sums.shape[1]
    table = total.sums.new_zeros(rows if dim else 0, dim).index_copy_(0, total.keys, total.sums)
    words = torch.cat([table.reshape(-1), *([] if total.dense is None else [total.dense])])
    if not bool((words.abs() < EXACT).all()):
        raise PerfedrecError("a sum holds numbers that are not finite, or too large to be exact: expected below 2^53")
    return words.to(torch.int64)


def from_words(words: Tensor, clients: int, like: Aggregate) -> Aggregate:
    """The sum over ``clients`` that ``words`` [G m d + D] hold, with the sizes of ``like``.

    Rows that are 0 are left out, like those that nobody has touched: no one can tell them apart. Raises
    :class:`PerfedrecError` where the words are not a sum that could have been taken: too many, or too large.
    """
    dim = like.sums.shape[1]
    rows, dense = like.weights.numel() * like.n_items if dim else 0, 0 if like.dense is None else like.dense.numel()
    possible = (words > -EXACT) & (words < EXACT)  # not abs, which is negative for -2^63
    if words.numel() != rows * dim + dense or not bool(possible.all()):
        raise PerfedrecError(f"expected a sum of {rows * dim + dense} numbers below 2^53, got {words.numel()}")
    table = words[: rows * dim].view(rows, dim)
    keys = table.any(1).nonzero().squeeze(1)
    return Aggregate(
        n_items=like.n_items,
        clients=clients,
        keys=keys,
        sums=table[keys].to(torch.float64),
        weights=torch.zeros_like(like.weights),
        dense=None if like.dense is None else words[rows * dim :].to(torch.float64),
    )
