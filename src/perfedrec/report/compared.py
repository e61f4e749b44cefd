"""What the charts of a comparison show: a method on one data set, with all its finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perfedrec.compare.schema import ComparisonEntry, Spread, SummaryEntry
from perfedrec.report.page import Height
from perfedrec.report.statistics import Mean
from perfedrec.report.style import BANDS, COLOURS, DASHES, SYMBOLS
from perfedrec.runs.folder import Entry

ALPHA = 0.05
"""A difference is called significant where its adjusted p-value is below this."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a method: its seed, test metrics and history, and the processor seconds of its processes.

    ``n_phases`` is the number of rounds before training, and ``best`` the number of the best round.
    """

    seed: int
    test: dict[str, float]
    history: Sequence[Entry]
    n_phases: int
    best: int
    seconds: float | None


@dataclass(frozen=True)
class Compared:
    """A method on a data set with ``users`` users.

    ``summary`` is its entry in results.json, ``runs`` are its finished runs, and ``means`` are its metrics averaged
    over users, with their intervals. ``place`` is the method's number among all methods; it gives the colour and the
    symbol.
    """

    label: str
    place: int
    users: int
    summary: SummaryEntry
    runs: Sequence[FinishedRun]
    means: dict[str, Mean]

    @property
    def test(self) -> dict[str, Spread]:
        """Test metrics, each with mean and standard deviation over seeds."""
        return self.summary.get("test", {})

    @property
    def comparison(self) -> ComparisonEntry | None:
        """The comparison with the reference."""
        return self.summary.get("comparison")

    @property
    def colour(self) -> str:
        return COLOURS[self.place % len(COLOURS)]

    @property
    def band(self) -> str:
        return BANDS[self.place % len(BANDS)]

    @property
    def dash(self) -> str:
        return DASHES[self.place % len(DASHES)]

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.place % len(SYMBOLS)]


def significant(comparison: ComparisonEntry) -> bool:
    """Whether a method differs from the reference by more than chance."""
    return comparison["p_adjusted"] < ALPHA


def verdict(comparison: ComparisonEntry | None) -> str:
    """The outcome of a comparison in words."""
    if comparison is None:
        return "none"
    if not significant(comparison):
        return "no difference shown"
    return "better" if comparison["difference"] > 0 else "worse"


def hover_text(label: str) -> str:
    """A label with the characters escaped that have a meaning in plotly's hover texts."""
    return label.replace("<", "&lt;").replace("%", "&#37;")


def height_of(rows: int) -> Height:
    """The height of a chart with ``rows`` methods below each other."""
    return "short" if rows < 5 else "normal" if rows < 11 else "tall" if rows < 19 else "huge"
