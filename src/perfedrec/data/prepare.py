"""Preparing data: from logged ratings to implicit feedback, by a rating threshold, repeated rows, and a k-core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.data.interactions import Interactions, encode, unique_ids


@dataclass(frozen=True)
class Step:
    """The counts after one step of preparation."""

    what: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class PrepareReport:
    """The counts at the start and after each step. ``duplicates`` is the number of rows that repeated a pair."""

    steps: tuple[Step, ...]
    duplicates: int

    def lines(self) -> list[str]:
        """The report as lines, one for each step."""
        return [
            f"{step.what}: {counted(step.users, 'user')}, {counted(step.items, 'item')}, "
            f"{counted(step.interactions, 'interaction')}"
            for step in self.steps
        ]


def prepare(
    frame: pl.DataFrame, *, min_rating: float | None = None, k_core: int = 0
) -> tuple[pl.DataFrame, PrepareReport]:
    """Turn rows of user, item and optionally rating and timestamp into implicit feedback, sorted by user and time.

    The steps, in this order: rows rated below ``min_rating`` are removed (None: all rows count, whatever their rating);
    of the rows that repeat a pair of user and item, the earliest is kept; users and items with fewer than ``k_core``
    interactions are removed, again and again until there are none (the k-core of the bipartite graph). The result has
    no ratings. Raises :class:`DataError` where ``k_core`` is negative, where there are no ratings to compare with
    ``min_rating``, and where no interaction is left. A column position, the place in the file, stands in for times.
    """
    if k_core < 0:
        raise DataError(f"k_core must be at least 0, got {k_core}")
    steps = [_count(frame, "as read")]
    if min_rating is not None:
        frame = rated(frame, min_rating)
        steps.append(_count(frame, f"rated {min_rating:g} or more"))
    order = [name for name in ("user", "timestamp", "position", "item") if name in frame.columns]
    frame = frame.select(order).sort(order).unique(["user", "item"], keep="first", maintain_order=True)
    steps.append(_count(frame, "each pair of user and item once"))
    duplicates = steps[-2].interactions - steps[-1].interactions
    if k_core > 1:
        frame = frame.filter(pl.Series(_core(frame, k_core)))
        steps.append(_count(frame, f"{k_core}-core"))
    report = PrepareReport(tuple(steps), duplicates)
    if not frame.height:
        if not steps[0].interactions:
            raise DataError(
                "no interaction was read: there are no rows; expected a file with a row for each interaction"
            )
        asked = [f"a lower {name}" for name, value in (("min_rating", min_rating), ("k_core", k_core)) if value]
        expected = f"; expected {' or '.join(asked)}" if asked else ""
        raise DataError(f"no interaction is left after preparation ({'; '.join(report.lines())}){expected}")
    return frame, report


def unprepared(interactions: Interactions) -> PrepareReport:
    """The report on interactions with each pair once, of which none is removed."""
    sizes = interactions.n_users, int((interactions.item_degrees > 0).sum()), interactions.n_interactions
    return PrepareReport((Step("as read", *sizes), Step("each pair of user and item once", *sizes)), 0)


def rated(frame: pl.DataFrame, min_rating: float | None, where: str = "") -> pl.DataFrame:
    """The rows that are rated ``min_rating`` or more; all where it is None.

    Raises :class:`DataError` where there are no ratings; ``where`` comes before the message.
    """
    if min_rating is None:
        return frame
    if "rating" not in frame.columns:
        raise DataError(f"{where}the data have no ratings to compare with min_rating")
    return frame.filter(pl.col("rating") >= min_rating)


def _core(frame: pl.DataFrame, k: int) -> np.ndarray:
    """bool [rows] whether each row is in the k-core."""
    codes = [encode(frame[name], unique_ids(frame[name])) for name in ("user", "item")]
    rows = np.arange(frame.height)
    while True:
        keep = np.ones(rows.size, dtype=bool)
        for code in codes:
            keep &= np.bincount(code[rows])[code[rows]] >= k
        if keep.all():
            break
        rows = rows[keep]
    kept = np.zeros(frame.height, dtype=bool)
    kept[rows] = True
    return kept


def _count(frame: pl.DataFrame, what: str) -> Step:
    return Step(what, frame["user"].n_unique(), frame["item"].n_unique(), frame.height)
