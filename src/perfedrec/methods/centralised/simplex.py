"""SimpleX: a cosine contrastive loss with many negatives (Mao et al., CIKM 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, normal
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import (
    Batch,
    VectorMethod,
    Vectors,
    VectorSettings,
    batches,
    shared_negatives,
)
from perfedrec.nn.segments import dot


class SimpleXSettings(VectorSettings):
    """Options of SimpleX."""

    batch_size: int = Field(1024, ge=2, description="interactions per step")
    n_negatives: int = Field(500, ge=1, description="random items of a batch that its users have as negatives")
    negative_weight: float = Field(100.0, ge=0, description="w, weight of the mean over negatives beside a positive")
    margin: float = Field(0.5, ge=-1, le=1, description="m, the cosine above which a negative counts")
    gamma: float = Field(
        0.5, ge=0, le=1, description="g, weight of a user's own vector; the mean of its items has the rest"
    )


@dataclass(frozen=True)
class MappedVectors(Vectors):
    """Vectors, and the ``matrix`` [d, d] by which the mean of a user's items is mapped."""

    matrix: Tensor | None = None


class SimpleX(VectorMethod):
    """``score_ui = cos(h_u, q_i)`` with ``h_u = g p_u + (1 - g) V mean_{k in I_u} q_k`` (aggregation by average
    pooling), trained with the cosine contrastive loss ``1 - cos(h_u, q_i) + w mean_j max(0, cos(h_u, q_j) - m)`` over
    the negatives j.

    Departs from the paper: the users of a batch share its negatives, without those that a user has; all items of a user
    are pooled, not a limited number.
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
            pooled = self.pooled(users, items, matrix, data)
            return self.loss(pooled, items, batch, data) + self.decay(users, items, batch)

        parts = [(batch.users.numel(), batch) for batch in batches(data, self.settings.batch_size, key)]
        done = descend([state.users, state.items, state.matrix], state, self.settings.learning_rate, parts, loss)
        users, items, matrix = done.parameters
        return MappedVectors(users, items, done.first, done.second, done.steps, matrix), done.loss

    def pooled(self, users: Tensor, items: Tensor, matrix: Tensor, data: Training) -> Tensor:
        """``h_u`` [n, d] of all users, from what is learned; ``matrix`` [d, d] is ``V``."""
        degrees = data.item_degrees.to(items.dtype)[:, None], data.rows.counts.clamp(min=1).to(items.dtype)[:, None]
        means = data.graph.to_users(items * degrees[0].sqrt()) / degrees[1].sqrt()  # without the graph's weights
        return self.settings.gamma * users + (1 - self.settings.gamma) * means @ matrix.T

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        """The cosine contrastive loss of a batch, from ``h_u`` of all ``users`` [n, d] and from ``items`` [m, d]."""
        settings, unit = self.settings, functional.normalize(items, dim=1)
        user = functional.normalize(users[batch.users], dim=1)
        negatives, outside = shared_negatives(batch, data, settings.n_negatives)
        above = (user @ unit[negatives].T - settings.margin).clamp(min=0) * outside
        negative = above.sum(1) / outside.sum(1).clamp(min=1)
        return (1 - dot(user, unit[batch.positives]) + settings.negative_weight * negative).mean()

    def serving(self, state: Vectors, data: Training) -> MappedVectors:
        assert isinstance(state, MappedVectors)
        assert state.matrix is not None
        users = self.pooled(state.users, state.items, state.matrix, data)
        return MappedVectors(functional.normalize(users, dim=1), functional.normalize(state.items, dim=1))
