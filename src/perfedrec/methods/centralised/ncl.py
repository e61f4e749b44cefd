"""NCL: neighbourhood-enriched contrastive learning (Lin et al., WWW 2022)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings, check_contrasted
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, bpr
from perfedrec.nn.clustering import k_means
from perfedrec.nn.losses import info_nce
from perfedrec.nn.views import mean_of, noisy_layers


class NCLSettings(LightGCNSettings):
    """Options of NCL."""

    n_layers: int = Field(3, ge=1, description="K, number of propagation layers")
    contrasted_layer: int = Field(2, ge=2, multiple_of=2, description="the even layer that is contrasted with layer 0")
    structure_weight: float = Field(0.001, ge=0, description="weight of the contrast between the two layers")
    prototype_weight: float = Field(0.001, ge=0, description="weight of the contrast with the prototypes")
    item_weight: float = Field(1.0, ge=0, description="weight of items beside users in both contrasts")
    temperature: float = Field(0.1, gt=0, description="temperature of both contrasts")
    n_prototypes: int = Field(100, ge=1, description="number of clusters of users, and of items")

    @model_validator(mode="after")
    def _within(self) -> Self:
        check_contrasted(self.contrasted_layer, self.n_layers)
        return self


class NCL(LightGCN):
    """LightGCN with two contrasts, InfoNCE by cosine: a node's layer k with its layer 0, and its layer 0 with its
    prototype, the centroid of its cluster, among all prototypes. k-means over the directions of layer 0 finds the
    clusters of users and of items again before each epoch.

    Departs from the paper: the negatives of the first contrast are the other users or items of the batch, not all of
    them; both contrasts are means over the distinct users and items of a batch, not sums.
    """

    Options = NCLSettings
    settings: NCLSettings

    def begin(self, users: Tensor, items: Tensor, data: Training, key: Key) -> None:
        self.prototypes = []
        for side, vectors in (("users", users), ("items", items)):
            unit = functional.normalize(vectors, dim=1)
            start = choose(unit.shape[0], self.settings.n_prototypes, key.fold(side)).to(unit.device)
            labels, centroids = k_means(unit, unit[start])
            self.prototypes.append((labels, centroids.to(unit.dtype)))

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings = self.settings
        layers = [(users, items), *noisy_layers(data.graph, users, items, settings.n_layers, 0.0, batch.key)]
        loss = bpr(*mean_of(layers), batch) + self.decay(users, items, batch)
        sides = ((batch.users.unique(), 1.0), (batch.positives.unique(), settings.item_weight))
        for side, (nodes, weight) in enumerate(sides):
            first, far = layers[0][side], layers[settings.contrasted_layer][side]
            labels, centroids = self.prototypes[side]
            structure = info_nce(far[nodes], first[nodes], settings.temperature)
            semantic = info_nce(first[nodes], centroids, settings.temperature, labels[nodes])
            loss = loss + weight * (settings.structure_weight * structure + settings.prototype_weight * semantic)
        return loss
