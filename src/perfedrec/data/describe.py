"""A summary of interactions in a few numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from perfedrec.data.interactions import Interactions, Ints
from perfedrec.data.ties import last_ties
from perfedrec.data.times import time_unit, utc


def describe(interactions: Interactions | pl.DataFrame) -> dict[str, Any]:
    """Describe interactions, or a frame of them as :func:`perfedrec.data.formats.read` returns it.

    The result is ready for JSON: ``users``, ``items``, ``interactions``, ``duplicates`` (rows of a frame that repeat a
    pair), ``density`` (the share of all pairs of user and item that occur), ``user_degrees`` and ``item_degrees`` (each
    with min, q1, median, q3, mean, max and gini), ``first`` and ``last`` (times in UTC; None where unknown), and
    ``equal_times`` (None where times are unknown): of ``users`` with at least 3 interactions, for how many the ``last``
    interaction, and for how many the ``last_two``, are not determined by time.
    """
    rows = interactions.n_interactions if isinstance(interactions, Interactions) else interactions.height
    if isinstance(interactions, pl.DataFrame):
        interactions = Interactions.from_frame(interactions)
    pairs = interactions.n_users * interactions.n_items
    times, ties = interactions.timestamps, last_ties(interactions)
    unit = None if times is None or not times.size else time_unit(int(times.max()))
    return {
        "users": interactions.n_users,
        "items": interactions.n_items,
        "interactions": interactions.n_interactions,
        "duplicates": rows - interactions.n_interactions,
        "density": interactions.n_interactions / pairs if pairs else 0.0,
        "user_degrees": _distribution(interactions.degrees),
        "item_degrees": _distribution(interactions.item_degrees),
        "first": None if unit is None or times is None else utc(int(times.min()), unit).isoformat(),
        "last": None if unit is None or times is None else utc(int(times.max()), unit).isoformat(),
        "equal_times": None if ties is None else asdict(ties),
    }


def gini(values: Ints) -> float:
    """The Gini coefficient of counts [n], ``sum_i (2 i - n - 1) x_(i) / (n sum x)`` with ``x_(i)`` ascending.

    It is 0 where all counts are equal, and close to 1 where one count is much larger than all others.
    """
    ordered = np.sort(values)
    n, total = ordered.size, float(ordered.sum())
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered) / (n * total) if total else 0.0


def _distribution(counts: Ints) -> dict[str, float]:
    if not counts.size:
        return {}
    quartiles = dict(zip(("min", "q1", "median", "q3", "max"), np.quantile(counts, np.linspace(0, 1, 5)), strict=True))
    return {name: float(value) for name, value in quartiles.items()} | {
        "mean": float(counts.mean()),
        "gini": gini(counts),
    }
