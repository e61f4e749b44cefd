"""Graph propagation: LightGCN on the whole graph, and LightGCN as one client computes it on its star graph.

Symbols: ``p_u`` and ``q_i`` are the layer-0 vectors of users and items, ``I_u`` are the items of user u, ``N_i`` are
the users of item i, and ``c_ui = 1 / sqrt(|I_u| |N_i|)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from perfedrec.core.compiled import LIGHT, spread, usable
from perfedrec.core.keys import Key, uniform
from perfedrec.core.types import Rows
from perfedrec.nn.segments import segment_sum


def power(degrees: NDArray[Any], exponent: float) -> NDArray[np.float64]:
    """``degrees ** exponent``, and 0 where the degree is 0."""
    return np.where(degrees > 0, degrees.clip(min=1).astype(np.float64) ** exponent, 0.0)


def diffusion_steps(
    by_user: sparse.csr_array, alpha: float, beta: float, gamma: float
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """``D_i^-alpha R^T`` [m, n] and ``D_u^-gamma R D_i^-beta`` [n, m], from ``by_user`` R [n, m] with entries of 1: the
    steps from items to their users, and on to the items of these. In RP3beta (Paudel et al., ACM TiiS 2016) ``gamma``
    is ``alpha``."""
    users, items = np.diff(by_user.indptr), np.bincount(by_user.indices, minlength=by_user.shape[1])
    start, end = (sparse.diags_array(power(items, -exponent)) for exponent in (alpha, beta))
    back = sparse.csr_array(start @ by_user.T)
    return back, sparse.csr_array(sparse.diags_array(power(users, -gamma)) @ by_user @ end)


@dataclass(frozen=True)
class Star:
    """Propagation on star graphs: an affine function of what the client can change.

    The final user vector is ``e_u = own p_u + sum_i edge_ui q_i + user_shift_u``, and the final item vector is
    ``e_i = scale_i q_i + shift_i``.

    ``edge`` [R] is for the rows of the block, ``user_shift`` [B, d] for its users. ``scale`` (a number, or [m, 1]) and
    ``shift`` [m, d] are for all items.
    """

    own: float
    edge: Tensor
    user_shift: Tensor | None = None
    scale: Tensor | float = 1.0
    shift: Tensor | None = None

    def users(self, vectors: Tensor, rows: Tensor, segments: Tensor) -> Tensor:
        """[B, d] final user vectors.

        ``vectors`` [B, d] are the layer-0 vectors of the users, ``rows`` [R, d] those of their items, and ``segments``
        [R] (ascending) say which user a row belongs to.
        """
        result = self.own * vectors + segment_sum(self.edge[:, None] * rows, segments, vectors.shape[0])
        return result if self.user_shift is None else result + self.user_shift

    def items(self, rows: Tensor, items: Tensor | None = None) -> Tensor:
        """[T, d] final item vectors from the layer-0 ``rows`` [T, d] of ``items`` [T] (``None``: of all items)."""
        scale, shift = self.scale, self.shift
        if items is not None:
            scale = scale.index_select(0, items) if isinstance(scale, Tensor) else scale
            shift = None if shift is None else shift.index_select(0, items)
        scaled = rows if isinstance(scale, float) and scale == 1.0 else scale * rows
        return scaled if shift is None else scaled + shift


HALVES = (0.5, 0.5)
"""The exponents of the degrees of users and of items in LightGCN's normalised adjacency."""


def edge_weights(rows: Rows, item_degrees: Tensor, exponents: tuple[float, float] = HALVES) -> Tensor:
    """[R] LightGCN's ``c_ui = 1 / sqrt(|I_u| |N_i|)`` for the rows of a block, or with other ``exponents`` a and b
    ``1 / (|I_u|^a |N_i|^b)``."""
    if exponents == HALVES and item_degrees.dtype == torch.float32 and usable(rows.offsets, rows.items, item_degrees):
        from perfedrec.nn import kernels

        weights = item_degrees.new_empty(rows.items.numel())
        kernels.edge_weights(*(each.numpy() for each in (rows.offsets, rows.items, item_degrees, weights)))
        return weights
    users, items = rows.counts.clamp(min=1).to(torch.float32)[rows.segments], item_degrees[rows.items].clamp(min=1)
    if exponents == HALVES:
        return (users * items).rsqrt()
    return _powers(users, -exponents[0]) * _powers(items, -exponents[1])


