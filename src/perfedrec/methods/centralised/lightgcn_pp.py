"""LightGCN++ (Lee et al., RecSys 2024)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.settings import STEEPEST
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training


class LightGCNPPSettings(LightGCNSettings):
    """Options of LightGCN++."""

    alpha: float = Field(
        0.6,
        ge=-STEEPEST,
        le=STEEPEST,
        description="exponent by which a node's own degree shrinks the sum over its neighbours",
    )
    beta: float = Field(
        -0.1,
        ge=-STEEPEST,
        le=STEEPEST,
        description="exponent by which the degree of a neighbour shrinks its part of the sum",
    )
    gamma: float = Field(0.2, ge=0, le=1, description="weight of layer 0; the mean of all other layers has the rest")


class LightGCNPP(LightGCN):
    """LightGCN in which neighbours have vectors of unit length, degrees have two exponents, and layer 0 a weight.

    ``u^(k+1) = d_u^-alpha sum_{i in I_u} d_i^-beta i^(k) / ||i^(k)||``, likewise for items, and the final vector is
    ``gamma u^(0) + (1 - gamma) mean_{k=1..K} u^(k)``.

    Departs from the paper only in the sampling of negatives, as LightGCN does here.
    """

    Options = LightGCNPPSettings
    settings: LightGCNPPSettings

    def encode(self, users: Tensor, items: Tensor, data: Training) -> tuple[Tensor, Tensor]:
        settings = self.settings
        # The graph has LightGCN's exponent of 1/2 for both degrees: what lacks is multiplied before and after.
        degrees = [each.clamp(min=1).to(users.dtype)[:, None] for each in (data.rows.counts, data.item_degrees)]
        own, other = ([each ** (0.5 - power) for each in degrees] for power in (settings.alpha, settings.beta))
        layer, total = (users, items), (0.0 * users, 0.0 * items)
        for _ in range(settings.n_layers):
            unit = [functional.normalize(each, dim=1) * scale for each, scale in zip(layer, other, strict=True)]
            layer = (data.graph.to_users(unit[1]) * own[0], data.graph.to_items(unit[0]) * own[1])
            total = (total[0] + layer[0], total[1] + layer[1])
        rest = (1 - settings.gamma) / settings.n_layers
        return settings.gamma * users + rest * total[0], settings.gamma * items + rest * total[1]
