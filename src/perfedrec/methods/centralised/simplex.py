"""SimpleX: a cosine contrastive loss with many negatives (Mao et al., CIKM 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, normal
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import (
    Batch,
    ProductMethod,
    Vectors,
    VectorSettings,
    batches,
    shared_negatives,
    taken_at_once,
)
from perfedrec.nn.segments import dot, segment_sum
from perfedrec.nn.views import thinned


class SimpleXSettings(VectorSettings):
    """Options of SimpleX."""

    batch_size: int = Field(1024, ge=2, description="interactions per step")
    n_negatives: int = Field(500, ge=1, description="random items of a batch that its users have as negatives")
    negative_weight: float = Field(100.0, ge=0, description="w, weight of the mean over negatives beside a positive")
    margin: float = Field(0.5, ge=-1, le=1, description="m, the cosine above which a negative counts")
    gamma: float = Field(
        0.5, ge=0, le=1, description="g, weight of a user's own vector; the mean of its items has the rest"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the numbers of a user's unit vector that a step leaves out"
    )


@dataclass(frozen=True)
class MappedVectors(Vectors):
    """Vectors, and the ``matrix`` [d, d] by which the mean of a user's items is mapped."""

    matrix: Tensor | None = None


class SimpleX(ProductMethod):
    """``score_ui = cos(h_u, q_i)`` with ``h_u = g p_u + (1 - g) V mean_{k in I_u} q_k`` (aggregation by average
    pooling), trained with the cosine contrastive loss ``1 - cos(h_u, q_i) + w mean_j max(0, cos(h_u, q_j) - m)`` over
    the negatives j.

    Departs from the paper: the users of a batch share its negatives, without those that a user has; all items of a user
    are pooled, not a limited number. ``dropout`` is that of the authors' code.
    """

    Options = SimpleXSettings
    settings: SimpleXSettings

    def init(self, data: Training, key: Key) -> MappedVectors:
        start, d, device = super().init(data, key), self.settings.embedding_dim, data.rows.items.device
        matrix = normal(key.fold("matrix").spread(torch.arange(d, device=device)), d) * d**-0.5
        zeros = torch.zeros(data.n_users + data.n_items + d, d, device=device)
        return MappedVectors(start.users, start.items, zeros, zeros.clone(), matrix=matrix)

    def epoch(self, state: Vectors, data: Training, key: Key) -> tuple[MappedVectors, float]:
        assert isinstance(state, MappedVectors)
        assert state.matrix is not None

        def loss(learned: list[Tensor], batch: Batch) -> Tensor:
            users, items, matrix = learned
            return self.loss(users, items, matrix, batch, data)

        parts = [(batch.users.numel(), batch) for batch in batches(data, self.settings.batch_size, key)]
        step = self.settings.step_of_epoch(state.steps, len(parts))
        done = descend([state.users, state.items, state.matrix], state, step, parts, loss)
        users, items, matrix = done.parameters
        return MappedVectors(users, items, done.first, done.second, done.steps, matrix), done.loss

    def pooled(self, users: Tensor, means: Tensor, matrix: Tensor) -> Tensor:
        """``h_u`` [B, d] from the own vectors ``users`` [B, d] and the ``means`` [B, d] of those of their items;
        ``matrix`` [d, d] is ``V``."""
        return self.settings.gamma * users + (1 - self.settings.gamma) * means @ matrix.T

    def loss(self, users: Tensor, items: Tensor, matrix: Tensor, batch: Batch, data: Training) -> Tensor:
        """The cosine contrastive loss of a batch, with its L2 term, from what is learned: vectors of ``users`` [n, d]
        and ``items`` [m, d], and ``matrix`` [d, d]."""
        settings, distinct = self.settings, batch.users.unique(return_inverse=True)
        rows, _ = block_rows(data.rows.offsets, data.rows.items, distinct[0])
        negatives, outside = shared_negatives(batch, data, settings.n_negatives)
        taken = taken_at_once(items, batch.positives, negatives, batch.negatives, rows.items)
        own = users.index_select(0, distinct[0])
        means = segment_sum(taken[3], rows.segments, len(own)) / rows.counts[:, None]

        user = functional.normalize(self.pooled(own, means, matrix), dim=1)[distinct[1]]
        if settings.dropout:
            user = thinned(user, settings.dropout, batch.key.fold("dropout"))
        above = (user @ functional.normalize(taken[1], dim=1).T - settings.margin).clamp(min=0) * outside
        negative = above.sum(1) / outside.sum(1).clamp(min=1)
        positive = 1 - dot(user, functional.normalize(taken[0], dim=1))
        squares = own[distinct[1]].square().sum() + taken[0].square().sum() + taken[2].square().sum()
        total: Tensor = (positive + settings.negative_weight * negative).sum() + 0.5 * settings.l2 * squares
        return total / len(user)

    def serving(self, state: Vectors, data: Training) -> MappedVectors:
        assert isinstance(state, MappedVectors)
        assert state.matrix is not None
        means = functional.embedding_bag(data.rows.items, state.items, data.rows.offsets[:-1], mode="mean")
        users = self.pooled(state.users, means, state.matrix)
        return MappedVectors(functional.normalize(users, dim=1), functional.normalize(state.items, dim=1))
