"""Sums over the rows of each user and their mirror, differentiable and with the same result in any block."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(segments)
        return values.new_zeros(n, *values.shape[1:]).index_add_(0, segments, values)

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
        return grads[0].new_zeros(ctx.n, *grads[0].shape[1:]).index_add_(0, segments, grads[0]), None


def segment_sum(values: Tensor, segments: Tensor, n: int) -> Tensor:
    """[n, ...] sums of ``values`` [R, ...] by ``segments`` [R]; the rows of a segment are added in their order."""
    return cast(Tensor, _SegmentSum.apply(values, segments, n))  # type: ignore[no-untyped-call]


def expand(values: Tensor, segments: Tensor) -> Tensor:
    """[R, ...] the row of ``values`` [n, ...] that each segment index names."""
    return cast(Tensor, _Expand.apply(values, segments))  # type: ignore[no-untyped-call]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, broadcasting the others.

    Not a matrix product on purpose: those pick their kernels by shape, and the last bit of a client's result would
    depend on who else is in the block.
    """
    return (a * b).sum(-1)
