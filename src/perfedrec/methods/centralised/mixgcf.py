"""MixGCF: synthetic hard negatives for graph networks (Huang et al., KDD 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, candidates
from perfedrec.nn.losses import BLOCK, softplus
from perfedrec.nn.segments import dot
from perfedrec.nn.views import Pair, mean_of, thinned


class MixGCFSettings(LightGCNSettings):
    """Options of MixGCF."""

    n_layers: int = Field(3, ge=1, description="K, number of propagation layers")
    n_candidates: int = Field(64, ge=1, description="M, random items of which each layer takes the hardest")
    mixing: bool = Field(True, description="whether the positive item is mixed into the negative one")
    each_number: bool = Field(
        False, description="whether each candidate, and each number of its vector, has a share of its own"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the numbers of each layer that training leaves out")


class MixGCF(LightGCN):
    """LightGCN with BPR, in which the negative of an interaction is made up. In each layer k, 0 included, it is the
    candidate j with the highest ``e_u . j^(k)`` (hop mixing, equation 7), and some of the positive item i is mixed in:
    ``a i^(k) + (1 - a) j^(k)`` with a random share a, one for each interaction and layer (positive mixing, equation 6).
    The negative vector is the mean over layers (equation 8). As the share is the same for all candidates, it does not
    change which of them is the hardest.

    Departs from the paper: L2 is that of a batch, on the positive and one of the candidates. With ``each_number`` and
    ``dropout`` it is the public code of SELFRec, in which the share decides as well which candidate is the hardest.
    """

    Options = MixGCFSettings
    settings: MixGCFSettings

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        settings = self.settings
        layers = self.layers(users, items, data, batch.key)
        final_users, final_items = mean_of(layers)
        user, drawn = final_users[batch.users], candidates(batch, data, settings.n_candidates)
        places, key = torch.arange(batch.users.numel(), device=users.device), batch.key.fold("mixing")
        shares, negative = uniform(key.spread(places), len(layers)) * settings.mixing, torch.zeros_like(user)
        for number, (_, layer) in enumerate(layers):
            if settings.mixing and settings.each_number:
                hardest, share = hardest_mixed(user, layer, drawn, batch.positives, key.fold(number))
            else:
                hardest, share = drawn[places, hardness(user, layer, drawn).argmax(1)], shares[:, number, None]
            negative = negative + share * layer[batch.positives] + (1 - share) * layer[hardest]
        margins = dot(user, negative / len(layers)) - dot(user, final_items[batch.positives])
        return softplus(margins).mean() + self.decay(users, items, batch)

    def layers(self, users: Tensor, items: Tensor, data: Training, key: Key) -> list[Pair]:
        """Layers 0 to K, each after dropout of the one before."""
        found, rate = [(users, items)], self.settings.dropout
        for number in range(self.settings.n_layers):
            users, items = data.graph.passed(users, items)
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


@torch.no_grad()
def hardest_mixed(users: Tensor, items: Tensor, drawn: Tensor, positives: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Items [b] that are the hardest of the ``drawn`` [b, M] after mixing with the ``positives`` [b], for the vectors
    ``users`` [b, d] and those of all ``items`` [m, d]; and the shares [b, d] of the positive ones in them."""
    found, (n, n_drawn) = [], drawn.shape
    for part in torch.arange(n, device=drawn.device).split(BLOCK):
        own = part[:, None] * n_drawn + torch.arange(n_drawn, device=drawn.device)
        shares = uniform(key.spread(own.flatten()), items.shape[1]).view(*own.shape, -1)
        mixed = torch.lerp(items[drawn[part]], items[positives[part]][:, None], shares)
        best = torch.einsum("bd,bmd->bm", users[part], mixed).argmax(1)
        rows = torch.arange(part.numel(), device=part.device)
        found.append((drawn[part, best], shares[rows, best]))
    hardest, chosen = (torch.cat(each) for each in zip(*found, strict=True))
    return hardest, chosen
