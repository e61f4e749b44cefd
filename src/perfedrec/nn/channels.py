"""Parts of networks whose users have a vector in each of three channels (MHCN, Yu et al., WWW 2021): gates, attention
over the channels, and how vectors agree with their neighbourhoods. The gradients are written out, so that few tables
are made on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from perfedrec.core.compiled import spread, usable
from perfedrec.core.products import inner_products
from perfedrec.nn.losses import softplus
from perfedrec.nn.segments import dot


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, matrices: Tensor, biases: Tensor) -> Tensor:
        weight = matrices.transpose(1, 2).flatten(0, 1)
        gates = inner_products(vectors, weight, biases.flatten(), "sigmoid").view(-1, *biases.shape)
        if _compiled(vectors, gates):
            from perfedrec.nn import kernels

            out = vectors.new_empty(len(matrices), *vectors.shape)
            _spread(kernels.gate, vectors, gates, out, n=len(vectors))
        else:
            out = vectors * gates.transpose(0, 1)
        ctx.save_for_backward(vectors, matrices, gates)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,), (vectors, matrices, gates) = grads, ctx.saved_tensors
        if _compiled(grad, vectors, gates):
            from perfedrec.nn import kernels

            slopes, of_vectors = torch.empty_like(gates), torch.empty_like(vectors)
            _spread(kernels.gate_back, grad, vectors, gates, slopes, of_vectors, n=len(vectors))
        else:
            slopes = grad.transpose(0, 1) * gates
            of_vectors = slopes.sum(1)
            slopes = slopes * vectors[:, None] * (1 - gates)
        flat = slopes.flatten(1)
        of_vectors += inner_products(flat, matrices.transpose(0, 1).flatten(1))
        of_matrices = inner_products(vectors.T, flat.T).view(vectors.shape[1], *gates.shape[1:]).transpose(0, 1)
        return of_vectors, of_matrices, slopes.sum(0)


def gated(vectors: Tensor, matrices: Tensor, biases: Tensor) -> Tensor:
    """[g, n, d] for each gate ``p o sigmoid(p W + b)`` of ``vectors`` p [n, d], by ``matrices`` W [g, d, d] and
    ``biases`` b [g, d]."""
    return cast(Tensor, _Gated.apply(vectors, matrices, biases))  # type: ignore[no-untyped-call]


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, channels: Tensor, vector: Tensor, simple: Tensor) -> Tensor:
        if _compiled(channels, vector, simple):
            from perfedrec.nn import kernels

            shares, mixed = simple.new_empty(len(channels), len(simple)), torch.empty_like(simple)
            _spread(kernels.attend, channels, vector, simple, shares, mixed, n=len(simple))
        else:
            shares = (channels @ vector).softmax(0)
            mixed = (shares[:, :, None] * channels).sum(0) + simple / 2
        ctx.save_for_backward(channels, vector, shares)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,), (channels, vector, shares) = grads, ctx.saved_tensors
        if _compiled(channels, vector, shares, grad):
            from perfedrec.nn import kernels

            of_channels = torch.empty_like(channels)
            parts = _spread(kernels.attend_back, channels, vector, shares, grad, of_channels, n=len(grad))
            of_vector = torch.from_numpy(sum(parts))
        else:
            slopes = dot(channels, grad)
            slopes = (shares * (slopes - (shares * slopes).sum(0)))[:, :, None]
            of_channels, of_vector = shares[:, :, None] * grad + slopes * vector, (slopes * channels).sum((0, 1))
        return of_channels, of_vector, grad / 2


def attended(channels: Tensor, vector: Tensor, simple: Tensor) -> Tensor:
    """Three ``channels`` p_c [3, n, d] mixed by ``softmax_c(p_c . v)``, one weight for each user and channel, for a
    ``vector`` v [d]; and half of ``simple`` [n, d]."""
    return cast(Tensor, _Attended.apply(channels, vector, simple))  # type: ignore[no-untyped-call]


class _Agreement(torch.autograd.Function):
    """The gradients come with the value."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, near: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        n, centres = near.shape[1], near.mean(1)
        if _compiled(vectors, near):
            from perfedrec.nn import kernels

            change, of_near, scores = torch.empty_like(near), torch.empty_like(near), near.new_empty(2, len(near), n)
            kernels.changes(*_arrays(vectors, near, centres, rows, columns, change, scores))
            slopes = scores.sigmoid() / n
            kernels.changes_back(*_arrays(vectors, centres, rows, columns, slopes, change, of_near))
        else:
            places = torch.arange(len(near), device=near.device)[:, None, None], rows[:, :, None], columns[:, None]
            change = near[places] - near
            scores = torch.stack([dot(vectors, change), dot(centres[:, None], change)])
            local, whole = (scores.sigmoid() / n)[..., None]
            of_change = local * vectors + whole * centres[:, None]
            of_near = (whole * change).mean(1, keepdim=True) - of_change
            of_near[places] += of_change
            change = local * change
        ctx.save_for_backward(change, of_near)
        return softplus(scores).sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_vectors, of_near = ctx.saved_tensors
        return grads[0] * of_vectors, grads[0] * of_near, None, None


def agreement(vectors: Tensor, near: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The mean over n users, and sum over c channels, of ``softplus(p z' - p z) + softplus(z' h - z h)``: p are their
    ``vectors`` [c, n, d], z those of their neighbourhoods, ``near`` [c, n, d], h is the mean of these, and z' are they
    in another order of ``rows`` [c, n] and ``columns`` [c, d]."""
    return cast(Tensor, _Agreement.apply(vectors, near, rows, columns))  # type: ignore[no-untyped-call]


def _compiled(*tensors: Tensor) -> bool:
    return usable(*(each.detach() for each in tensors)) and all(each.dtype == torch.float32 for each in tensors)


def _arrays(*tensors: Tensor) -> tuple[NDArray[Any], ...]:
    return tuple(each.detach().numpy() for each in tensors)


def _spread(kernel: Callable[..., Any], *tensors: Tensor, n: int) -> list[Any]:
    """What a ``kernel`` returns for parts of ``n`` rows."""
    return spread(partial(kernel, *_arrays(*tensors)), n, n)
