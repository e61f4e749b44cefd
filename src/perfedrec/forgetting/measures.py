"""How a model that has forgotten users is measured: lists, scores, membership, and the accuracy of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.data import Dataset, Interactions
from perfedrec.evaluation import Recommender
from perfedrec.evaluation.ranking import CUTOFFS, Totals
from perfedrec.runs.result import ranking

LENGTH = 20
"""The length of the lists that are compared."""

SCORED = 1000
"""Users whose scores are compared, at most: a fixed number of scores stands for all."""


@dataclass(frozen=True)
class Distance:
    """How far two models are from each other: ``overlap``, the mean share of items that two lists of
    :data:`LENGTH` items of the same user have in common, and ``scores``, the root mean square of the difference of
    scores, in standard deviations of the second model's scores of the same user."""

    overlap: float
    scores: float


@dataclass(frozen=True)
class Membership:
    """How well one can tell, with a model alone, which items forgotten users had given to training.

    ``values`` are the AUC of each user (0.5: not at all). ``cases`` counts users that the attack could be made on.
    """

    values: tuple[float, ...]

    @property
    def cases(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else float("nan")

    def above(self, other: Membership) -> tuple[float, float]:
        """By how much the AUC is above that of the ``other`` model, and half the width of the 95 % interval of this
        mean difference over users (NaN for fewer than two users)."""
        apart = np.array(self.values) - np.array(other.values)
        half = 1.96 * float(apart.std(ddof=1)) / apart.size**0.5 if apart.size > 1 else float("nan")
        return float(apart.mean()) if apart.size else float("nan"), half


def distance(model: Recommender, other: Recommender, users: Tensor) -> Distance:
    """How far two models are from each other for ``users`` [B], who have the same items in both."""
    shared = []
    for block in users.split(512):
        lists, others = (each.recommend(block, LENGTH)[0] for each in (model, other))
        shared.append((lists[:, :, None] == others[:, None, :]).any(2).to(torch.float64).mean(1))
    squares = []
    few = users[:: max(users.numel() // SCORED, 1)]
    for block in few.split(512):
        mine, theirs = model.raw_scores(block), other.raw_scores(block)
        spread = theirs.std(1, keepdim=True).clamp(min=1e-12)
        squares.append(((mine - theirs) / spread).square().mean(1))
    overlap = float(torch.cat(shared).mean()) if shared else float("nan")
    return Distance(overlap, float(torch.cat(squares).mean().sqrt()) if squares else float("nan"))


def membership(model: Recommender, dataset: Dataset, users: Sequence[int], seed: int = 0) -> Membership:
    """An attack on the membership of ``users`` of a ``dataset`` which still has their data.

    The attacker has the shared model and knows one half of a user's training items. It makes a new user of them, scores
    the other half, and the items that the same user held out and nobody trained on. If training has seen the user, the
    model joins what it has seen together: the other half scores higher. The AUC says how often. A user who never took
    part has an AUC that is not 0.5 either, because items of training and held-out items differ (in popularity, in
    time): so the AUC is compared with that of the model that was trained without the user.
    """
    held_parts = [dataset.valid] if dataset.new_users is not None else [dataset.valid, dataset.test]
    key, values = Key(seed).fold("membership"), []
    for user in users:
        own = torch.from_numpy(_items(dataset.train, user).copy())
        held = torch.from_numpy(np.unique(np.concatenate([_items(part, user) for part in held_parts])))
        if own.numel() < 2 or not held.numel():
            continue
        order = uniform(key.fold("user", user).spread(own), 1).squeeze(1).argsort()
        known, members = own[order[: own.numel() // 2]].sort().values, own[order[own.numel() // 2 :]]
        scores = model.scores_of_new_user(known.to(model.device)).cpu()
        inside, outside = scores[members], scores[held]
        wins = (inside[:, None] > outside).to(torch.float64) + 0.5 * (inside[:, None] == outside)
        values.append(float(wins.mean()))
    return Membership(tuple(values))


@dataclass(frozen=True)
class Change:
    """A metric of the same tested ``users`` in two models: its means ``before`` and ``after``, and half the width of
    the 95 % interval of its mean change over users (NaN for fewer than two users)."""

    before: float
    after: float
    half: float
    users: int

    @staticmethod
    def of(metric: str, before: Totals, after: Totals) -> Change:
        """The change of a ``metric`` from the model of one ranking to that of another."""
        first, second = (each.by_user()[1][metric] if each.users else torch.zeros(0) for each in (before, after))
        apart = (second - first).to(torch.float64)
        n = apart.numel()
        half = 1.96 * float(apart.std()) / n**0.5 if n > 1 else float("nan")
        mean, then = (each.means().get(metric, 0.0) for each in (before, after))
        return Change(mean, then, half, n)


def accuracy(model: Recommender, dataset: Dataset, share: float = 1.0) -> Totals:
    """How a model ranks for the users of a ``dataset`` without the forgotten ones, on its test part."""
    recommender, held, hide = ranking(model, dataset, "test", share)
    return recommender.rank(held, CUTOFFS, hide)


def remaining(dataset: Dataset) -> Tensor:
    """The numbers of the users who were not forgotten, ascending."""
    gone = set(dataset.forgotten)
    return torch.tensor([user for user in range(dataset.n_users) if user not in gone], dtype=torch.int64)


def _items(part: Interactions, user: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return part.items[part.offsets[user] : part.offsets[user + 1]]
