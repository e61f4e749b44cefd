"""MixGCF: synthetic hard negatives for graph networks (Huang et al., KDD 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, candidates
from perfedrec.nn.losses import softplus
from perfedrec.nn.segments import dot
from perfedrec.nn.views import Pair, mean_of, passed, thinned


class MixGCFSettings(LightGCNSettings):
    """Options of MixGCF."""

    n_layers: int = Field(3, ge=1, description="K, number of propagation layers")
    n_candidates: int = Field(64, ge=1, description="M, random items of which each layer takes the hardest")
    mixing: bool = Field(True, description="whether the positive item is mixed into the negative one")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the numbers of each layer that training leaves out")


class MixGCF(LightGCN):
    """LightGCN with BPR, in which the negative of an interaction is made up. In each layer k, 0 included, it is the
    candidate j with the highest ``e_u . j^(k)`` (hop mixing, equation 7), and some of the positive item i is mixed in:
    ``a i^(k) + (1 - a) j^(k)`` with a random share a, one for each interaction and layer (positive mixing, equation 6).
    The negative vector is the mean over layers (equation 8). As the share is the same for all candidates, it does not
    change which of them is the hardest.

    Departs from the paper: L2 is that of a batch, on the positive and one of the candidates; ``dropout`` is from the
    public code of SELFRec, which has a share for each candidate and each number of a vector.
    """

    Options = MixGCFSettings
    settings: MixGCFSettings

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings = self.settings
        layers = self.layers(users, items, data, batch.key)
        final_users, final_items = mean_of(layers)
        user, drawn = final_users[batch.users], candidates(batch, data, settings.n_candidates)
        places = torch.arange(batch.users.numel(), device=users.device)
        shares = uniform(batch.key.fold("mixing").spread(places), len(layers)) * settings.mixing
        negative = torch.zeros_like(user)
        for (_, layer), share in zip(layers, shares.T[:, :, None], strict=True):
            hardest = drawn[places, hardness(user, layer, drawn).argmax(1)]
            negative = negative + share * layer[batch.positives] + (1 - share) * layer[hardest]
        margins = dot(user, negative / len(layers)) - dot(user, final_items[batch.positives])
        return softplus(margins).mean() + self.decay(users, items, batch)

    def layers(self, users: Tensor, items: Tensor, data: Training, key: Key) -> list[Pair]:
        """Layers 0 to K, each after dropout of the one before."""
        found, rate = [(users, items)], self.settings.dropout
        for number in range(self.settings.n_layers):
            users, items = passed(data.graph, users, items)
            if rate:
                users, items = (
                    thinned(each, rate, key.fold(f"dropout of {side}", number))
                    for side, each in (("users", users), ("items", items))
                )
            found.append((users, items))
        return found


@torch.no_grad()
def hardness(users: Tensor, items: Tensor, drawn: Tensor) -> Tensor:
    """[b, M] products of each of ``users`` [b, d] with the vectors of its ``drawn`` items [b, M], of all ``items``
    [m, d]."""
    if items.shape[0] <= 64 * drawn.shape[1]:  # one product of matrices is faster than gathering vectors
        return (users @ items.T).gather(1, drawn)
    return torch.einsum("bd,bmd->bm", users, items[drawn])
