"""SGL: self-supervised graph learning, with edge dropout (Wu et al., SIGIR 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, contrast
from perfedrec.nn.propagation import Bipartite, lightgcn


class SGLSettings(LightGCNSettings):
    """Options of SGL."""

    drop: float = Field(0.1, ge=0, lt=1, description="share of the edges that each view leaves out")
    weight: float = Field(0.1, ge=0, description="weight of the contrastive loss")
    temperature: float = Field(0.2, gt=0, description="temperature of InfoNCE")


class SGL(LightGCN):
    """LightGCN with InfoNCE (equation 10) between two views of the graph. Each view leaves out some edges (variant ED),
    drawn again in each epoch.

    Departs from the paper: the negatives of InfoNCE are the other nodes of the batch, not all nodes.
    """

    Options = SGLSettings
    settings: SGLSettings

    def begin(self, users: Tensor, items: Tensor, data: Training, key: Key) -> None:
        own = (dropped(data, self.settings.drop, key.fold("view", number)) for number in range(2))
        self.views = list(data.views or own)

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        views = [lightgcn(broadcast, users, items, self.settings.n_layers) for broadcast in self.views]
        ranked = super().loss(users, items, batch, data)
        return ranked + self.settings.weight * contrast(views, batch, self.settings.temperature)


def dropped(data: Training, share: float, key: Key) -> Bipartite:
    """The interaction graph without a random ``share`` of its edges, with the degrees of what is left."""
    rows, edges = data.rows, torch.arange(data.rows.items.numel(), device=data.rows.items.device)
    kept = uniform(key.spread(edges), 1).squeeze(1) >= share
    return Bipartite.of(rows.segments[kept], rows.items[kept], data.n_users, data.n_items)
