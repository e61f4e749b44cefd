"""MHCN: multi-channel hypergraph convolution for social recommendation (Yu et al., WWW 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perfedrec.core.sampling import choose
from perfedrec.methods.centralised.lightgcn import LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned, NetworkMethod
from perfedrec.methods.centralised.vectors import Batch, bpr
from perfedrec.nn.channels import Graphs, agreement, gated, passed
from perfedrec.nn.flat import Flat
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

    def graphs(self, data: Training) -> Graphs:
        """What vectors are passed along. It is made once for the same data."""
        return self.once(data, self._graphs)

    def _graphs(self, data: Training) -> Graphs:
        own, items = data.friends, data.matrix
        weights = triangles(own), sharing(own, items), purchases(own, items, self.settings.fewest_shared)
        blocks = sparse.csr_array(sparse.block_diag(weights))
        channels = UserGraph.of(blocks, exponents=(1.0, 0.0), device=data.rows.items.device)
        return Graphs(channels, data.graph.normalised((1.0, 0.0)), data.graph.normalised((0.0, 1.0)))

    def encode(self, learned: Learned, data: Training) -> tuple[Tensor, Tensor]:
        starts = gated(learned.users, *gates(learned.weights, 0, N_CHANNELS + 1))
        vector = learned.weights[-1] @ learned.weights[-2]
        return passed(starts, learned.items, vector, self.graphs(data), self.settings.n_layers)

    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        users, items = self.encode(learned, data)
        loss = bpr(users, items, batch) + self.decay(learned.users, learned.items, batch)
        if not self.settings.weight:
            return loss
        vectors = gated(users, *gates(learned.weights, N_CHANNELS + 1, 2 * N_CHANNELS + 1))
        keys = [batch.key.fold("corrupted", c) for c in range(N_CHANNELS)]
        rows, columns = (
            torch.stack([choose(size, size, key.fold(name)) for key in keys]).to(users.device)
            for name, size in zip(("rows", "columns"), users.shape, strict=True)
        )
        near = self.graphs(data).channels.spread(vectors)
        return loss + agreement(vectors, near, rows, columns, self.settings.weight)


def gates(weights: list[Tensor], first: int, stop: int) -> tuple[Tensor, Tensor]:
    """The matrices [g, d, d] and biases [g, d] of the gates from the ``first`` on."""
    return torch.stack(weights[2 * first : 2 * stop : 2]), torch.stack(weights[2 * first + 1 : 2 * stop : 2])