def _powers(degrees: Tensor, exponent: float) -> Tensor:
    """``degrees ** exponent``. In torch the last digit of a power depends on its place in the tensor, and so would what
    a client sends on who else is in its block."""
    values, places = degrees.unique(return_inverse=True)
    powers: Tensor = values.new_tensor([value**exponent for value in values.tolist()])
    return powers[places]


def weighted_sums(table: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    """[B, d] for each user the sum of its items' rows of a ``table`` [m, d], times the ``weights`` [R]."""
    if table.dtype != torch.float32 or not usable(table, rows.items, rows.offsets, weights):
        return segment_sum(weights[:, None] * table.index_select(0, rows.items), rows.segments, rows.n_users)
    from perfedrec.nn import kernels

    sums = table.new_zeros(rows.n_users, table.shape[1])
    given = (each.numpy() for each in (table, rows.offsets, rows.items, weights, sums))
    spread(partial(kernels.weighted_sums, *given), rows.n_users, rows.items.numel() // LIGHT)
    return sums


def lightgcn_star(rows: Rows, item_degrees: Tensor, sums: Tensor | None, n_layers: int) -> Star:
    """LightGCN (He et al., SIGIR 2020, eq. 3 and 4) as a client computes it.

    The client itself computes ``u^(k+1) = sum_i c_ui i^(k)``. The neighbour sums ``i^(k+1) = sum_v c_vi v^(k)`` come
    from the neighbourhood service and are constants for the client. The final vectors are the means of layers 0 to K.

    ``sums`` [2, m, d] are ``sum_{k=1}^{K-1} i^(k) / (K + 1)``, the part that enters the final vector of a user, and
    ``sum_{k=1}^{K} i^(k) / (K + 1)``, the part that enters the final vector of an item. Without them (``None``), the
    final vector of an item is its layer 0, and that of a user is the mean of layers 0 and 1. ``item_degrees`` [m] are
    the numbers of users of all items, and ``n_layers`` is K.
    """
    weights = edge_weights(rows, item_degrees)
    if n_layers == 0:
        return Star(1.0, torch.zeros_like(weights))
    if sums is None:
        return Star(0.5, weights / 2)
    share = 1.0 / (n_layers + 1)
    return Star(share, weights * share, weighted_sums(sums[0], rows, weights), share, sums[1])


def spectral_star(rows: Rows, item_degrees: Tensor) -> Star:
    """The propagation that goes with spectral pre-training.

    ``e_u = p_u + sum_i q_i / sqrt(d_u d_i)`` and ``e_i = sqrt(d_i) q_i``, where ``d_u`` and ``d_i`` are the degrees of
    users and items. If ``q`` are the leading right singular vectors of ``D_u^-1/2 R D_i^-1/2`` and ``p`` is 0, the
    scores are those of the truncated spectral filter.
    """
    return Star(
        1.0, edge_weights(rows, item_degrees), scale=item_degrees.clamp(min=1).to(torch.float32).sqrt()[:, None]
    )


def diffusion_star(rows: Rows, item_degrees: Tensor, alpha: float, beta: float) -> Star:
    """Diffusion on the graph of items with a factor of low rank: ``e_u = sum_i d_i^(1/2 - alpha) f_i`` and ``e_i =
    d_i^(1/2 - beta) f_i``.

    With ``F F^T = N^T N`` for ``N = D_u^-1/2 R D_i^-1/2`` the scores are ``sum_i sum_v d_i^-alpha / (d_v d_j^beta)``
    over the user's items i and the users v who have both i and j.
    """
    degrees = item_degrees.clamp(min=1).to(torch.float32)
    return Star(1.0, degrees[rows.items] ** (0.5 - alpha), scale=degrees[:, None] ** (0.5 - beta))


@dataclass(frozen=True)
class Adjacency:
    """A sparse matrix [n, m], stored by rows.

    ``starts`` [n] are the places where the entries of each row start; ``columns`` [E] and ``values`` [E] are the
    entries.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Adjacency:
        """From entries in any order; each pair of row and column occurs at most once."""
        order = (rows * shape[1] + columns).argsort()
        counts = torch.bincount(rows, minlength=shape[0])
        return Adjacency(counts.cumsum(0) - counts, columns[order], values[order])

    @property
    def degrees(self) -> Tensor:
        """[n] the number of entries of each row."""
        return torch.diff(self.starts, append=self.starts.new_tensor([self.columns.numel()]))

    def weighted(self, of_rows: Tensor, of_columns: Tensor) -> Adjacency:
        """The same entries with the products of the weights of their rows [n] and columns [m] as values."""
        return replace(self, values=of_rows.repeat_interleave(self.degrees) * of_columns[self.columns])

    def times(self, vectors: Tensor) -> Tensor:
        """[n, d] the product with ``vectors`` [m, d].

        One thread computes the whole sum of a row, so that the result does not depend on the number of threads. There
        is no gradient here: torch would prepare for its own.
        """
        weights = self.values.to(vectors.dtype)
        return functional.embedding_bag(
            self.columns, vectors.detach(), self.starts, mode="sum", per_sample_weights=weights
        )


@dataclass(frozen=True)
class Bipartite:
    """The normalised adjacency ``N`` [n, m] of a user-item graph (``by_user``), and its transpose (``by_item``)."""

    by_user: Adjacency
    by_item: Adjacency

    @staticmethod
    def of(users: Tensor, items: Tensor, n_users: int, n_items: int) -> Bipartite:
        """From edges ``users`` [E] and ``items`` [E] in any order, each at most once; these edges give the degrees."""
        degrees = torch.bincount(users, minlength=n_users)[users] * torch.bincount(items, minlength=n_items)[items]
        weights = degrees.to(torch.float32).rsqrt()
        shape = (n_users, n_items)
        return Bipartite(Adjacency.of(users, items, weights, shape), Adjacency.of(items, users, weights, shape[::-1]))

    def normalised(self, exponents: tuple[float, float]) -> Bipartite:
        """The same graph as ``D_u^-a R D_i^-b``, for ``exponents`` a and b of the degrees."""
        if exponents == HALVES:
            return self
        users, items = (each.degrees.clamp(min=1).to(torch.float32) for each in (self.by_user, self.by_item))
        of_users, of_items = users ** -exponents[0], items ** -exponents[1]
        return Bipartite(self.by_user.weighted(of_users, of_items), self.by_item.weighted(of_items, of_users))

    def thinned(self, share: float, key: Key) -> Bipartite:
        """The same graph without a random ``share`` of its edges, below 1. The weights of the others stay, divided by
        what is left (1 - share). The ``key`` decides of each edge, whatever others there are."""
        n_items = self.by_item.starts.numel()
        parts = []
        for side in (self.by_user, self.by_item):
            rows = torch.repeat_interleave(side.degrees)
            edges = rows * n_items + side.columns if side is self.by_user else side.columns * n_items + rows
            kept = uniform(key.spread(edges), 1).squeeze(1) >= share
            parts.append(replace(side, values=side.values * kept / (1 - share)))
        return Bipartite(*parts)

    def to_users(self, item_vectors: Tensor) -> Tensor:
        """``N X``: [n, d] from [m, d]."""
        return product(self.by_user, self.by_item, item_vectors)

    def to_items(self, user_vectors: Tensor) -> Tensor:
        """``N^T X``: [m, d] from [n, d]."""
        return product(self.by_item, self.by_user, user_vectors)

    def passed(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the next layer, of ``users`` [n, d] and ``items`` [m, d]."""
        return self.to_users(items), self.to_items(users)


class _Product(torch.autograd.Function):
    """``A X``. The transpose of ``A`` is given too, so that the gradient is also a sparse product."""

    @staticmethod
    def forward(ctx: Any, matrix: Adjacency, transpose: Adjacency, vectors: Tensor) -> Tensor:
        ctx.transpose = transpose
        return matrix.times(vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transpose.times(grads[0])


def product(matrix: Adjacency, transpose: Adjacency, vectors: Tensor) -> Tensor:
    """``A X`` [n, d] of ``vectors`` [m, d], with a gradient, from a ``matrix`` A [n, m] and its ``transpose``."""
    return cast(Tensor, _Product.apply(matrix, transpose, vectors))  # type: ignore[no-untyped-call]


def lightgcn(graph: Bipartite, users: Tensor, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """LightGCN on the whole graph (He et al., SIGIR 2020): final vectors of users [n, d] and of items [m, d].

    They are the means of layers 0 to ``n_layers``; ``users`` [n, d] and ``items`` [m, d] are layer 0.
    """
    total_users, total_items = users, items
    for _ in range(n_layers):
        users, items = graph.passed(users, items)
        total_users, total_items = total_users + users, total_items + items
    return total_users / (n_layers + 1), total_items / (n_layers + 1)
