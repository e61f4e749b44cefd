"""One pass of Adam over batches, whose moments come from a method's state and go back into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")

BETAS = 0.9, 0.999
"""How much of Adam's two moments is left after a step."""

EPSILON = 1e-8
"""What Adam adds to the root of the second moment."""


class Moments(Protocol):
    """Adam's moments of all parameters, one parameter after another along their first axis, and its number of
    steps."""

    @property
    def first(self) -> Tensor | None: ...

    @property
    def second(self) -> Tensor | None: ...

    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Descent:
    """The result of a pass: new ``parameters`` and :class:`Moments`, and the mean ``loss``."""

    parameters: list[Tensor]
    first: Tensor
    second: Tensor
    steps: int
    loss: float


def descend(
    parameters: Sequence[Tensor],
    moments: Moments,
    learning_rate: float,
    batches: Iterable[tuple[int, B]],
    loss: Callable[[list[Tensor], B], Tensor],
    after: Callable[[list[Tensor], B], None] | None = None,
) -> Descent:
    """One step of Adam for each of the ``batches``, pairs of a size and whatever ``loss`` takes.

    ``loss`` is called with the parameters and a batch and returns a scalar; the mean loss is weighted by size. The
    parameters have equal axes after the first. ``after`` is called with the parameters, detached, and the batch, when
    the step of the batch is taken.
    """
    leaves, sizes = [each.clone().requires_grad_() for each in parameters], [len(each) for each in parameters]
    optimizer = torch.optim.Adam(leaves, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    assert moments.first is not None and moments.second is not None
    parts = zip(leaves, moments.first.clone().split(sizes), moments.second.clone().split(sizes), strict=True)
    for leaf, first, second in parts:
        taken = torch.tensor(float(moments.steps), device=leaf.device)
        optimizer.state[leaf] = {"step": taken, "exp_avg": first, "exp_avg_sq": second}
    total, seen, steps = 0.0, 0, moments.steps
    for size, batch in batches:
        value = loss(leaves, batch)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        if after is not None:
            after([leaf.detach() for leaf in leaves], batch)
        steps, seen = steps + 1, seen + size
        total += float(value.detach()) * size
    first, second = (torch.cat([optimizer.state[leaf][name] for leaf in leaves]) for name in ("exp_avg", "exp_avg_sq"))
    return Descent([leaf.detach() for leaf in leaves], first, second, steps, total / max(seen, 1))
