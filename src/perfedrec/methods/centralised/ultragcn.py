"""UltraGCN: a loss in place of propagation (Mao et al., CIKM 2021)."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.neighbours import Similarity, nearest
from perfedrec.methods.centralised.vectors import (
    Batch,
    VectorMethod,
    VectorSettings,
    shared_negatives,
    taken_at_once,
)
from perfedrec.nn.losses import softplus
from perfedrec.nn.segments import dot


class UltraGCNSettings(VectorSettings):
    """Options of UltraGCN."""

    batch_size: int = Field(1024, ge=2, description="interactions per step")
    n_negatives: int = Field(500, ge=1, description="random items of a batch that its users have as negatives")
    negative_weight: float = Field(100.0, ge=0, description="weight of the mean over negatives beside a positive")
    plain_weight: float = Field(
        1.0, ge=0, description="weight of the plain sum: 1 in the paper, almost 0 in its authors' configurations"
    )
    constraint: float = Field(1.0, ge=0, description="lambda, weight of the constraint between users and items")
    item_constraint: float = Field(1.0, ge=0, description="gamma, weight of the constraint between items")
    n_neighbours: int = Field(10, ge=1, description="K, number of similar items that are kept for each item")


class UltraGCN(VectorMethod):
    """``score_ui = p_u . q_i``, trained with three sums of cross-entropies over the interactions (u, i) and negatives
    (u, j), as means over a batch:

    - ``-log s(p_u . q_i) - log s(-p_u . q_j)``, the plain sum;
    - the same times ``beta_ui = sqrt((d_u + 1) / (d_i + 1)) / d_u`` (equations 6 to 8), weight ``lambda``;
    - ``-w_ik log s(p_u . q_k)`` for the K items k with the greatest ``w_ik = G_ik / (g_i - G_ii) sqrt(g_i / g_k)``
      (equations 10 to 12), with ``G = R^T R`` and ``g_i = sum_k G_ik``, weight ``gamma``.

    Departs from the paper: the users of a batch share its negatives, without those that a user has; the mean over them
    has a weight, in place of their number; the plain sum has a weight, as in the authors' code.
    """

    Options = UltraGCNSettings
    settings: UltraGCNSettings

    def begin(self, users: Tensor, items: Tensor, data: Training, key: Key) -> None:
        self.similar = self.once(data, lambda data: similar_items(data, self.settings.n_neighbours))

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings, similar = self.settings, self.similar
        own, degrees = data.rows.counts[batch.users].to(users.dtype), data.item_degrees.to(users.dtype)
        constraint = settings.constraint * (own + 1).sqrt() / own
        negatives, outside = shared_negatives(batch, data, settings.n_negatives)
        rows, places = block_rows(similar.offsets, similar.columns, batch.positives)
        taken = taken_at_once(items, batch.positives, negatives, batch.negatives, rows.items)
        user = users.index_select(0, batch.users)

        plain, popular = settings.plain_weight, (degrees + 1).rsqrt()
        positive = (plain + constraint * popular[batch.positives]) * softplus(-dot(user, taken[0]))
        weights = (plain + constraint[:, None] * popular[negatives]) * outside
        negative = (weights * functional.softplus(user @ taken[1].T)).sum(1) / outside.sum(1).clamp(min=1)
        related = similar.values[places] * softplus(-dot(user[rows.segments], taken[3]))
        total: Tensor = positive.sum() + settings.negative_weight * negative.sum()
        squares = user.square().sum() + taken[0].square().sum() + taken[2].square().sum()
        total = total + settings.item_constraint * related.sum() + 0.5 * settings.l2 * squares
        return total / batch.users.numel()


def similar_items(data: Training, n_neighbours: int) -> Similarity:
    """``w_ik`` of :class:`UltraGCN` for the ``n_neighbours`` best k of each item i (more where some are equal)."""
    sums = data.matrix.T @ data.matrix.sum(1)  # g
    rest = sums - data.item_degrees.cpu().numpy()  # an item whose users have no other item has no neighbours
    left = sparse.diags_array(np.sqrt(sums) / np.where(rest > 0, rest, 1.0)) @ data.matrix.T
    right = data.matrix @ sparse.diags_array(1 / np.sqrt(sums.clip(min=1)))
    found = Similarity.of(nearest(sparse.csr_array(left), sparse.csr_array(right), n_neighbours))
    device = data.rows.items.device
    return Similarity(found.offsets.to(device), found.columns.to(device), found.values.to(device))
