"""Sums over the rows of each user, and the reverse: differentiable, and with the same result in any block of users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(segments)
        return _sum(values, segments, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (segments,) = ctx.saved_tensors
        return grads[0].index_select(0, segments), None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Tensor) -> Tensor:
        ctx.save_for_backward(segments)
        ctx.n = values.shape[0]
        return values.index_select(0, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (segments,) = ctx.saved_tensors
        return _sum(grads[0], segments, ctx.n), None


def _sum(values: Tensor, segments: Tensor, n: int) -> Tensor:
    if values.dim() != 2 or not values.numel():
        return values.new_zeros(n, *values.shape[1:]).index_add_(0, segments, values)
    # Summing bags of consecutive rows is several times faster than adding the rows one by one.
    numbers = torch.arange(max(n, segments.numel()), device=values.device)
    starts = torch.searchsorted(segments, numbers[:n])
    return functional.embedding_bag(numbers[: segments.numel()], values, starts, mode="sum")


def segment_sum(values: Tensor, segments: Tensor, n: int) -> Tensor:
    """[n, ...] the sums of ``values`` [R, ...] over the rows of each segment; ``segments`` [R] must ascend."""
    return cast(Tensor, _SegmentSum.apply(values, segments, n))  # type: ignore[no-untyped-call]


def expand(values: Tensor, segments: Tensor) -> Tensor:
    """[R, ...] the row of ``values`` [n, ...] for each of ``segments`` [R], which must ascend."""
    return cast(Tensor, _Expand.apply(values, segments))  # type: ignore[no-untyped-call]


def by_length(segments: Tensor, n: int, size: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows in groups of ``size`` segments of similar length, so that padding a group to its longest wastes little.

    ``segments`` [R], in any order, says which of the ``n`` segments a row belongs to. For each group, yields the
    ``members`` [C] (its segments), its ``rows`` [T], and for each row its ``owner`` [T] (a place among the members) and
    its ``slot`` [T] (its number within the owner). Segments without rows are left out.
    """
    order, counts = segments.argsort(stable=True), torch.bincount(segments, minlength=n)
    starts, longest = counts.cumsum(0) - counts, counts.argsort(descending=True, stable=True)
    for members in longest[: int((counts > 0).sum())].split(size) if segments.numel() else ():
        owner = torch.repeat_interleave(counts[members])
        first = counts[members].cumsum(0) - counts[members]
        slot = torch.arange(owner.numel(), device=owner.device) - first[owner]
        yield members, order[starts[members][owner] + slot], owner, slot


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis; the other axes are broadcast.

    This is not a matrix product on purpose. A matrix product chooses its algorithm by shape, so that the last bit of a
    client's result would depend on which other clients are in the block.
    """
    return (a * b).sum(-1)
