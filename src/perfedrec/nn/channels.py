"""Parts of networks whose users have a vector in each of three channels (MHCN, Yu et al., WWW 2021): gates, attention
over the channels, and how vectors agree with their neighbourhoods. The gradients are written out, so that few tables
are made on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from perfedrec.core.compiled import FIXED_PARTS, spread, usable
from perfedrec.core.products import inner_products
from perfedrec.nn.losses import softplus
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.segments import dot
from perfedrec.nn.social import UserGraph


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


@dataclass(frozen=True)
class Graphs:
    """What vectors are passed along: ``channels`` has the three graphs of users, one after the other; ``to_users`` and
    ``to_items`` are the interactions, divided by the degrees of those who receive."""

    channels: UserGraph
    to_users: Bipartite
    to_items: Bipartite


def _mixed(channels: Tensor, vector: Tensor, simple: Tensor) -> tuple[Tensor, Tensor]:
    """Three ``channels`` p_c [3, n, d] mixed by ``softmax_c(p_c . v)``, one weight for each user and channel, and half
    of ``simple`` [n, d]; and these weights, [3, n]."""
    if _compiled(channels, vector, simple):
        from perfedrec.nn import kernels

        shares, mixed = simple.new_empty(len(channels), len(simple)), torch.empty_like(simple)
        _spread(kernels.attend, channels, vector, simple, shares, mixed, n=len(simple))
    else:
        shares = (channels @ vector).softmax(0)
        mixed = (shares[:, :, None] * channels).sum(0) + simple / 2
    return mixed, shares


def _mixed_back(channels: Tensor, vector: Tensor, shares: Tensor, grad: Tensor, of_channels: Tensor) -> Tensor:
    """Add the gradient of the ``channels`` to ``of_channels``, and return that of the ``vector``."""
    if _compiled(channels, vector, shares, grad):
        from perfedrec.nn import kernels

        given = channels, vector, shares, grad, of_channels
        parts = _spread(kernels.attend_back, *given, n=len(grad), parts=FIXED_PARTS)
        return torch.from_numpy(sum(parts))
    slopes = dot(channels, grad)
    slopes = (shares * (slopes - (shares * slopes).sum(0)))[:, :, None]
    of_channels.add_(shares[:, :, None] * grad).add_(slopes * vector)
    return (slopes * channels).sum((0, 1))


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, starts: Tensor, items: Tensor, vector: Tensor, graphs: Graphs, n_layers: int
    ) -> tuple[Tensor, Tensor]:
        layer, kept, share = (starts[:3], starts[3], items), [], 1 / (n_layers + 1)
        totals = [each.clone() for each in layer]
        for _ in range(n_layers):
            channels, simple, items = layer
            mixed, shares = _mixed(channels, vector, simple)
            kept += [channels, shares]
            layer = (
                graphs.channels.matrix.times(channels.flatten(0, 1)).view_as(channels),
                graphs.to_users.by_user.times(items),
                graphs.to_items.by_item.times(mixed),
            )
            for total, each in zip(totals, layer, strict=True):
                total += each
        channels, simple, items = totals
        mixed, shares = _mixed(channels, vector * share, simple)
        ctx.save_for_backward(vector, *kept, channels, shares)
        ctx.graphs = graphs
        return mixed.mul_(share), items.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graphs, (vector, *kept) = ctx.graphs, ctx.saved_tensors
        share = 2 / len(kept)
        of_mixed, of_items = (share * each for each in grads)
        of_channels, of_simple = torch.zeros_like(kept[-2]), of_mixed / 2
        of_vector = share * _mixed_back(kept[-2], vector * share, kept[-1], of_mixed, of_channels)
        layer = totals = of_channels, of_simple, of_items
        for channels, shares in reversed([*zip(kept[:-2:2], kept[1:-2:2], strict=True)]):
            of_channels, of_simple, of_items = layer
            of_mixed = graphs.to_items.by_user.times(of_items)
            layer = (
                graphs.channels.transpose.times(of_channels.flatten(0, 1)).view_as(of_channels),
                of_mixed / 2,
                graphs.to_users.by_item.times(of_simple),
            )
            for total, each in zip(totals, layer, strict=True):
                each += total
            of_vector += _mixed_back(channels, vector, shares, of_mixed, layer[0])
        return torch.cat([layer[0], layer[1][None]]), layer[2], of_vector, None, None


def passed(starts: Tensor, items: Tensor, vector: Tensor, graphs: Graphs, n_layers: int) -> tuple[Tensor, Tensor]:
    """Vectors of users [n, d] and ``items`` [m, d] after ``n_layers``, from three channels and the simple one in
    ``starts`` [4, n, d]. A user's channels ``p_c`` are mixed by ``softmax_c(p_c . v)``, for a ``vector`` v [d], and
    half of the simple one is added. A layer passes each channel along its own graph, the items to the simple one, and
    what is mixed to the items. All of them end as the means of layers 0 to ``n_layers``, of which users are mixed."""
    return cast(tuple[Tensor, Tensor], _Passed.apply(starts, items, vector, graphs, n_layers))  # type: ignore[no-untyped-call]


class _Agreement(torch.autograd.Function):
    """The gradients come with the value."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, near: Tensor, rows: Tensor, columns: Tensor, weight: float) -> Tensor:
        share, centres = weight / near.shape[1], near.mean(1)
        if _compiled(vectors, near):
            from perfedrec.nn import kernels

            scores, of_vectors, of_near = near.new_empty(2, *rows.shape), torch.empty_like(near), torch.empty_like(near)
            given = _arrays(vectors, near, centres, rows, columns)
            kernels.agree(*given, share, *_arrays(scores), _arrays(of_vectors, of_near))
        else:
            places = torch.arange(len(near), device=near.device)[:, None, None], rows[:, :, None], columns[:, None]
            change = near[places] - near
            scores = torch.stack([dot(vectors, change), dot(centres[:, None], change)])
            local, whole = (share * scores.sigmoid())[..., None]
            of_change = local * vectors + whole * centres[:, None]
            of_near = (whole * change).mean(1, keepdim=True) - of_change
            of_near[places] += of_change
            of_vectors = local * change
        ctx.save_for_backward(of_vectors, of_near)
        return share * softplus(scores).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_vectors, of_near = ctx.saved_tensors
        if grads[0] != 1:  # it is 1 for a term of a loss, and a pass over both tables costs a tenth of making them
            of_vectors, of_near = grads[0] * of_vectors, grads[0] * of_near
        return of_vectors, of_near, None, None, None


def agreement(vectors: Tensor, near: Tensor, rows: Tensor, columns: Tensor, weight: float = 1.0) -> Tensor:
    """A ``weight`` times the mean over n users, and sum over c channels, of ``softplus(p z' - p z) + softplus(z' h - z
    h)``: p are their ``vectors`` [c, n, d], z those of their neighbourhoods, ``near`` [c, n, d], h is the mean of
    these, and z' are they in another order of ``rows`` [c, n] and ``columns`` [c, d]."""
    return cast(Tensor, _Agreement.apply(vectors, near, rows, columns, weight))  # type: ignore[no-untyped-call]


def _compiled(*tensors: Tensor) -> bool:
    return usable(*(each.detach() for each in tensors)) and all(each.dtype == torch.float32 for each in tensors)


def _arrays(*tensors: Tensor) -> tuple[NDArray[Any], ...]:
    return tuple(each.detach().numpy() for each in tensors)


def _spread(kernel: Callable[..., Any], *tensors: Tensor, n: int, parts: int = 0) -> list[Any]:
    """What a ``kernel`` returns for parts of ``n`` rows; see :func:`perfedrec.core.compiled.spread`."""
    return spread(partial(kernel, *_arrays(*tensors)), n, n, parts)
