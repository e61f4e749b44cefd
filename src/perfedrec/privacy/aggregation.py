"""Sums in the form in which secure aggregation adds them up: flat vectors of whole numbers, called words.

A simulation adds sums up in the clear (:func:`perfedrec.core.aggregate.reduce`), with the same result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update

EXACT = 2**53
"""Whole numbers up to this size are exact in float64."""


def summed_part(update: Update, place: int) -> Update:
    """What the client at one ``place`` of a block contributes to a sum: no vector and no edge of its user."""
    return replace(update.of_user(place), reports=None, edges=None)


def to_words(total: Aggregate) -> Tensor:
    """[G m d + D] int64: a sum in fixed point, with a row for every item of every group.

    Raises :class:`PerfedrecError` where a number is too large. The sum of 1,024 vectors of numbers below 2^53 in
    magnitude stays below 2^63, so that the sum modulo 2^64 is the sum of the whole numbers.
    """
    rows, dim = total.weights.numel() * total.n_items, total.sums.shape[1]
    table = total.sums.new_zeros(rows if dim else 0, dim).index_copy_(0, total.keys, total.sums)
    words = torch.cat([table.reshape(-1), *([] if total.dense is None else [total.dense])])
    if not bool((words.abs() < EXACT).all()):
        raise PerfedrecError("a sum holds numbers that are not finite or too large to be exact; expected below 2^53")
    return words.to(torch.int64)


def from_words(words: Tensor, clients: int, like: Aggregate) -> Aggregate:
    """The sum over a number of ``clients`` that ``words`` [G m d + D] hold, with the sizes of ``like``.

    Rows of zeros are left out: they cannot be distinguished from rows that no client has touched. Raises
    :class:`PerfedrecError` where the words cannot be a sum: too many or too few of them, or numbers that are too large.
    """
    dim = like.sums.shape[1]
    rows, dense = like.weights.numel() * like.n_items if dim else 0, 0 if like.dense is None else like.dense.numel()
    possible = (words > -EXACT) & (words < EXACT)  # not abs, which is negative for -2^63
    if words.numel() != rows * dim + dense or not bool(possible.all()):
        raise PerfedrecError(
            f"expected a sum of {rows * dim + dense} numbers below 2^53, got {words.numel()} numbers, or larger ones"
        )
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
