"""What an attack has done: how many honest users see the targets, and how good their lists are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.types import block_rows
from perfedrec.data import Dataset
from perfedrec.evaluation import Held, Recommender
from perfedrec.evaluation.sample import of_sample
from perfedrec.runs.result import ranking

ACTIVITY = ("least active", "middle", "most active")
"""The names of the thirds of honest users by their number of training items."""


@dataclass(frozen=True)
class Group:
    """A group of honest users: how many, the exposure of the targets among them, and their test metrics."""

    name: str
    users: int
    exposure: float
    recall: float
    ndcg: float


@dataclass(frozen=True)
class Exposure:
    """The figures of one trained model.

    ``exposure`` is ER@k: the share of the honest users without a target in their training data in whose k best items it
    stands, the mean over ``targets`` (PipAttack, WSDM 2022, eq. 3); ``by_target`` has it for each. ``recall``
    and ``ndcg`` are the test metrics of all honest users at k. ``groups`` has the same for thirds of the users by
    activity and, where the model has clusters, for each cluster.
    """

    k: int
    exposure: float
    recall: float
    ndcg: float
    by_target: tuple[float, ...]
    groups: tuple[Group, ...]
    best_round: int = 0

    def plain(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return asdict(self)

    @staticmethod
    def read(stored: Mapping[str, Any]) -> Exposure:
        """The figures that :meth:`plain` gave. Raises :class:`KeyError` or :class:`TypeError` for other content."""
        groups = tuple(Group(**each) for each in stored["groups"])
        return Exposure(**{**stored, "by_target": tuple(stored["by_target"]), "groups": groups})


def measure(
    recommender: Recommender, dataset: Dataset, n_honest: int, targets: Tensor, k: int = 20, best_round: int = 0
) -> Exposure:
    """The figures of a model for the first ``n_honest`` users of its training data, with the items ``targets`` [t].

    The test split is ranked once. Lists for the exposure leave out training items alone, as those that users get.
    """
    honest = torch.arange(n_honest)
    shown, missing = _shown(recommender, honest, targets, k)
    by_target = [_rate(shown[:, each], missing[:, each]) for each in range(targets.numel())]
    ranks, test, hide = ranking(recommender, dataset, "test")
    same = dataset.new_users is None  # else other users are tested
    groups = [("all", torch.ones(n_honest, dtype=torch.bool)), *_activity(dataset, n_honest)]
    groups += _clusters(recommender, honest)
    found = []
    for name, members in groups:
        held = test if name == "all" else _of(test, members) if same else None
        metrics = {} if held is None or not held.items.numel() else ranks.evaluate(held, (k,), hide)
        rates = [_rate(shown[members, each], missing[members, each]) for each in range(targets.numel())]
        figures = float(np.mean(rates)), metrics.get(f"recall@{k}", 0.0), metrics.get(f"ndcg@{k}", 0.0)
        found.append(Group(name, int(members.sum()), *figures))
    everybody = found.pop(0)
    return Exposure(
        k=k,
        exposure=everybody.exposure,
        recall=everybody.recall,
        ndcg=everybody.ndcg,
        by_target=tuple(by_target),
        groups=tuple(found),
        best_round=best_round,
    )


def _shown(recommender: Recommender, users: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """bool [n, t] whether each target is among the ``k`` best items of each user, and whether the user lacks it."""
    shown, missing = [], []
    for block in users.split(recommender.ranked_at_once):
        values, lists = recommender.best(block, k)
        there = (lists[:, :, None] == targets) & (values > -torch.inf)[:, :, None]
        shown.append(there.any(1))
        rows, _ = block_rows(recommender.offsets, recommender.items, block)
        own = torch.zeros(block.numel(), targets.numel(), dtype=torch.bool)
        for column, target in enumerate(targets.tolist()):
            own[rows.segments[rows.items == target], column] = True
        missing.append(~own)
    return torch.cat(shown), torch.cat(missing)


def _rate(shown: Tensor, missing: Tensor) -> float:
    """The share of the users who lack an item to whom it is shown; 0 where nobody lacks it."""
    n = int(missing.sum())
    return float((shown & missing).sum()) / n if n else 0.0


def _of(held: Held, members: Tensor) -> Held:
    """The held-out items of the ``members`` [n_honest] alone."""
    chosen = torch.zeros(held.offsets.numel() - 1, dtype=torch.bool)
    chosen[: members.numel()] = members
    return of_sample(held, chosen)


def _activity(dataset: Dataset, n_honest: int) -> list[tuple[str, Tensor]]:
    """The thirds of the honest users by their number of training items; of equal ones the first users come first."""
    places = np.empty(n_honest, dtype=np.int64)
    places[np.argsort(dataset.train.degrees[:n_honest], kind="stable")] = np.arange(n_honest)
    thirds = torch.from_numpy(places * len(ACTIVITY) // max(n_honest, 1))
    return [(name, thirds == number) for number, name in enumerate(ACTIVITY)]


def _clusters(recommender: Recommender, honest: Tensor) -> list[tuple[str, Tensor]]:
    """The clusters of the honest users, where the model has any."""
    found = []
    for users in honest.split(recommender.ranked_at_once):
        embedding = recommender.embedding(users)
        if embedding is None or embedding.groups is None:
            return []
        found.append(embedding.groups)
    groups = torch.cat(found)
    return [(f"cluster {each}", groups == each) for each in groups.unique().tolist()]
