"""MHCN: multi-channel hypergraph convolution for social recommendation (Yu et al., WWW 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.methods.centralised.lightgcn import LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkMethod
from perfedrec.methods.centralised.vectors import Batch, bpr
from perfedrec.nn.flat import Flat
from perfedrec.nn.losses import softplus
from perfedrec.nn.segments import dot
from perfedrec.nn.social import UserGraph, purchases, sharing, triangles

N_CHANNELS = 3


class MHCNSettings(LightGCNSettings):
    """Options of MHCN."""

    weight: float = Field(0.05, ge=0, description="weight of the self-supervised loss")
    fewest_shared: int = Field(4, ge=1, description="items that two users of the purchase channel have in common")


class MHCN(NetworkMethod):
    """Users are propagated in three channels: friends with common friends (social), friends with common items (joint),
    and others with common items (purchase). A channel c starts from ``p o sigmoid(p W_c + b_c)`` and takes the mean of
    its layers ``H_c P``, where a row of ``H_c`` has counts of motifs divided by their sum. Attention ``softmax_c(a .
    (p_c W))`` mixes the channels. Half of a fourth one is added, ``P_r = D_u^-1 R Q``, and items are ``Q = D_i^-1 R^T
    P`` of the mixed vectors. Self-supervision, for each channel: a user's gated vector p agrees with its neighbourhood
    ``z = H_c p`` more than with another one z', whose rows and columns are shuffled, and z agrees with the mean h of
    all z more than z' does: ``softplus(p z' - p z) + softplus(z' h - z h)``.

    Departs from the paper: the self-supervised loss is a mean over users; L2 is that of the learned vectors of a batch,
    not of the weights. The seven motifs of friends are counted together, which gives their sum.
    """

    Options = MHCNSettings
    settings: MHCNSettings
    social = True

    def network(self) -> tuple[Flat, list[float]]:
        d, n_gates = self.settings.embedding_dim, 2 * N_CHANNELS + 1  # of the channels, and of self-supervision
        return Flat((*((d, d), (d,)) * n_gates, (d,), (d, d))), [d**-0.5, 0.0] * n_gates + [d**-0.5] * 2

    def channels(self, data: Training) -> list[UserGraph]:
        """The graphs of the three channels, which are made once for the same data."""
        return self.once(data, self._channels)

    def _channels(self, data: Training) -> list[UserGraph]:
        own, items = data.friends, data.matrix
        weights = triangles(own), sharing(own, items), purchases(own, items, self.settings.fewest_shared)
        return [UserGraph.of(each, exponents=(1.0, 0.0), device=data.rows.items.device) for each in weights]

    def encode(self, learned: Learned, data: Training) -> tuple[Tensor, Tensor]:
        graphs, weights = self.channels(data), learned.weights
        to_users, to_items = (data.graph.normalised(each) for each in ((1.0, 0.0), (0.0, 1.0)))
        *channels, simple = (gated(learned.users, weights[2 * c], weights[2 * c + 1]) for c in range(N_CHANNELS + 1))
        items, totals = learned.items, [*channels, simple, learned.items]
        for _ in range(self.settings.n_layers):
            mixed = attended(channels, *weights[-2:]) + simple / 2
            channels = [graph.spread(each) for graph, each in zip(graphs, channels, strict=True)]
            simple, items = to_users.to_users(items), to_items.to_items(mixed)
            totals = [total + each for total, each in zip(totals, (*channels, simple, items), strict=True)]
        *channels, simple, items = (total / (self.settings.n_layers + 1) for total in totals)
        return attended(channels, *weights[-2:]) + simple / 2, items

    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        users, items = self.encode(learned, data)
        loss = bpr(users, items, batch) + self.decay(learned.users, learned.items, batch)
        gates = learned.weights[2 * (N_CHANNELS + 1) : -2]
        for c, graph in enumerate(self.channels(data) if self.settings.weight else ()):
            vectors = gated(users, gates[2 * c], gates[2 * c + 1])
            loss = loss + self.settings.weight * mutual(vectors, graph, batch.key.fold("corrupted", c))
        return loss


def gated(vectors: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """``p o sigmoid(p W + b)`` [n, d] of ``vectors`` [n, d]."""
    return vectors * torch.sigmoid(vectors @ matrix + bias)


def attended(channels: list[Tensor], vector: Tensor, matrix: Tensor) -> Tensor:
    """The ``channels`` [n, d] each, mixed by ``softmax_c(a . (p_c W))``, one weight for each user and channel."""
    stacked = torch.stack(channels)
    return ((stacked @ (matrix @ vector)).softmax(0)[:, :, None] * stacked).sum(0)


def mutual(vectors: Tensor, graph: UserGraph, key: Key) -> Tensor:
    """The self-supervised loss of one channel, a mean over its n users, from their gated ``vectors`` [n, d]."""
    near = graph.spread(vectors)
    rows = choose(near.shape[0], near.shape[0], key.fold("rows")).to(near.device)
    columns = choose(near.shape[1], near.shape[1], key.fold("columns")).to(near.device)
    corrupted, centre = near.index_select(0, rows).index_select(1, columns), near.mean(0)
    local = softplus(dot(vectors, corrupted) - dot(vectors, near))
    return (local + softplus(corrupted @ centre - near @ centre)).mean()
