"""BUIR: bootstrapping user and item representations (Lee et al., SIGIR 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import uniform
from perfedrec.methods.centralised.bootstrap import Bootstrap, BootstrapSettings, agreement
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkVectors
from perfedrec.methods.centralised.vectors import Batch
from perfedrec.nn.propagation import Bipartite, lightgcn


class BUIRSettings(BootstrapSettings):
    """Options of BUIR."""

    momentum: float = Field(0.995, ge=0, le=1, description="t, how much of the target encoder remains after a step")
    drop: float = Field(0.2, ge=0, lt=1, description="largest share of the edges that a step leaves out")


class BUIR(Bootstrap):
    """Two encoders: the online one learns to predict the output of the target one, whose vectors follow slowly, ``x <-
    t x + (1 - t) theta`` after each step (equations 3 to 6). The loss of an interaction is ``4 - 2 cos(p(e_u), t_i) - 2
    cos(p(e_i), t_u)``. This is BUIR-NB: both encoders are LightGCN, each on a graph of its own in each step, without a
    random share of its edges, uniform between 0 and ``drop``; the weights of the others are divided by what remains.

    Departs from the paper in nothing that we know of. The public code of SELFRec moves only those rows of the target
    encoder that are in a batch, and drops the two directions of an edge one by one.
    """

    Options = BUIRSettings
    settings: BUIRSettings

    def begin_past(self, start: NetworkVectors) -> tuple[Tensor, Tensor]:
        return start.users.clone(), start.items.clone()

    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        layers = self.settings.n_layers
        online = lightgcn(self.view(batch, 0, data), learned.users, learned.items, layers)
        with torch.no_grad():
            target = lightgcn(self.view(batch, 1, data), *self.past, layers)
        first, second = ((users[batch.users], items[batch.positives]) for users, items in (online, target))
        return 4 - 4 * agreement(first, second, learned) + self.penalty(learned, batch)

    def view(self, batch: Batch, number: int, data: Training) -> Bipartite:
        """The graph of a step for one of the two encoders."""
        key = batch.key.fold("view", number)
        share = self.settings.drop * float(uniform(key.fold("share").spread(torch.zeros(1, dtype=torch.int64)), 1))
        return data.graph.thinned(share, key.fold("edges")) if share else data.graph

    def after(self, learned: Learned, batch: Batch, data: Training) -> None:
        for past, online in zip(self.past, (learned.users, learned.items), strict=True):
            past.lerp_(online, 1 - self.settings.momentum)
