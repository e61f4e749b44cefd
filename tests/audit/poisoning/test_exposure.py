"""Exposure of targets and accuracy, on lists that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec import Dataset, load
from perfedrec.audit.poisoning.exposure import Exposure, measure
from perfedrec.core.types import Embedding
from perfedrec.data.interactions import Interactions
from perfedrec.evaluation import Recommender

SCORES = torch.tensor(
    [  # 4 honest users and a malicious one, 5 items
        [9.0, 8.0, 1.0, 0.0, 0.5],
        [1.0, 2.0, 9.0, 8.0, 0.5],
        [1.0, 9.0, 2.0, 8.0, 0.5],
        [1.0, 9.0, 8.0, 2.0, 0.5],
        [0.0, 0.0, 0.0, 9.0, 9.0],
    ]
)


class Fixed(Recommender):
    """Recommends by :data:`SCORES`. Users 0 and 1 are of one cluster, the others of another."""

    def raw_scores(self, users: Tensor) -> Tensor:
        return SCORES[users].clone()

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return {"global": self.raw_scores(users)}

    def embedding(self, users: Tensor) -> Embedding:
        return Embedding(SCORES[users], SCORES, torch.tensor([0, 0, 1, 1, 1])[users])

    def for_new_users(self, offsets: Tensor, items: Tensor, order: Any = None) -> Recommender:
        raise NotImplementedError

    def records(self) -> dict[str, Any]:
        return {}

    def with_records(self, records: Any) -> Any:
        return self


def lists(*items: list[int]) -> Interactions:
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in items])])
    return Interactions(
        np.arange(5), np.arange(5), offsets, np.concatenate([np.array(each, dtype=int) for each in items])
    )


@pytest.fixture
def found() -> Exposure:
    some = load("synthetic:users=20,items=40,interactions_per_user=4")
    data = Dataset(
        "toy",
        lists([0], [0, 1], [4], [2, 4], [3, 4]),
        lists([], [], [], [], []),
        lists([1], [3], [0], [1], []),
        some.notes,
    )
    recommender = Fixed(torch.from_numpy(data.train.offsets.copy()), torch.from_numpy(data.train.items.copy()), 5)
    return measure(recommender, data, 4, torch.tensor([2, 3]), k=2)


def test_exposure_counts_honest_users_who_lack_the_target(found: Exposure) -> None:
    """Lists of two, without training items: user 0 gets 1, 2; user 1 gets 2, 3; user 2 gets 1, 3; user 3 gets 1, 3
    and has item 2 already. So item 2 is shown to 2 of 3, item 3 to 3 of 4; the malicious user does not count."""
    assert found.by_target == pytest.approx((2 / 3, 3 / 4))
    assert found.exposure == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_accuracy_is_that_of_honest_users(found: Exposure) -> None:
    """Held-out items 1, 3, 0, 1 of users 0 to 3 stand at places 1, 2, none, 1."""
    assert found.recall == pytest.approx(3 / 4)
    assert found.ndcg == pytest.approx((2 + 1 / np.log2(3)) / 4)


def test_groups_are_thirds_by_activity_and_clusters(found: Exposure) -> None:
    """By number of items: users 0 and 2 (one each), then 1 and 3 (two each); four users make thirds of 2, 1 and 1."""
    assert [(each.name, each.users) for each in found.groups] == [
        ("least active", 2),
        ("middle", 1),
        ("most active", 1),
        ("cluster 0", 2),
        ("cluster 1", 2),
    ]
    assert [each.exposure for each in found.groups] == pytest.approx([1 / 2, 1.0, 1 / 2, 3 / 4, 1 / 2])
    assert [each.recall for each in found.groups] == pytest.approx([1 / 2, 1.0, 1.0, 1.0, 1 / 2])


def test_figures_are_stored_and_read(found: Exposure) -> None:
    assert Exposure.read(found.plain()) == found
