"""SSL4Rec: self-supervised learning with two towers (Yao et al., CIKM 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.products import rounded_up
from perfedrec.core.sampling import choose
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkMethod
from perfedrec.methods.centralised.vectors import Batch, VectorSettings
from perfedrec.nn.flat import Flat
from perfedrec.nn.linear import linear
from perfedrec.nn.losses import info_nce
from perfedrec.nn.views import thinned


class SSL4RecSettings(VectorSettings):
    """Options of SSL4Rec."""

    hidden_dim: int = Field(1024, ge=1, description="width of the hidden layer of both towers")
    output_dim: int = Field(128, ge=1, description="length of the final vectors")
    temperature: float = Field(0.07, gt=0, description="t, temperature of both losses")
    weight: float = Field(0.1, ge=0, description="weight of the contrast between two views of an item")
    drop: float = Field(0.1, ge=0, lt=1, description="share of the numbers of an item's vector that a view leaves out")
    contrasted: Literal["random", "batch"] = Field(
        "random", description="items that have two views: random ones of the catalogue, or those of the batch"
    )
    scoring: Literal["cosine", "product"] = Field(
        "cosine", description="what ranks items: the cosine that is trained, or the inner product"
    )


class SSL4Rec(NetworkMethod):
    """A tower for users and one for items, ``tanh(V relu(W x + b) + c)``, whose cosines are the scores. It is trained
    with the softmax of an interaction's item among the items of the batch (equation 4), and with InfoNCE between two
    views of random items, each without some of the numbers of the vector that enters the tower (equations 1 and 2).

    Departs from the paper: without item features, a view drops numbers of the item's learned vector, as in the public
    code of SELFRec; both losses have the same temperature. That code has the ``contrasted`` items of the "batch", and
    the "product" as ``scoring``: lengths, which no loss asks for, then grow with popularity.
    """

    Options = SSL4RecSettings
    settings: SSL4RecSettings

    def network(self) -> tuple[Flat, list[float]]:
        d, hidden, out = (getattr(self.settings, f"{name}_dim") for name in ("embedding", "hidden", "output"))
        layers = [(d, hidden), (hidden, out)] * 2
        shapes = tuple(shape for layer in layers for shape in (layer, layer[1:]))
        scales = [(3 * layer[0]) ** -0.5 for layer in layers]  # those of torch's layers, biases included
        return Flat(shapes), [scale for scale in scales for _ in range(2)]

    def encode(self, learned: Learned, data: Training) -> tuple[Tensor, Tensor]:
        users, items = tower(learned.users, learned.weights[:4]), tower(learned.items, learned.weights[4:])
        if self.settings.scoring == "product":
            return users, items
        return functional.normalize(users, dim=1), functional.normalize(items, dim=1)

    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        settings = self.settings
        (users, user), (items, item) = (each.unique(return_inverse=True) for each in (batch.users, batch.positives))
        of_users = tower(learned.users[users], learned.weights[:4])[user]
        of_items = tower(learned.items[items], learned.weights[4:])[item]
        loss = info_nce(of_users, of_items, settings.temperature)
        if settings.weight:
            chosen = batch.positives
            if settings.contrasted == "random":
                chosen = choose(data.n_items, settings.batch_size, batch.key.fold("contrasted")).to(user.device)
            first, second = (self.view(learned, chosen, batch.key.fold("view", number)) for number in (0, 1))
            loss = loss + settings.weight * info_nce(first, second, settings.temperature)
        return loss + self.decay(learned.users, learned.items, batch)

    def view(self, learned: Learned, items: Tensor, key: Key) -> Tensor:
        """The tower's output for ``items`` [c] with some numbers of their vectors left out, the others enlarged."""
        return tower(thinned(learned.items[items], self.settings.drop, key), learned.weights[4:])


def tower(vectors: Tensor, weights: list[Tensor]) -> Tensor:
    """``tanh(V relu(W x + b) + c)`` [r, e] of ``vectors`` [r, d]."""
    into, bias, out, shift = weights
    rows = rounded_up(vectors)
    found = torch.tanh(linear(torch.relu(linear(rows, into.T, bias)), out.T, shift))
    return found[: vectors.shape[0]]
