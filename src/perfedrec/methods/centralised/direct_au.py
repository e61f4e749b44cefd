"""DirectAU: alignment and uniformity, optimised directly (Wang et al., KDD 2022)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch
from perfedrec.nn.losses import alignment, uniformity


class DirectAUSettings(LightGCNSettings):
    """Options of DirectAU."""

    batch_size: int = Field(1024, ge=2, description="interactions per step")
    l2: float = Field(0.0, ge=0, description="weight of the L2 term on the layer-0 vectors of a batch")
    gamma: float = Field(1.0, ge=0, description="weight of the uniformity loss")


class DirectAU(LightGCN):
    """``alignment + gamma (uniformity of users + uniformity of items) / 2`` of unit vectors (equations 6 to 8), without
    negatives.

    Departs from the paper: the encoder is LightGCN, one of its two, and Adam has no weight decay, only ``l2`` on the
    vectors of a batch.
    """

    Options = DirectAUSettings
    settings: DirectAUSettings

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        final_users, final_items = self.encode(users, items, data)
        user = functional.normalize(final_users[batch.users], dim=1)
        item = functional.normalize(final_items[batch.positives], dim=1)
        spread = (uniformity(user) + uniformity(item)) / 2
        return alignment(user, item) + self.settings.gamma * spread + self.decay(users, items, batch)
