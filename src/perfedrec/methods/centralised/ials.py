"""iALS: alternating least squares for implicit feedback (Hu, Koren and Volinsky, ICDM 2008; Rendle et al., RecSys
2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, normal
from perfedrec.core.scoring import Scoring
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows, block_rows
from perfedrec.methods.centralised.method import Method, Training

AT_ONCE = 1 << 21
"""Numbers in the matrices and vectors that are solved at once."""


class IALSSettings(Settings):
    """Options of iALS."""

    embedding_dim: int = Field(64, ge=1, description="length of the vectors")
    unobserved_weight: float = Field(0.09, gt=0, description="weight of a pair without interaction (alpha_0)")
    l2: float = Field(0.0015, gt=0, description="L2 on the vectors (lambda)")
    l2_exponent: float = Field(
        1.0, ge=0, description="how far L2 grows with the weight of all pairs of a user or item (nu; 0: not at all)"
    )
    init_scale: float = Field(0.01, gt=0, description="length of first item vectors, about")


@dataclass(frozen=True)
class Items:
    """``vectors`` [m, d] of the items, and ``gram`` [d, d], the sum of their outer products."""

    vectors: Tensor
    gram: Tensor

    @staticmethod
    def of(vectors: Tensor) -> Items:
        return Items(vectors, vectors.T @ vectors)


class IALS(Method):
    """Vectors ``w_u`` and ``h_i`` that minimise ``sum_(u,i) in S (w_u . h_i - 1)^2 + alpha_0 sum_u,i (w_u . h_i)^2 +
    lambda (sum_u (|I_u| + alpha_0 m)^nu |w_u|^2 + sum_i (|U_i| + alpha_0 n)^nu |h_i|^2)``; ``score = w_u . h_i``.

    An epoch solves for all users and then for all items. Users are solved for again when they are scored, so that new
    users are scored like others. Departs from Hu et al. in the L2 that depends on frequency, as Rendle et al. do.
    """

    Options = IALSSettings
    settings: IALSSettings
    trained = True
    item_based = True

    def init(self, data: Training, key: Key) -> Items:
        keys, d = key.spread(torch.arange(data.n_items, device=data.rows.items.device)), self.settings.embedding_dim
        return Items.of(normal(keys, d) * self.settings.init_scale / d**0.5)

    def epoch(self, state: Items, data: Training, key: Key) -> tuple[Items, float]:
        users = self._solved(data.rows, state, data.n_items)
        held = Items.of(users)  # the same with users and items exchanged
        items = Items.of(self._solved(transposed(data.rows, data.n_items), held, data.n_users))
        predicted = (users[data.rows.segments] * items.vectors[data.rows.items]).sum(1)
        everywhere = self.settings.unobserved_weight * (held.gram * items.gram).sum()
        return items, float(((predicted - 1).square().sum() + everywhere) / predicted.numel())

    def embedding(self, state: Items, data: Training, users: Tensor) -> Embedding:
        rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
        return Embedding(self._solved(rows, state, data.n_items), state.vectors)

    def scores(self, state: Items, data: Training, users: Tensor) -> Tensor:
        return self.scoring(state, data, users).dense()

    def scoring(self, state: Items, data: Training, users: Tensor) -> Scoring:
        own = self.embedding(state, data, users)
        return Scoring.product(own.users, own.items)

    def _solved(self, rows: Rows, other: Items, n_other: int) -> Tensor:
        """The vectors of one side, given those of the ``other`` side, of which ``rows`` has the interactions."""
        settings = self.settings
        weight = rows.counts + settings.unobserved_weight * n_other
        return least_squares(rows, other, settings.unobserved_weight, settings.l2 * weight**settings.l2_exponent)


def transposed(rows: Rows, n_items: int) -> Rows:
    """The same interactions with users and items exchanged."""
    order = torch.argsort(rows.items, stable=True)
    counts = torch.bincount(rows.items, minlength=n_items)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    everything = torch.arange(n_items, device=rows.items.device)
    return Rows(everything, offsets, rows.segments[order], rows.items[order])


def least_squares(rows: Rows, other: Items, weight: float, l2: Tensor) -> Tensor:
    """[B, d] the vectors ``(sum_i h_i h_i^T + weight sum_all h h^T + l2_u I)^-1 sum_i h_i`` of B users with L2 of their
    own, ``l2`` [B]: batches of users with about as many interactions are solved at once, by Cholesky factors."""
    d, counts = other.vectors.shape[1], rows.counts
    padded = torch.cat([other.vectors, other.vectors.new_zeros(1, d)])
    base, eye = weight * other.gram, torch.eye(d, device=l2.device)
    result = other.vectors.new_zeros(rows.n_users, d)
    order = torch.argsort(counts, descending=True, stable=True)
    while order.numel():
        width = int(counts[order[0]])
        size = max(AT_ONCE // (d * (width + d)), 1)
        users, order = order[:size], order[size:]
        places = torch.arange(width, device=l2.device)
        index = (rows.offsets[users][:, None] + places).clamp_(max=rows.items.numel() - 1)
        index = torch.where(places < counts[users][:, None], rows.items[index], padded.shape[0] - 1)
        own = padded[index]
        left = own.mT @ own + base + l2[users][:, None, None] * eye
        result[users] = torch.cholesky_solve(own.sum(1)[:, :, None], torch.linalg.cholesky(left))[:, :, 0]
    return result
