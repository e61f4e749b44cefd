"""Where honest users' vectors lie, as far as an adversary can tell it from what clients receive.

All functions take vectors as rows. A target's score rises for a user if its row moves along the user's vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, normal
from perfedrec.core.sampling import choose

RATE = 0.05
"""The step of Adam with which users' vectors are fitted."""


def mean_direction(vectors: Tensor) -> Tensor:
    """[d] the mean of the directions of ``vectors`` [n, d], as a unit vector; zeros where there is none."""
    return functional.normalize(functional.normalize(vectors, dim=1).mean(0), dim=0)


def fitted_users(items: Tensor, lists: list[Tensor], key: Key, steps: int, start: Tensor | None = None) -> Tensor:
    """[n, d] vectors of the users with these ``lists`` of items, fitted to the rows ``items`` [m, d] by BPR.

    The loss is ``-sum log sigmoid(p_u q_i - p_u q_j)`` over a user's items i, with one random item j for each. It is
    minimised over the users' vectors alone, by a number of ``steps`` of Adam from ``start`` [n, d].
    """
    n, dim = len(lists), items.shape[1]
    owners = torch.repeat_interleave(torch.arange(n), torch.tensor([each.numel() for each in lists]))
    positives = torch.cat(lists)
    users = normal(key.fold("users").spread(torch.arange(n)), dim) * 0.01 if start is None else start.clone()
    rows = items / items.norm(dim=1).mean().clamp(min=1e-12)
    first, second = torch.zeros_like(users), torch.zeros_like(users)
    for step in range(1, steps + 1):
        order = choose(items.shape[0], items.shape[0], key.fold("negatives", step))
        pairs = rows[positives] - rows[order[torch.arange(positives.numel()) % order.numel()]]
        slopes = torch.sigmoid(-(users[owners] * pairs).sum(1))
        gradient = torch.zeros_like(users).index_add_(0, owners, -slopes[:, None] * pairs)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        users -= RATE * first / (1 - 0.9**step) / root
    return users


def popularity_direction(items: Tensor, popular: Tensor) -> Tensor:
    """[d] the direction in which rows look most like those of ``popular`` [p] items: the weights of a linear classifier
    of popular and other ``items`` [m, d], by ridge regression."""
    rows = (items - items.mean(0)).to(torch.float64)
    labels = torch.full((items.shape[0],), -1.0, dtype=torch.float64).index_fill_(0, popular, 1.0)
    gram = rows.T @ rows
    ridge = gram.diagonal().mean().clamp(min=1e-12) * torch.eye(gram.shape[0], dtype=torch.float64)
    found: Tensor = torch.linalg.solve(gram + ridge, rows.T @ (labels - labels.mean()))
    return functional.normalize(found.to(items.dtype), dim=0)


class Mined:
    """Popular items, found by how far their rows move (popular item mining of PIECK, ICDE 2024, algorithm 1).

    The changes of ``rounds`` item tables, each from the one before, are added up; the ``n`` items that moved farthest
    are taken for the most popular ones.
    """

    def __init__(self, n: int, rounds: int) -> None:
        self.n, self.rounds, self.seen = n, rounds, 0
        self._last: Tensor | None = None
        self._moved: Tensor | None = None

    def see(self, items: Tensor) -> None:
        """Look at an item table [m, d]. A table that was seen last counts once."""
        if self.seen > self.rounds or (self._last is not None and torch.equal(items, self._last)):
            return
        if self._last is not None:
            moved = (items - self._last).norm(dim=1)
            self._moved = moved if self._moved is None else self._moved + moved
        self._last, self.seen = items.clone(), self.seen + 1

    def popular(self, without: Tensor) -> Tensor | None:
        """[n] the items found, the farthest moved first, without those of ``without``; ``None`` before enough tables
        were seen."""
        if self._moved is None or self.seen <= self.rounds:
            return None
        order = self._moved.index_fill(0, without, -1.0).argsort(descending=True, stable=True)
        return order[: min(self.n, order.numel() - without.numel())]
