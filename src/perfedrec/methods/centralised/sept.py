"""SEPT: socially aware self-supervised tri-training (Yu et al., KDD 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from perfedrec.core.compiled import FIXED_PARTS, spread, usable
from perfedrec.core.keys import Key
from perfedrec.core.products import inner_products, rounded_up
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
        social = [graph.propagated(users, self.settings.n_layers) for graph in self.user_graphs(data)]
        views = [each.index_select(0, chosen) for each in (*social, final_users)]
        perturbed, _ = lightgcn(self.perturbed, users, items, self.settings.n_layers)
        return loss + self.settings.weight * self.tri_training(views, perturbed.index_select(0, chosen))

    def tri_training(self, views: list[Tensor], perturbed: Tensor) -> Tensor:
        """The contrast of three ``views`` [b, d] with the ``perturbed`` vectors [b, d] of the same users."""
        unit = functional.normalize(torch.stack((*views, perturbed)), dim=2)
        options = self.settings.temperature, min(self.settings.n_positives, unit.shape[1])
        return cast(Tensor, _TriTraining.apply(unit, *options))  # type: ignore[no-untyped-call]


class _TriTraining(torch.autograd.Function):
    """The mean contrast of unit vectors [4, b, d], three views and the perturbed one. The gradients come with the
    value, block by block, so that of all pairs no number stays in memory."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, temperature: float, n_positives: int) -> Tensor:
        n, total = unit.shape[1], unit.new_zeros(())
        padded = rounded_up(unit)
        views, perturbed, slopes = padded[:3], padded[3], torch.empty_like(padded)
        of_perturbed = torch.zeros_like(perturbed.T)
        for start in range(0, n, BLOCK):
            part = slice(start, min(start + BLOCK, padded.shape[1]))
            block = views[:, part].flatten(0, 1)
            cosines = inner_products(block, perturbed)
            total += contrast(cosines.view(3, -1, cosines.shape[1]), min(BLOCK, n - start), n, temperature, n_positives)
            slopes[:3, part] = inner_products(cosines, perturbed.T).view_as(views[:, part])
            of_perturbed += inner_products(block.T, cosines.T)
        slopes[3] = of_perturbed.T
        ctx.save_for_backward(slopes[:, :n])
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return grads[0] / slopes.shape[1] * slopes, None, None


def contrast(cosines: Tensor, n: int, m: int, temperature: float, n_positives: int) -> Tensor | float:
    """The sum of the contrasts of ``n`` users in three views with ``m`` perturbed vectors. The gradients take the place
    of their ``cosines`` [3, n, m], which are the first ones of a larger tensor."""
    if cosines.dtype == torch.float32 and usable(cosines) and bool(cosines.sum().isfinite()):
        from perfedrec.methods.centralised import kernels

        work = partial(kernels.tri_training, cosines.numpy(), m, n_positives, 1 / temperature)
        return float(sum(spread(work, n, 3 * n * m // 64, FIXED_PARTS)))
    own = cosines[:, :n, :m]
    beliefs = own.softmax(2)
    positives = (beliefs.sum(0) - beliefs).topk(n_positives, dim=2, sorted=False).indices  # those of the other two
    shares = (own / temperature).log_softmax(2)
    known = shares.gather(2, positives)
    own.copy_(shares.exp_().scatter_add_(2, positives, -known.softmax(2)) / temperature)
    return -known.logsumexp(2).sum()
