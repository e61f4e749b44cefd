"""Linear layers by the products of :mod:`perfedrec.core.products`, with a gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perfedrec.core.products import inner_products


class _Products(torch.autograd.Function):
    """``X W^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return inner_products(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x = inner_products(grad, weight.T) if ctx.needs_input_grad[0] else None
        return of_x, _sums_of_products(grad, x) if ctx.needs_input_grad[1] else None


def _sums_of_products(first: Tensor, second: Tensor) -> Tensor:
    """``A^T B`` [k, l] of two matrices [n, k] and [n, l]. What is multiplied first is copied: it is the smaller one."""
    if first.shape[1] <= second.shape[1]:
        return inner_products(first.T, second.T)
    return inner_products(second.T, first.T).T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` [..., out] of ``x`` [..., in], with ``weight`` W [out, in] and ``bias`` b [out].

    The last bit of a row depends on the others, as in torch. What a client computes goes by
    :func:`perfedrec.nn.segments.dot`.
    """
    found = cast(Tensor, _Products.apply(x.flatten(0, -2), weight))  # type: ignore[no-untyped-call]
    return (found if bias is None else found + bias).view(*x.shape[:-1], weight.shape[0])
