"""Secure aggregation: the interface that a protocol fills, and the masking at the heart of such protocols.

A simulation sums in the clear (:func:`perfedrec.core.types.reduce`), which computes what a protocol computes. A
protocol takes the place of that function in :func:`perfedrec.runtimes.round.play_round`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from perfedrec.core.keys import Key, bits, fold_in
from perfedrec.core.types import Aggregate, Contribution, reduce


class Aggregator(Protocol):
    """Sums what the clients of a block hand over."""

    def __call__(self, contribution: Contribution, n_items: int, n_groups: int) -> Aggregate:
        """The sum, in fixed point, and nothing else of any single client."""


class PairwiseMasks:
    """Additive masks that cancel (Bonawitz et al., CCS 2017): what one client sends is uniformly random.

    Every pair of clients shares a key, here drawn from one ``key``; one of the two adds the words that it names to
    its upload and the other takes them off, modulo 2^64. All clients of a block have to answer: recovery from
    drop-outs and agreement on keys are the business of a whole protocol.
    """

    def __init__(self, key: Key) -> None:
        self.key = key

    def __call__(self, contribution: Contribution, n_items: int, n_groups: int) -> Aggregate:
        sums, dim = self.uploads(contribution, n_items, n_groups).sum(0), 0
        if contribution.deltas is not None:
            dim = contribution.deltas.shape[1]
        rows = n_groups * n_items if dim else 0
        table, dense = sums[: rows * dim].to(torch.float64), sums[rows * dim :].to(torch.float64)
        return Aggregate(
            n_items=n_items,
            clients=contribution.users.numel(),
            keys=torch.arange(rows),
            sums=table.view(rows, dim),
            weights=torch.zeros(n_groups, dtype=torch.float64),
            dense=None if contribution.dense is None else dense,
        )

    def uploads(self, contribution: Contribution, n_items: int, n_groups: int) -> Tensor:
        """[B, G m d + D] int64: what each client sends."""
        users = contribution.users
        plain = torch.stack([_flat(_alone(contribution, place), n_items, n_groups) for place in range(users.numel())])
        for low in range(users.numel()):
            for high in range(low + 1, users.numel()):
                pair = fold_in(self.key.spread(users[low]), users[high])
                mask = bits(pair, plain.shape[1])
                plain[low] += mask  # wraps around
                plain[high] -= mask
        return plain


def _alone(contribution: Contribution, place: int) -> Contribution:
    """What one client hands over."""
    one, mine = slice(place, place + 1), None
    if contribution.segments is not None:
        mine = contribution.segments == place

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None or mine is None else values[mine]

    segments = rows(contribution.segments)
    return replace(
        contribution,
        users=contribution.users[one],
        groups=contribution.groups[one],
        weights=contribution.weights[one],
        segments=None if segments is None else torch.zeros_like(segments),
        items=rows(contribution.items),
        deltas=rows(contribution.deltas),
        tables=rows(contribution.tables),
        dense=None if contribution.dense is None else contribution.dense[one],
        reports=None,
        edges=None,
    )


def _flat(contribution: Contribution, n_items: int, n_groups: int) -> Tensor:
    """[G m d + D] int64 of one client's upload in fixed point."""
    total = reduce(contribution, n_items, n_groups)
    table = total.sums.new_zeros(n_groups * n_items, total.sums.shape[1]).index_copy_(0, total.keys, total.sums)
    parts = [table.reshape(-1), *([] if total.dense is None else [total.dense])]
    return torch.cat(parts).to(torch.int64)
