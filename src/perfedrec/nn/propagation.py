"""Graph propagation: LightGCN on the whole graph, and the same seen from one client's star graph.

Symbols: ``p_u`` and ``q_i`` are the layer-0 vectors of users and items, ``I_u`` the items of user u, ``N_i`` the users
of item i, ``c_ui = 1 / sqrt(|I_u| |N_i|)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.types import Rows
from perfedrec.nn.segments import segment_sum


@dataclass(frozen=True)
class Star:
    """Propagation on star graphs, which is affine in what the client can change.

    User vector ``e_u = own p_u + sum_i edge_ui q_i + user_shift_u`` and item vector ``e_i = scale_i q_i + shift_i``.

    ``edge`` [R] for the block's rows; ``user_shift`` [B, d]; ``scale`` a number or [m, 1], ``shift`` [m, d] for items.
    """

    own: float
    edge: Tensor
    user_shift: Tensor | None = None
    scale: Tensor | float = 1.0
    shift: Tensor | None = None

    def users(self, vectors: Tensor, rows: Tensor, segments: Tensor) -> Tensor:
        """[B, d] final user vectors from layer-0 vectors [B, d] and the rows [R, d] of the users' own items."""
        result = self.own * vectors + segment_sum(self.edge[:, None] * rows, segments, vectors.shape[0])
        return result if self.user_shift is None else result + self.user_shift

    def items(self, rows: Tensor, items: Tensor | None = None) -> Tensor:
        """[T, d] final item vectors of the layer-0 ``rows`` of ``items`` [T] (all items when ``None``)."""
        scale, shift = self.scale, self.shift
        if items is not None:
            scale = scale.index_select(0, items) if isinstance(scale, Tensor) else scale
            shift = None if shift is None else shift.index_select(0, items)
        scaled = rows if isinstance(scale, float) and scale == 1.0 else scale * rows
        return scaled if shift is None else scaled + shift


def edge_weights(rows: Rows, item_degrees: Tensor) -> Tensor:
    """[R] LightGCN's ``c_ui = 1 / sqrt(|I_u| |N_i|)`` for the rows of a block."""
    counts = rows.counts.clamp(min=1).to(torch.float32)
    return (counts[rows.segments] * item_degrees[rows.items].clamp(min=1)).rsqrt()


def lightgcn_star(rows: Rows, item_degrees: Tensor, sums: Tensor | None, n_layers: int) -> Star:
    """LightGCN (He et al., SIGIR 2020, eq. 3 and 4) as a client computes it.

    ``u^(k+1) = sum_i c_ui i^(k)`` is local; ``i^(k+1) = sum_v c_vi v^(k)`` comes as neighbour sums from the
    neighbourhood service and is constant to the client. The final vectors are the means of layers 0 to K.

    ``sums`` [2, m, d] are ``sum_{k=1}^{K-1} i^(k) / (K + 1)`` and ``sum_{k=1}^{K} i^(k) / (K + 1)``: what a user's and
    what an item's final vector takes from them. Without them (``None``) an item keeps layer 0 alone, and a user the
    mean of layers 0 and 1.
    """
    weights = edge_weights(rows, item_degrees)
    if n_layers == 0:
        return Star(1.0, torch.zeros_like(weights))
    if sums is None:
        return Star(0.5, weights / 2)
    share = 1.0 / (n_layers + 1)
    below = weights[:, None] * sums[0].index_select(0, rows.items)
    return Star(share, weights * share, segment_sum(below, rows.segments, rows.n_users), share, sums[1])


def spectral_star(rows: Rows, item_degrees: Tensor) -> Star:
    """The scoring form of spectral pre-training: ``e_u = p_u + sum_i q_i / sqrt(d_u d_i)``, ``e_i = sqrt(d_i) q_i``.

    With ``q`` the leading right singular vectors of ``D_u^-1/2 R D_i^-1/2`` and ``p = 0`` these are the scores of the
    truncated spectral filter.
    """
    return Star(
        1.0, edge_weights(rows, item_degrees), scale=item_degrees.clamp(min=1).to(torch.float32).sqrt()[:, None]
    )


@dataclass(frozen=True)
class Adjacency:
    """A sparse matrix [n, m] by rows: where each one's entries start, ``starts`` [n], their ``columns`` [E] and
    ``values`` [E]."""

    starts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Adjacency:
        """From entries in any order, each place at most once."""
        order = (rows * shape[1] + columns).argsort()
        counts = torch.bincount(rows, minlength=shape[0])
        return Adjacency(counts.cumsum(0) - counts, columns[order], values[order])

    def times(self, vectors: Tensor) -> Tensor:
        """[n, d] the product with ``vectors`` [m, d]; a row's sum is one thread's, so that all machines round alike."""
        return functional.embedding_bag(
            self.columns, vectors, self.starts, mode="sum", per_sample_weights=self.values.to(vectors.dtype)
        )


@dataclass(frozen=True)
class Bipartite:
    """The normalised adjacency ``N`` [n, m] of a user-item graph, ``by_user``, and its transpose, ``by_item``."""

    by_user: Adjacency
    by_item: Adjacency

    @staticmethod
    def of(users: Tensor, items: Tensor, n_users: int, n_items: int) -> Bipartite:
        """From edges, ``users`` [E] and ``items`` [E], each at most once and in any order; degrees are theirs."""
        degrees = torch.bincount(users, minlength=n_users)[users] * torch.bincount(items, minlength=n_items)[items]
        weights = degrees.to(torch.float32).rsqrt()
        shape = (n_users, n_items)
        return Bipartite(Adjacency.of(users, items, weights, shape), Adjacency.of(items, users, weights, shape[::-1]))

    def to_users(self, item_vectors: Tensor) -> Tensor:
        """``N X``: [n, d] from [m, d]."""
        return cast(Tensor, _Product.apply(self.by_user, self.by_item, item_vectors))  # type: ignore[no-untyped-call]

    def to_items(self, user_vectors: Tensor) -> Tensor:
        """``N^T X``: [m, d] from [n, d]."""
        return cast(Tensor, _Product.apply(self.by_item, self.by_user, user_vectors))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """``A X`` with its transpose at hand, so that the gradient is a sparse product as well."""

    @staticmethod
    def forward(ctx: Any, matrix: Adjacency, transpose: Adjacency, vectors: Tensor) -> Tensor:
        ctx.transpose = transpose
        return matrix.times(vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transpose.times(grads[0])


def lightgcn(graph: Bipartite, users: Tensor, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """LightGCN on a whole graph: final vectors [n, d] and [m, d], the means of layers 0 to ``n_layers``."""
    total_users, total_items = users, items
    for _ in range(n_layers):
        users, items = graph.to_users(items), graph.to_items(users)
        total_users, total_items = total_users + users, total_items + items
    return total_users / (n_layers + 1), total_items / (n_layers + 1)
