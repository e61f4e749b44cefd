"""Ranking losses per client, and the contrastive loss of pre-training.

Ranking losses are sums over a client's positives, one number per client, so that the gradient of a row has the same
scale whether its owner has five interactions or five hundred.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.nn.segments import segment_sum


class _Softplus(torch.autograd.Function):
    """``log(1 + exp(x))`` from operations that round alike at every place of a tensor.

    torch's own softplus and sigmoid take another path for the last few elements, so that the last bit of a client's
    loss would depend on who else is in the block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, elementwise."""
    return cast(Tensor, _Softplus.apply(x))  # type: ignore[no-untyped-call]


def bpr(positive: Tensor, negative: Tensor, segments: Tensor, n: int) -> Tensor:
    """[n] Bayesian personalised ranking (Rendle et al., UAI 2009): ``- sum log sigmoid(s_pos - s_neg)`` per client.

    ``positive`` [P] and ``negative`` [P] are scores of pairs, ``segments`` [P] their clients.
    """
    return segment_sum(softplus(negative - positive), segments, n)


def sampled_softmax(positive: Tensor, negative: Tensor, segments: Tensor, temperature: float) -> Tensor:
    """[n] ``- sum_i log( exp(s_i / t) / (exp(s_i / t) + sum_j exp(s_j / t)) )`` with shared negatives.

    ``positive`` [P] with ``segments`` [P]; ``negative`` [n, N] scores of the N negatives that all positives of a
    client share, ``-inf`` where a client has fewer.
    """
    shared = torch.logsumexp(negative / temperature, dim=1)
    losses = softplus(shared.index_select(0, segments) - positive / temperature)
    return segment_sum(losses, segments, negative.shape[0])


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE between two views [b, d] of the same nodes, by cosine (SGL, Wu et al., SIGIR 2021, eq. 10).

    The negatives of a node are the other nodes of the batch. Returns the mean over the batch.
    """
    first, second = functional.normalize(first, dim=1), functional.normalize(second, dim=1)
    return functional.cross_entropy(first @ second.T / temperature, torch.arange(first.shape[0], device=first.device))


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """Mean squared distance of unit vectors [b, d] of pairs (Wang and Isola, ICML 2020)."""
    return (users - items).square().sum(1).mean()


def uniformity(vectors: Tensor) -> Tensor:
    """``log mean exp(-2 ||x - y||^2)`` over pairs of unit ``vectors`` [b, d] (Wang and Isola, 2020); -4 at best, and 0
    where there is no pair."""
    n = vectors.shape[0]
    if n < 2:
        return vectors.new_zeros(())
    cosines = (vectors @ vectors.T).fill_diagonal_(-torch.inf)  # ||x - y||^2 = 2 - 2 x.y; a pair counts twice
    return (4 * cosines - 4).exp().sum().log() - math.log(n * (n - 1))
