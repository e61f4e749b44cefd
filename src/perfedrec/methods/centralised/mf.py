"""Matrix factorisation with a pairwise loss (Rendle et al., UAI 2009, BPR-MF)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.compiled import usable
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.methods.centralised.descent import BETAS, EPSILON
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, VectorMethod, Vectors, VectorSettings, bpr, triples


class MFSettings(VectorSettings):
    """Options of matrix factorisation."""

    optimizer: Literal["adam", "sgd"] = Field(
        "adam", description='"sgd": a plain step for each interaction, as in the paper, whatever the batch_size'
    )

    def idle(self) -> dict[str, str]:
        return {"batch_size": "optimizer = sgd"} if self.optimizer == "sgd" else {}


class MF(VectorMethod):
    """``score_ui = p_u . q_i``, trained with BPR.

    With ``optimizer = "sgd"`` an epoch is LearnBPR (figure 4 of the paper): one triple of a user, an item and another
    item after the other, each with a step on its three rows, ``r <- r - learning rate (gradient + l2 r)``.

    Departs from the paper: Adam over batches where nothing else is said; epochs over all interactions instead of a
    bootstrap of triples; negatives that are distinct within a user and an epoch; no item biases; one weight of the L2
    term for all rows.

    On the processor an epoch is one compiled kernel with one thread. It takes the same steps as torch; only the
    rounding differs. In torch, steps of one triple each are slow.
    """

    Options: ClassVar[type[Settings]] = MFSettings
    settings: MFSettings

    def init(self, data: Training, key: Key) -> Vectors:
        first = super().init(data, key)
        return first if self.settings.optimizer == "adam" else Vectors(first.users, first.items)

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        return bpr(users, items, batch) + self.decay(users, items, batch)

    def epoch(self, state: Vectors, data: Training, key: Key) -> tuple[Vectors, float]:
        rows = data.rows
        if self.settings.optimizer == "sgd":
            return descend_by_triples(self.settings, state, triples(data, key))
        if not usable(state.users, state.items, state.first, state.second, rows.items, rows.segments):
            return super().epoch(state, data, key)
        return _epoch(self.settings, state, triples(data, key))


def descend_by_triples(
    settings: VectorSettings, state: Vectors, drawn: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Vectors, float]:
    """The next state and the mean loss after a plain step for each of the triples ``drawn``, which are what
    :func:`triples` returns, in their order."""
    users, items, steps = state.users.clone(), state.items.clone(), drawn[3].numel()
    step = settings.step_of_epoch(state.steps, steps)
    if usable(users, items, *drawn) and users.dtype == torch.float32:
        from perfedrec.methods.centralised import kernels

        arrays = tuple(each.numpy() for each in drawn)
        total = kernels.bpr_triples(users.numpy(), items.numpy(), arrays, step, settings.l2)
    else:
        total = _triples_by_torch(step, settings.l2, users, items, drawn)
    return Vectors(users, items, steps=state.steps + steps), total / max(steps, 1)


def _triples_by_torch(
    step: float, l2: float, users: Tensor, items: Tensor, drawn: tuple[Tensor, Tensor, Tensor, Tensor]
) -> float:
    """The steps on ``users`` and ``items``, in place; returns the sum of the loss."""
    total = torch.zeros((), dtype=torch.float64, device=users.device)
    for triple in drawn[3].tolist():
        places = [(table, int(rows[triple])) for table, rows in zip((users, items, items), drawn[:3], strict=True)]
        user, item, other = rows = [table[row].clone() for table, row in places]
        margin = user @ (other - item)
        slope = torch.sigmoid(margin)
        total += functional.softplus(margin) + 0.5 * l2 * sum(row.square().sum() for row in rows)
        gradients = slope * (other - item), -slope * user, slope * user
        for (table, place), row, gradient in zip(places, rows, gradients, strict=True):
            table[place] = row - step * (gradient + l2 * row)
    return float(total)


def _epoch(
    settings: VectorSettings, state: Vectors, drawn: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Vectors, float]:
    """The next state and the mean loss, by kernels; ``drawn`` is what :func:`triples` returns."""
    from perfedrec.methods.centralised import kernels

    assert state.first is not None and state.second is not None
    n_users, n_rows, width = state.users.shape[0], *state.first.shape
    n, size = drawn[3].numel(), settings.batch_size
    n_batches = -(-n // size)
    table = np.empty((n_rows, 3, width), np.float32)  # side by side: a visit needs all three
    parts = (slice(0, n_users), 0, state.users), (slice(n_users, None), 0, state.items)
    for place, kind, values in (*parts, (slice(None), 1, state.first), (slice(None), 2, state.second)):
        table[place, kind] = values.numpy()
    visits = tuple(np.empty(3 * n, np.int32) for _ in range(3))  # only what is written to takes memory
    places, upcoming = np.empty((n, 3), np.int32), np.empty(n_rows, np.int32)
    limits = np.empty(n_batches + 1, np.int64)
    kernels.find_visits(tuple(each.numpy() for each in drawn), n_users, size, places, visits, limits, upcoming)
    options = settings.l2, settings.step_of_epoch(state.steps, n_batches), *BETAS
    steps = later_steps(state.steps + 1, n_batches)
    total = kernels.bpr_epoch(table, places, visits, limits, upcoming, size, options, steps)
    users, items = (torch.from_numpy(table[part, 0].copy()) for part in (slice(0, n_users), slice(n_users, None)))
    first, second = (torch.from_numpy(table[:, kind].copy()) for kind in (1, 2))
    return Vectors(users, items, first, second, state.steps + n_batches), total / max(n, 1)


def later_steps(first: int, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n + 1] the sum of the weights of all steps of Adam from step s on, for the ``n + 1`` steps from number ``first``
    on; and [n + 1] the sum of these weights times Adam's epsilon, on the scale of the second moment of step s.

    A number whose gradient is 0 after step s has moments ``m beta1^k`` and ``v beta2^k`` in step s + k, which adds
    ``- learning rate * w m / (sqrt(v) + e)`` to it. Here ``w = r^k sqrt(1 - beta2^(s + k)) / (1 - beta1^(s + k))`` with
    ``r = beta1 / sqrt(beta2)``, and ``e = epsilon sqrt((1 - beta2^(s + k)) / beta2^k)``. The sums are computed
    backwards, from so far on that the beginning does not matter.
    """
    steps = np.arange(first, first + n + 600, dtype=np.float64)
    unbiased = np.sqrt(1 - BETAS[1] ** steps)
    weights = unbiased / (1 - BETAS[0] ** steps)
    paths = _discounted(weights, BETAS[0] / math.sqrt(BETAS[1]))
    epsilons = _discounted(weights * EPSILON * unbiased, BETAS[0] / BETAS[1])
    return paths[: n + 1], epsilons[: n + 1]


def _discounted(values: NDArray[np.float64], ratio: float) -> NDArray[np.float64]:
    """The sum of all values from each one on, the k-th of them times ``ratio^k``."""
    sums, after = np.empty_like(values), 0.0
    for place in range(values.size - 1, -1, -1):
        sums[place] = after = values[place] + ratio * after
    return sums
