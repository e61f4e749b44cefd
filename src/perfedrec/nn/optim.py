"""Optimisers as functions of explicit moments, for clients (Adam on private vectors) and for the server.

The rules of the server are those of adaptive federated optimisation (Reddi et al., ICLR 2021, algorithm 2): the mean
change of the clients is used in place of the negative gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ServerOptimizer = Literal["fedavg", "fedadam", "fedadagrad", "fedyogi"]


def adam(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Adam step (Kingma and Ba, 2015) for each of B independent vectors.

    ``gradient``, and the moments ``first`` and ``second``, are [B, d]; ``steps`` [B] are the steps taken before.
    Returns the change to add [B, d], the new moments, and the new numbers of steps.
    """
    steps = steps + 1
    first = torch.lerp(gradient, first, betas[0])
    second = torch.lerp(gradient.square(), second, betas[1])
    exponents = steps.to(torch.float32)[:, None]
    denominator = (second / (1 - _power(betas[1], exponents))).sqrt_().add_(epsilon)
    change = first / (1 - _power(betas[0], exponents)) / denominator
    return change.mul_(-learning_rate), first, second, steps


def _power(base: float, exponents: Tensor) -> Tensor:
    """``base ** exponents``, computed by exp, which rounds in the same way at every place of a tensor."""
    return torch.exp(exponents * math.log(base)) if base else torch.zeros_like(exponents)


def server_step(
    rule: ServerOptimizer,
    change: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The server's step for the r rows that the clients have changed.

    ``change`` [r, d] is the weighted mean of the clients' changes; ``first`` and ``second`` [r, d] are the moments of
    these rows, which are overwritten (``None`` for ``fedavg``). Returns the step to add [r, d] and the new moments.

    Rows that no client has changed keep their moments. The cost of a round therefore depends on the rows that its
    cohort changes, not on the size of the table.
    """
    if rule == "fedavg":
        return change * learning_rate, first, second
    assert first is not None and second is not None
    first.lerp_(change, 1 - betas[0])
    if rule == "fedadam":
        second.mul_(betas[1]).addcmul_(change, change, value=1 - betas[1])
    elif rule == "fedadagrad":
        second.addcmul_(change, change)
    else:
        square = change.square()
        second.addcmul_(square, torch.sign(second - square), value=betas[1] - 1)
    step = second.sqrt().add_(epsilon)
    return torch.div(first, step, out=step).mul_(learning_rate), first, second
