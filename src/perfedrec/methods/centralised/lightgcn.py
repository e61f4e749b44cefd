"""LightGCN (He et al., SIGIR 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, VectorMethod, VectorSettings, bpr
from perfedrec.nn.propagation import lightgcn


class LightGCNSettings(VectorSettings):
    """Options of LightGCN."""

    n_layers: int = Field(2, ge=1, description="K, number of propagation layers")


class LightGCN(VectorMethod):
    """Vectors are means over the layers of a propagation without weights (equations 3 to 5), trained with BPR.

    Departs from the paper only in the sampling of negatives, which are distinct within a user and an epoch.
    """

    Options = LightGCNSettings
    settings: LightGCNSettings

    def encode(self, users: Tensor, items: Tensor, data: Training) -> tuple[Tensor, Tensor]:
        return lightgcn(data.graph, users, items, self.settings.n_layers)

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        final_users, final_items = self.encode(users, items, data)
        return bpr(final_users, final_items, batch) + self.decay(users, items, batch)


def check_contrasted(layer: int, n_layers: int) -> None:
    """Raise ValueError for a ``contrasted_layer`` that the propagation does not have."""
    if layer > n_layers:
        raise ValueError(f"contrasted_layer is {layer}, not a layer; expected at most n_layers = {n_layers}")
