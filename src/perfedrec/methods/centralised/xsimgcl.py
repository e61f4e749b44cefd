"""XSimGCL: one noisy propagation for both tasks (Yu et al., TKDE 2023)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.methods.centralised.lightgcn import check_contrasted
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.simgcl import SimGCL, SimGCLSettings
from perfedrec.methods.centralised.vectors import Batch, bpr, contrast
from perfedrec.nn.views import mean_of, noisy_layers


class XSimGCLSettings(SimGCLSettings):
    """Options of XSimGCL."""

    noise: float = Field(0.2, ge=0, description="length of the noise in every layer")
    weight: float = Field(0.2, ge=0, description="weight of the contrastive loss")
    temperature: float = Field(0.15, gt=0, description="temperature of InfoNCE")
    contrasted_layer: int = Field(1, ge=1, description="number of the layer that is contrasted with the final vectors")

    @model_validator(mode="after")
    def _within(self) -> Self:
        check_contrasted(self.contrasted_layer, self.n_layers)
        return self


class XSimGCL(SimGCL):
    """LightGCN with noise in every layer, and InfoNCE between one of its layers and the final vectors (section 3.2).

    We know of nothing in which it departs from the paper.
    """

    Options = XSimGCLSettings
    settings: XSimGCLSettings

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings = self.settings
        layers = noisy_layers(data.graph, users, items, settings.n_layers, settings.noise, batch.key)
        final = mean_of(layers)
        early = layers[settings.contrasted_layer - 1]
        ranked = bpr(final[0], final[1], batch) + self.decay(users, items, batch)
        return ranked + settings.weight * contrast([final, early], batch, settings.temperature)
