"""How well a model ranks the items that users hold out: sums over users, taken as every other sum is.

The question is put to clients beside the rounds (:data:`perfedrec.core.algorithm.EVALUATE`). A client ranks with the
served model and its own state, and hands over the value of each metric; only sums over users leave the nodes. The
number of clients in a sum is that of the users who hold out items. Rounding to the fixed point of the sums apart, their
means are those of :meth:`perfedrec.evaluation.recommender.Recommender.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.algorithm import Algorithm, B, C
from perfedrec.core.scoring import Scoring
from perfedrec.core.types import Rows, Update
from perfedrec.evaluation import Held, RandomOrder
from perfedrec.evaluation.best import rank_scoring
from perfedrec.evaluation.holdout import TEST, VALID
from perfedrec.evaluation.ranking import METRICS, metrics
from perfedrec.evaluation.sample import ERROR, standard_error

PARTS = {"valid": VALID, "test": TEST}
"""The parts of held-out items by name."""


@dataclass(frozen=True)
class Question:
    """What users are asked: how well the items of a ``part`` ("valid" or "test") are ranked in lists of the lengths
    ``ks`` by the model after a number of rounds, ``played``.

    Where a ``share`` of the users below 1 is asked, a fixed sample of them, the sum of squares of the ``metric`` tells
    its standard error.

    Nodes keep client states from one question to the next, because the best round may be one of the past: those after
    the numbers ``keep`` of rounds, and after this one.
    """

    part: str
    ks: tuple[int, ...]
    played: int
    keep: tuple[int, ...] = ()
    metric: str = ""
    share: float = 1.0

    @property
    def names(self) -> list[str]:
        """The names of the metrics, in the order of the numbers in a sum."""
        return [f"{name}@{k}" for k in self.ks for name in METRICS]

    @property
    def squared(self) -> list[str]:
        """The metrics of which squares are in a sum as well, after the others of the same setting."""
        return [self.metric] if self.share < 1 else []

    @property
    def number(self) -> int:
        """What tells the sum of this question from other sums of a run; it is below the numbers of rounds."""
        return -2 - 2 * self.played - (self.part == "test")

    @staticmethod
    def sum_called(number: int) -> str:
        """The sum with a ``number`` in words: of a question, of a round, or of the degrees before the first round."""
        if number >= 0:
            return f"the sum of round {number}"
        if number == -1:
            return "the sum of the item degrees"
        played, is_test = divmod(-2 - number, 2)
        return f"the sum of the {'test' if is_test else 'validation'} metrics after {played} rounds and phases"

    def n_choices(self, algorithm: Algorithm[Any, Any, Any]) -> int:
        """How many settings of the model are compared: test items choose nothing."""
        return algorithm.n_choices if self.part == "valid" else 1

    def empty(self, algorithm: Algorithm[Any, Any, Any], n_items: int) -> Aggregate:
        """The answer of no user."""
        size = self.n_choices(algorithm) * (len(self.names) + len(self.squared))
        return replace(Aggregate.empty(n_items, 1), dense=torch.zeros(size, dtype=torch.float64))

    def means(self, total: Aggregate) -> list[dict[str, float]]:
        """For each setting of the model, the means over the users of a sum, with their number as "users"."""
        assert total.dense is not None
        n, found = float(total.clients), []
        for each in (total.dense / FIXED_POINT).split(len(self.names) + len(self.squared)):
            sums = dict(zip(self.names, each.tolist(), strict=False))
            found.append({**{name: value / n for name, value in sums.items()}, "users": n})
            if self.squared:
                found[-1][ERROR] = standard_error(sums[self.metric], float(each[-1]), n, self.share)
        return found


def best_of(choices: Sequence[Mapping[str, float]], metric: str) -> int:
    """The number of the setting with the largest ``metric``; of equal ones the first."""
    return max(range(len(choices)), key=lambda number: (choices[number][metric], -number))


@dataclass(frozen=True)
class Wanted:
    """What lists of the lengths ``ks`` should contain: ``held``. Items in ``hidden`` are not ranked, and ``order``
    decides between equal scores. All three number users in the same way."""

    held: Held
    hidden: Held
    order: RandomOrder
    ks: tuple[int, ...]

    def lists(self, scoring: Scoring, rows: Rows, users: Tensor) -> list[Tensor]:
        """For each setting of a ``scoring`` the best items [B, k] of ``users`` [B], who have the training items
        ``rows``; -1 after the end of a list."""
        segments, items = self.hidden.rows(users)
        segments, items = torch.cat([rows.segments, segments]), torch.cat([rows.items, items])
        found = rank_scoring(scoring, max(self.ks), users, self.order, segments, items)
        return [lists.masked_fill(best == -torch.inf, -1) for best, lists in found]

    def values(self, lists: Tensor, users: Tensor, n_items: int) -> dict[str, Tensor]:
        """The metrics, float64 [B] each, of ``users`` [B] by their ``lists`` [B, k]."""
        hits = self.held.hits(users, lists.clamp(min=0), n_items) & (lists >= 0)
        return metrics(hits, self.held.counts(users), self.ks)


def evaluate_users(
    algorithm: Algorithm[Any, B, C],
    broadcast: B,
    rows: Rows,
    client_state: C,
    users: Tensor,
    wanted: Wanted,
    n_choices: int = 1,
    squared: Sequence[str] = (),
) -> tuple[Update, list[tuple[dict[str, Tensor], Tensor]]]:
    """What B users hand over, who all have held-out items: ``dense`` float64 [B, n D], the values of D metrics for each
    of ``n_choices`` settings of the model, or for the served one alone, with the squares of those that are ``squared``
    after the others of a setting. ``users`` [B] are their numbers in what is
    ``wanted``. What stays with them, for each setting: the values [B] of each metric, and the lists [B, k]."""
    scoring = algorithm.scoring(broadcast, rows, client_state, n_choices > 1)
    lists = wanted.lists(scoring, rows, users)
    found = [(wanted.values(each, users, scoring.n_items), each) for each in lists]
    if len(found) < n_choices:  # nothing can be chosen yet
        found *= n_choices
    names = [f"{name}@{k}" for k in wanted.ks for name in METRICS]
    dense = [[*(values[name] for name in names), *(values[name].square() for name in squared)] for values, _ in found]
    update = Update(
        users=rows.users,
        groups=torch.zeros_like(rows.users),
        weights=torch.ones(rows.n_users, device=rows.users.device),
        dense=torch.stack([column for columns in dense for column in columns], dim=1),
    )
    return update, found
