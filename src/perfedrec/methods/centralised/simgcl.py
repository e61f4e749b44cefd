"""SimGCL: noise instead of graph augmentation (Yu et al., SIGIR 2022)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, bpr, contrast
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.views import noisy_lightgcn


class SimGCLSettings(LightGCNSettings):
    """Options of SimGCL."""

    noise: float = Field(0.1, ge=0, description="length of the noise in every layer of a view")
    weight: float = Field(0.5, ge=0, description="weight of the contrastive loss")
    temperature: float = Field(0.2, gt=0, description="temperature of InfoNCE")


class SimGCL(LightGCN):
    """LightGCN with InfoNCE between two propagations with noise in every layer (equation 7); the means leave out layer
    0.

    We know of nothing in which it departs from the paper.
    """

    Options = SimGCLSettings
    settings: SimGCLSettings

    def encode(self, users: Tensor, items: Tensor, data: Training) -> tuple[Tensor, Tensor]:
        return noisy_lightgcn(data.graph, users, items, self.settings.n_layers, 0.0, Key(0))

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings, graphs = self.settings, data.views or (data.graph, data.graph)
        first = data.graph.passed(users, items)

        def final(graph: Bipartite, noise: float, key: Key) -> tuple[Tensor, Tensor]:
            shared = first if graph is data.graph else None
            return noisy_lightgcn(graph, users, items, settings.n_layers, noise, key, shared)

        views = [final(graph, settings.noise, batch.key.fold("view", n)) for n, graph in enumerate(graphs)]
        ranked = bpr(*final(data.graph, 0.0, batch.key), batch) + self.decay(users, items, batch)
        return ranked + settings.weight * contrast(views, batch, settings.temperature)
