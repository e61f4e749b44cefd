"""SEPT: socially aware self-supervised tri-training (Yu et al., KDD 2021)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.sgl import dropped
from perfedrec.methods.centralised.vectors import Batch, Vectors, bpr
from perfedrec.nn.losses import BLOCK
from perfedrec.nn.propagation import lightgcn
from perfedrec.nn.social import UserGraph, sharing, triangles


class SEPTSettings(LightGCNSettings):
    """Options of SEPT."""

    weight: float = Field(0.005, ge=0, description="weight of the contrast")
    temperature: float = Field(0.1, gt=0, description="temperature of the contrast")
    drop: float = Field(0.3, ge=0, lt=1, description="share of the edges that the perturbed graph leaves out")
    n_positives: int = Field(10, ge=1, description="K, users who are positive examples of a user")
    warmup: int = Field(5, ge=0, description="epochs of the ranking loss alone, before the contrast")


class SEPT(LightGCN):
    """LightGCN with BPR, beside two more encoders of users: on friends who have friends in common, ``(G G) o G + I``,
    and on friends who have items in common, ``(R R^T) o G + I``. Each view is taught by the others (tri-training): for
    a user, the K users of the batch whose vectors on a perturbed interaction graph are most like the user's, by the
    mean of the other two views' softmax of cosines, are its positives. The contrast is ``-log(sum_{p in P} exp(cos(z_u,
    z'_p) / t) / sum_{j in batch} exp(cos(z_u, z'_j) / t))`` (neighbour discrimination), a mean over the users of a
    batch and a sum over the three views.

    Departs from the paper: a relation counts in both directions; the perturbed graph lacks interactions, not relations,
    as in the public code of SELFRec; the contrast begins after ``warmup`` epochs, and is a mean.
    """

    Options = SEPTSettings
    settings: SEPTSettings
    social = True

    joint = True
    """Whether the epoch has the contrast."""

    def epoch(self, state: Vectors, data: Training, key: Key) -> tuple[Vectors, float]:
        n_batches = -(-data.rows.items.numel() // self.settings.batch_size)
        self.joint = state.steps >= self.settings.warmup * n_batches and self.settings.weight > 0
        return super().epoch(state, data, key)

    def begin(self, users: Tensor, items: Tensor, data: Training, key: Key) -> None:
        if self.joint:
            self.perturbed = dropped(data, self.settings.drop, key)

    def user_graphs(self, data: Training) -> list[UserGraph]:
        """The graphs of the friend and of the sharing view, symmetrically normalised. They are made once for the same
        data."""
        return self.once(data, self._user_graphs)

    def _user_graphs(self, data: Training) -> list[UserGraph]:
        own, one = data.friends, sparse.eye_array(data.n_users, format="csr")
        made = partial(UserGraph.of, exponents=(0.5, 0.5), device=data.rows.items.device)
        return [made(sparse.csr_array(each + one)) for each in (triangles(own), sharing(own, data.matrix))]

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        final_users, final_items = self.encode(users, items, data)
        loss = bpr(final_users, final_items, batch) + self.decay(users, items, batch)
        if not self.joint:
            return loss
        chosen = batch.users.unique()
        social = [spread(graph, users, self.settings.n_layers) for graph in self.user_graphs(data)]
        views = [each.index_select(0, chosen) for each in (*social, final_users)]
        perturbed, _ = lightgcn(self.perturbed, users, items, self.settings.n_layers)
        return loss + self.settings.weight * self.tri_training(views, perturbed.index_select(0, chosen))

    def tri_training(self, views: list[Tensor], perturbed: Tensor) -> Tensor:
        """The contrast of three ``views`` [b, d] with the ``perturbed`` vectors [b, d] of the same users."""
        return in_blocks(self.contrast, [functional.normalize(each, dim=1) for each in (*views, perturbed)])

    def contrast(self, *vectors: Tensor) -> Tensor:
        """The sum of the contrasts of a block of users: three views [c, d], and all perturbed vectors [b, d], each of
        length 1."""
        *views, unit = vectors
        cosines = [each @ unit.T for each in views]
        beliefs = [each.detach().softmax(1) for each in cosines]
        together, loss = torch.stack(beliefs).sum(0), unit.new_zeros(())
        count = min(self.settings.n_positives, unit.shape[0])
        for own, belief in zip(cosines, beliefs, strict=True):
            positives = (together - belief).topk(count, dim=1, sorted=False).indices  # those of the other two
            shares = (own / self.settings.temperature).log_softmax(1)
            loss = loss - shares.gather(1, positives).logsumexp(1).sum()
        return loss


def in_blocks(contrast: Callable[..., Tensor], vectors: list[Tensor]) -> Tensor:
    """The mean over b users of a ``contrast``, a sum over those of a block. It takes ``vectors`` [b, d]: of the last
    ones all, and of the others those of the block. Nothing of a block stays in memory but its gradient."""
    leaves, total = [each.detach().requires_grad_() for each in vectors], vectors[0].new_zeros(())
    with torch.enable_grad():
        for start in range(0, len(vectors[0]), BLOCK):
            value = contrast(*(each[start : start + BLOCK] for each in leaves[:-1]), leaves[-1])
            torch.autograd.backward(value)
            total += value.detach()
    sloped = [(each * leaf.grad).sum() for each, leaf in zip(vectors, leaves, strict=True) if leaf.grad is not None]
    slope = torch.stack(sloped).sum()
    return (total + slope - slope.detach()) / len(vectors[0])  # the value of one, and the gradient of the other


def spread(graph: UserGraph, users: Tensor, n_layers: int) -> Tensor:
    """The mean of layers 0 to K [n, d] of the propagation of ``users`` [n, d] on a graph of users."""
    layers = [users]
    for _ in range(n_layers):
        layers.append(graph.spread(layers[-1]))
    return torch.stack(layers).mean(0)
