"""What is computed for a report alone: intervals of means, and groups of users by activity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` cases with its interval; ``low`` and ``high`` are ``None`` where nothing varies."""

    value: float
    low: float | None
    high: float | None
    n: int

    def interval(self) -> str:
        """For people: ``0.0233 to 0.0262``."""
        return "none" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"


def mean_of(values: NDArray[np.float64]) -> Mean:
    """Mean of ``values`` [n], 1 or more, with its 95 % t interval."""
    n, value = values.size, float(values.mean())
    error = float(stats.sem(values)) if n > 1 else 0.0
    if error == 0.0:
        return Mean(value, None, None, n)
    low, high = stats.t.interval(LEVEL, n - 1, loc=value, scale=error)
    return Mean(value, float(low), float(high), n)


@dataclass(frozen=True)
class Group:
    """Users with between ``fewest`` and ``most`` training interactions, and the means of their metrics."""

    fewest: int
    most: int
    means: dict[str, Mean]

    @property
    def users(self) -> int:
        return next(iter(self.means.values())).n

    @property
    def label(self) -> str:
        return f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"


def by_activity(users: pl.DataFrame, metrics: Sequence[str]) -> list[Group]:
    """Test users in quartiles of their training ``interactions``; fewer groups where many users have equally many."""
    activity = users["interactions"].to_numpy()
    edges = np.unique(np.quantile(activity, (0.25, 0.5, 0.75)))
    place = np.searchsorted(edges, activity)
    groups = []
    for number in np.unique(place):
        members = place == number
        means = {name: mean_of(users[name].to_numpy()[members]) for name in metrics}
        groups.append(Group(int(activity[members].min()), int(activity[members].max()), means))
    return groups
