"""Statistics that only reports need: confidence intervals of means, and groups of users by activity."""

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
    """A mean over ``n`` cases with its 95 % interval from ``low`` to ``high``.

    Both are ``None`` where all cases are equal.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def interval(self) -> str:
        """The interval as text: ``0.0233 to 0.0262``, or ``none``."""
        return "none" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"


def mean_of(values: NDArray[np.float64]) -> Mean:
    """The mean of ``values`` [n] (n at least 1) with its 95 % interval by Student's t distribution."""
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
    """Test users in four groups (quartiles) by their number of training interactions.

    ``users`` has a column ``interactions`` and one column for each of ``metrics``. Users with the same number of
    interactions are in the same group, so that there may be fewer than four groups.
    """
    activity = users["interactions"].to_numpy()
    edges = np.unique(np.quantile(activity, (0.25, 0.5, 0.75)))
    place = np.searchsorted(edges, activity)
    groups = []
    for number in np.unique(place):
        members = place == number
        means = {name: mean_of(users[name].to_numpy()[members]) for name in metrics}
        groups.append(Group(int(activity[members].min()), int(activity[members].max()), means))
    return groups
