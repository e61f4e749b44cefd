"""Distances and membership, by models whose scores are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.data import Dataset
from perfedrec.data.dataset import Rows, assemble
from perfedrec.evaluation import RandomOrder, Recommender
from perfedrec.evaluation.ranking import Totals
from perfedrec.forgetting.measures import Change, Membership, distance, membership, remaining


class Known(Recommender):
    """Scores that are given, and for a new user those of :meth:`of_new`."""

    def __init__(self, offsets: Tensor, items: Tensor, scores: Tensor) -> None:
        super().__init__(offsets, items, scores.shape[1])
        self.given = scores

    def raw_scores(self, users: Tensor) -> Tensor:
        return self.given[users].clone()

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return {}

    def for_new_users(self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None) -> Known:
        self.asked = items.tolist()
        return Known(offsets, items, self.given[:1])

    def records(self) -> dict[str, Any]:
        return {}

    def with_records(self, records: Mapping[str, Any]) -> Self:
        return self


def made(scores: Tensor) -> Known:
    """A model for users without items."""
    return Known(torch.zeros(scores.shape[0] + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), scores)


def test_the_overlap_is_the_share_of_common_items_and_scores_are_compared_in_deviations() -> None:
    scores = torch.arange(40.0).repeat(2, 1)
    other = scores.clone()
    other[1] = other[1].flip(0)  # the best 20 become the worst 20
    users = torch.arange(2)
    assert distance(made(scores), made(scores), users).overlap == 1
    found = distance(made(scores), made(other), users)
    assert found.overlap == 0.5
    reversed_ = (scores[1] - other[1]).square().mean() / other[1].var()
    assert found.scores == pytest.approx(float((reversed_ / 2).sqrt()), rel=1e-6)


@pytest.fixture
def dataset() -> Dataset:
    """User 0 has items 0 to 3 in training, and 4 and 5 held out; user 1 has 0 to 5, and nothing held out."""
    ids = np.arange(2), np.arange(6)
    train = Rows(np.array([0] * 4 + [1] * 6), np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]), None)
    held = [Rows(np.array([0]), np.array([item]), None) for item in (4, 5)]
    return assemble("toy", *ids, [train, *held], "by hand")


@pytest.mark.parametrize(("held", "auc"), [(-1.0, 1.0), (1.0, 0.5), (2.0, 0.0)])
def test_membership_compares_the_other_half_with_held_out_items(held: float, auc: float, dataset: Dataset) -> None:
    scores = torch.tensor([[1.0, 1, 1, 1, held, held]])
    model = made(scores)
    found = membership(model, dataset, [0, 1])
    assert found.values == (auc,)  # of user 1 there is nothing to compare with
    assert len(model.asked) == 2
    assert set(model.asked) < {0, 1, 2, 3}
    assert membership(made(scores), dataset, [0]).values == found.values


def test_a_difference_has_the_interval_of_its_mean() -> None:
    above, half = Membership((0.9, 0.7)).above(Membership((0.6, 0.6)))
    assert above == pytest.approx(0.2)
    assert half == pytest.approx(1.96 * 0.1414213562 / 2**0.5)


def test_who_remains(dataset: Dataset) -> None:
    assert remaining(dataset.without_users([0])).tolist() == [1]


def test_the_change_of_a_metric_is_that_of_the_same_users() -> None:
    def ranked(*values: float) -> Totals:
        totals = Totals((20,), 5)
        for user, value in enumerate(values):  # the last user first
            totals.add_values({"ndcg@20": torch.tensor([value])}, None, torch.tensor([9 - user]))
        return totals

    change = Change.of("ndcg@20", ranked(0.5, 1.0, 0.0), ranked(0.25, 1.0, 0.0))
    assert (change.before, change.after, change.users) == (0.5, pytest.approx(1.25 / 3), 3)
    assert change.half == pytest.approx(1.96 * float(np.std([-0.25, 0, 0], ddof=1)) / 3**0.5)
    assert Change.of("ndcg@20", Totals((20,), 5), Totals((20,), 5)).users == 0
