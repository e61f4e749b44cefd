"""SelfCF: self-supervised collaborative filtering without negatives (Zhou et al., ACM TORS 2023)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.methods.centralised.bootstrap import Bootstrap, BootstrapSettings, agreement
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkVectors
from perfedrec.methods.centralised.vectors import Batch
from perfedrec.nn.propagation import lightgcn


class SelfCFSettings(BootstrapSettings):
    """Options of SelfCF."""

    momentum: float = Field(0.05, ge=0, le=1, description="t, how much of the historical vector is in a target")


class SelfCF(Bootstrap):
    """One encoder, LightGCN. The target of a node is its present vector with what it was when the node was last in a
    batch, ``t h + (1 - t) e`` (variant HE, historical embedding). The loss of an interaction is ``1 - cos(p(e_u), t_i)
    / 2 - cos(p(e_i), t_u) / 2``.

    Departs from the paper: a node that has not been in a batch has no history (h = 0), where the public code has random
    vectors.
    """

    Options = SelfCFSettings
    settings: SelfCFSettings

    def begin_past(self, start: NetworkVectors) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(start.users), torch.zeros_like(start.items)

    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        users, items = lightgcn(data.graph, learned.users, learned.items, self.settings.n_layers)
        online = users[batch.users], items[batch.positives]
        user, item = self.target(0, batch.users, online[0]), self.target(1, batch.positives, online[1])
        return 1 - agreement(online, (user, item), learned) + self.penalty(learned, batch)

    def target(self, side: int, nodes: Tensor, now: Tensor) -> Tensor:
        """The targets of ``nodes`` [b] from their present vectors [b, d], which are then their history."""
        past, now = self.past[side], now.detach()
        targets = torch.lerp(now, past[nodes], self.settings.momentum)
        past[nodes] = now
        return targets
