"""What BUIR and SelfCF share: users and items learn to predict each other, and no negatives are drawn."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.lightgcn import LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkMethod, NetworkVectors
from perfedrec.methods.centralised.vectors import Batch
from perfedrec.nn.flat import Flat
from perfedrec.nn.propagation import lightgcn


class BootstrapSettings(LightGCNSettings):
    """Options of methods with a predictor and targets."""

    l2: float = Field(0.0, ge=0, description="weight of the L2 term on the layer-0 vectors of a batch")
    momentum: float = Field(ge=0, le=1, description="t, how much of the past remains in the targets")


@dataclass(frozen=True)
class BootstrapVectors(NetworkVectors):
    """Vectors and the predictor, and what the targets of users [n, d] and of items [m, d] are made of."""

    past_users: Tensor | None = None
    past_items: Tensor | None = None


class Bootstrap(NetworkMethod):
    """The online vectors e of users and items, from LightGCN, pass a linear predictor ``p(e) = W e + b``. A user's
    prediction shall have the direction of its item's target, and the item's that of the user's target. Targets are
    constants for the gradient. ``score_ui = p(e_u) . e_i + e_u . p(e_i)``."""

    settings: BootstrapSettings

    past: tuple[Tensor, Tensor]
    """The table of users and of items that targets are made of, during an epoch."""

    @abstractmethod
    def begin_past(self, start: NetworkVectors) -> tuple[Tensor, Tensor]:
        """What targets are made of before the first step."""

    def network(self) -> tuple[Flat, list[float]]:
        d = self.settings.embedding_dim
        return Flat(((d, d), (d,))), [d**-0.5, 0.0]

    def init(self, data: Training, key: Key) -> BootstrapVectors:
        start = super().init(data, key)
        past = self.begin_past(start)
        return BootstrapVectors(start.users, start.items, start.first, start.second, 0, start.weights, *past)

    def epoch(self, state: NetworkVectors, data: Training, key: Key) -> tuple[BootstrapVectors, float]:
        assert isinstance(state, BootstrapVectors)
        assert state.past_users is not None and state.past_items is not None
        self.past = state.past_users.clone(), state.past_items.clone()
        done, loss = super().epoch(state, data, key)
        assert isinstance(done, BootstrapVectors)
        return replace(done, past_users=self.past[0], past_items=self.past[1]), loss

    def encode(self, learned: Learned, data: Training) -> tuple[Tensor, Tensor]:
        users, items = lightgcn(data.graph, learned.users, learned.items, self.settings.n_layers)
        return (
            torch.cat([predicted(users, learned), users], dim=1),
            torch.cat([items, predicted(items, learned)], dim=1),
        )

    def penalty(self, learned: Learned, batch: Batch) -> Tensor:
        """L2 term on the learned vectors of a batch, as a mean over its interactions, without negatives."""
        squares = learned.users[batch.users].square().sum() + learned.items[batch.positives].square().sum()
        return 0.5 * self.settings.l2 * squares / batch.users.numel()


def predicted(vectors: Tensor, learned: Learned) -> Tensor:
    """``W e + b`` [r, d] of ``vectors`` [r, d]."""
    matrix, bias = learned.weights
    return vectors @ matrix.T + bias


def agreement(online: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], learned: Learned) -> Tensor:
    """``mean (cos(p(e_u), t_i) + cos(p(e_i), t_u)) / 2`` over a batch, a scalar, from the ``online`` vectors of its b
    users and items, [b, d] each, and from their ``targets``."""
    first = functional.cosine_similarity(predicted(online[0], learned), targets[1], dim=1)
    second = functional.cosine_similarity(predicted(online[1], learned), targets[0], dim=1)
    return (first + second).mean() / 2
