"""Ranking losses per client, and the contrastive loss of pre-training.

A ranking loss is the sum over the positives of a client, one number per client. The gradient of a row then has the same
scale whether the client has five interactions or five hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from perfedrec.core.products import inner_products, rounded_up
from perfedrec.nn.flat import apply_per_client
from perfedrec.nn.segments import dot, segment_sum


class _Softplus(torch.autograd.Function):
    """``log(1 + exp(x))`` from operations that round in the same way at every place of a tensor.

    The softplus and the sigmoid of torch compute the last few elements of a tensor in another way. With these, the last
    bit of a client's loss would depend on which other clients are in the block.
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
    """``log(1 + exp(x))`` of each element."""
    return cast(Tensor, _Softplus.apply(x))  # type: ignore[no-untyped-call]


def bpr(positive: Tensor, negative: Tensor, segments: Tensor, n: int) -> Tensor:
    """[n] Bayesian personalised ranking (Rendle et al., UAI 2009): ``- sum log sigmoid(s_pos - s_neg)`` per client.

    ``positive`` [P] and ``negative`` [P] are the scores of pairs, ``segments`` [P] (ascending) are their clients.
    """
    return segment_sum(softplus(negative - positive), segments, n)


def sampled_softmax(positive: Tensor, negative: Tensor, segments: Tensor, temperature: float) -> Tensor:
    """[n] ``- sum_i log( exp(s_i / t) / (exp(s_i / t) + sum_j exp(s_j / t)) )`` per client, with shared negatives.

    ``positive`` [P] are the scores of the positives ``i``, and ``segments`` [P] (ascending) their clients. ``negative``
    [n, N] are the scores of the N negatives ``j`` of each client, which all its positives share; ``-inf`` where a
    client has fewer. ``t`` is the ``temperature``.
    """
    shared = torch.logsumexp(negative / temperature, dim=1)
    losses = softplus(shared.index_select(0, segments) - positive / temperature)
    return segment_sum(losses, segments, negative.shape[0])


class _Softmax(torch.autograd.Function):
    """The mean of ``log sum_c exp(x . y_c) - x . y_p``. The gradients come with the value, so that of all pairs no
    number stays in memory."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, positives: Tensor) -> Tensor:
        (n, _), m = first.shape, second.shape[0]
        rows, columns = (rounded_up(each) for each in (first, second))
        logits = inner_products(rows, columns)
        logits[:, m:] = -torch.inf
        largest = logits.amax(1, keepdim=True)
        powers = logits.sub_(largest).exp_()
        sums = powers.sum(1, keepdim=True)
        log_sums = (largest + sums.log()).squeeze(1)
        chosen = second.index_select(0, positives)
        if any(ctx.needs_input_grad):
            of_first = (inner_products(powers, columns.T) / sums)[:n] - chosen
            of_second = inner_products((rows / sums).T, powers.T)[:, :m].T.index_add(0, positives, first, alpha=-1)
            ctx.save_for_backward(of_first, of_second)
        return log_sums[:n].mean() - dot(first, chosen).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        of_first, of_second = ctx.saved_tensors
        share = grads[0] / of_first.shape[0]
        return share * of_first, share * of_second, None


def softmax_loss(first: Tensor, second: Tensor, positives: Tensor) -> Tensor:
    """The mean cross-entropy of a softmax over inner products, a scalar: each row of ``first`` [b, d] with the rows of
    ``second`` [c, d], of which ``positives`` [b] are the right ones."""
    return cast(Tensor, _Softmax.apply(first, second, positives))  # type: ignore[no-untyped-call]


def info_nce(first: Tensor, second: Tensor, temperature: float, positives: Tensor | None = None) -> Tensor:
    """InfoNCE with cosine similarity from nodes ``first`` [b, d] to ``second`` [c, d] (SGL, Wu et al., SIGIR 2021, eq.
    10).

    Row r of ``first`` belongs to row ``positives[r]`` of ``second`` (``None``: to row r, two views of the same nodes),
    and all other rows of ``second`` are its negatives. Returns the mean over ``first``, a scalar.
    """
    first, second = functional.normalize(first, dim=1) / temperature, functional.normalize(second, dim=1)
    if positives is None:
        positives = torch.arange(first.shape[0], device=first.device)
    return softmax_loss(first, second, positives)


def supervised_contrast(rows: Tensor, categories: Tensor, segments: Tensor, n: int, temperature: float) -> Tensor:
    """[T] the supervised contrastive term of each of ``rows`` [T, d] among the rows of its client ``segments`` [T]:
    ``-1/|P| sum_{p in P} log( exp(x . x_p / t) / sum_{a != x} exp(x . x_a / t) )`` for unit vectors, where P are the
    other rows of the same category (Khosla et al., NeurIPS 2020); 0 where there are none."""
    unit = functional.normalize(rows, dim=1) / temperature**0.5
    kinds = segments * (int(categories.max()) + 1 if categories.numel() else 1) + categories
    kinds, numbers = torch.unique(kinds, return_inverse=True)
    sums = unit.new_zeros(kinds.numel(), unit.shape[1]).index_add(0, numbers, unit)
    others = torch.bincount(numbers, minlength=kinds.numel())[numbers] - 1
    alike = ((unit * sums[numbers]).sum(1) - unit.square().sum(1)) / others.clamp(min=1)

    def log_others(clients: Tensor, padded: Sequence[Tensor]) -> Tensor:
        left_out = torch.eye(padded[1].shape[1], dtype=torch.bool, device=rows.device) | ~padded[1][:, None]
        logits = (padded[0] @ padded[0].mT).masked_fill(left_out, -1e9)
        return logits.logsumexp(-1)

    there = torch.ones_like(segments, dtype=torch.bool)
    terms: Tensor = apply_per_client(log_others, [unit, there], segments, n) - alike
    return terms * (others > 0)


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """The mean squared distance of pairs of unit vectors, ``users`` [b, d] and ``items`` [b, d], a scalar.

    Wang and Isola, ICML 2020. 0 at best; 2 for vectors that are orthogonal.
    """
    return (users - items).square().sum(1).mean()


BLOCK = 256
"""Vectors that are compared with all others at once. The numbers of their pairs fit into a processor's cache, and none
stays in memory: gradients are computed along with the value."""


class _LogMeanOfPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        n, scaled, total = vectors.shape[0], 2 * vectors, vectors.new_zeros(())  # ||x - y||^2 = 2 - 2 x.y
        slope = torch.empty_like(vectors)
        for start in range(0, n, BLOCK):
            block = scaled[start : start + BLOCK]
            pairs = inner_products(block, scaled)
            pairs.diagonal(start).fill_(-torch.inf)
            total += pairs.exp_().sum()
            if any(ctx.needs_input_grad):
                slope[start : start + BLOCK] = inner_products(pairs, scaled.T)
        ctx.save_for_backward(slope.mul_(4 / total))
        return total.log() - 4 - math.log(n * (n - 1))  # a pair counts twice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return cast(Tensor, grads[0] * slope)


def uniformity(vectors: Tensor) -> Tensor:
    """``log mean exp(-2 ||x - y||^2)`` over all pairs of unit ``vectors`` [b, d], a scalar.

    Wang and Isola, ICML 2020. About -4 for vectors that are spread evenly, 0 where all are equal or there is no pair.
    """
    if vectors.shape[0] < 2:
        return vectors.new_zeros(())
    return cast(Tensor, _LogMeanOfPairs.apply(vectors))  # type: ignore[no-untyped-call]
