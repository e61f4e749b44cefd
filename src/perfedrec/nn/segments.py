"""Sums over the rows of each user and their mirror, differentiable and with the same result in any block."""

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
    # Summing bags of consecutive rows is several times faster than scattering them.
    numbers = torch.arange(max(n, segments.numel()), device=values.device)
    starts = torch.searchsorted(segments, numbers[:n])
    return functional.embedding_bag(numbers[: segments.numel()], values, starts, mode="sum")


def segment_sum(values: Tensor, segments: Tensor, n: int) -> Tensor:
    """[n, ...] sums of ``values`` [R, ...] by ``segments`` [R], which ascend."""
    return cast(Tensor, _SegmentSum.apply(values, segments, n))  # type: ignore[no-untyped-call]


def expand(values: Tensor, segments: Tensor) -> Tensor:
    """[R, ...] the row of ``values`` [n, ...] that each of ``segments`` [R], which ascend, names."""
    return cast(Tensor, _Expand.apply(values, segments))  # type: ignore[no-untyped-call]


def by_length(segments: Tensor, n: int, size: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The rows of ``segments`` [R] (any order) in groups of ``size`` segments of about one length, which waste little
    when each is padded to its longest: the ``members`` [C] of a group, its ``rows`` [T], and for each of these the
    ``owner`` [T] among the members and the ``slot`` [T] within the owner. Segments without rows are left out."""
    order, counts = segments.argsort(stable=True), torch.bincount(segments, minlength=n)
    starts, longest = counts.cumsum(0) - counts, counts.argsort(descending=True, stable=True)
    for members in longest[: int((counts > 0).sum())].split(size) if segments.numel() else ():
        owner = torch.repeat_interleave(counts[members])
        first = counts[members].cumsum(0) - counts[members]
        slot = torch.arange(owner.numel(), device=owner.device) - first[owner]
        yield members, order[starts[members][owner] + slot], owner, slot


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, broadcasting the others.

    Not a matrix product on purpose: those pick their kernels by shape, and the last bit of a client's result would
    depend on who else is in the block.
    """
    return (a * b).sum(-1)
