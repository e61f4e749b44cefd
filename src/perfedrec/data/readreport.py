"""What the reader decided about a file, and what it found there, as sentences and as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from perfedrec.data.roles import KNOWN_NAMES, Place, plain_name

FEW = 21  # distinct ratings that are shown one by one; half stars from 0 to 10 are as many
FORMS = {
    "adjacency": "each line is a user and its items",
    "sequences": "each line is a user and its items in the order of time",
    "negatives": "each line is (user,item) and negatives",
    "netflix": "blocks of an item and the lines of its users: user, rating, date",
}
SHORT = {"timestamp": "time"}


@dataclass(frozen=True)
class Ratings:
    """The ratings of a file: ``low``, ``high``, ``mean``, and ``shares`` of the values where these are few.

    Where the ratings are a scale, ``middle`` is the lowest rating that is not below the middle of the scale, and
    ``below`` is the share of lower ratings. ``negatives`` is the number of rows of rating 0 that were left out, because
    0 and 1 are the only ratings.
    """

    low: float
    high: float
    mean: float
    shares: Mapping[float, float] = field(default_factory=dict)
    middle: float | None = None
    below: float = 0.0
    negatives: int = 0

    @staticmethod
    def of(values: pl.Series, name: str | None = None) -> Ratings | None:
        """Describe ratings, which come from a column ``name``; ``None`` where there are none."""
        if not values.len():
            return None
        counts = values.value_counts().sort(values.name)
        distinct = [float(each) for each in counts[values.name]]
        low, high, mean = distinct[0], distinct[-1], float(counts.select(pl.col(values.name).dot("count")).item())
        shares, middle, below = {}, None, 0.0
        if len(distinct) <= FEW:
            shares = {value: count / values.len() for value, count in zip(distinct, counts["count"], strict=True)}
            counted = name is not None and plain_name(name) in KNOWN_NAMES["rating"][1]
            if len(distinct) > 2 and low >= 0 and high <= 100 and not counted:
                middle = next(value for value in distinct if value >= (low + high) / 2)
                below = sum(share for value, share in shares.items() if value < middle)
        return Ratings(low, high, mean / values.len(), shares, middle, below)

    def lines(self) -> list[str]:
        """The ratings in sentences."""
        if self.low == self.high:
            return [f"ratings: all {self.low:g}"]
        line = f"ratings: {self.low:g} to {self.high:g}, mean {self.mean:.3g}"
        if self.shares:
            line += "; " + ", ".join(f"{value:g}: {share:.0%}" for value, share in self.shares.items())
        lines = [line]
        if self.negatives:
            lines.append(
                f"the ratings are 0 and 1: the {self.negatives:,} rows of 0 are read as negatives and left out "
                "(--min-rating 0 keeps them)"
            )
        if self.middle is not None:
            lines.append(
                f"all ratings count as interactions, also the {self.below:.0%} below the middle of the scale; "
                f"--min-rating {self.middle:g} leaves these out"
            )
        return lines

    def facts(self) -> dict[str, Any]:
        """The ratings as figures, ready for JSON."""
        shares = {f"{value:g}": share for value, share in self.shares.items()}
        return {"min": self.low, "max": self.high, "mean": self.mean, "shares": shares, "negatives": self.negatives}


@dataclass(frozen=True)
class ReadReport:
    """How a file was read.

    ``format`` is the format; ``places`` are the columns by role (empty where the format has no columns) and ``header``
    says whether the first line names them (``None`` where this is no question). ``unit`` is the unit or form of the
    times. ``rows`` were read, and ``blank`` lines are blank. ``ratings`` describes the ratings, and ``remarks`` are
    further sentences.
    """

    path: Path
    format: str
    places: Mapping[str, Place]
    header: bool | None
    unit: str | None
    rows: int
    blank: int = 0
    ratings: Ratings | None = None
    remarks: tuple[str, ...] = ()

    def roles(self) -> str:
        """The columns of the roles in one line: ``user = column 1 "uid", item = column 2 "iid"; header: yes``."""
        if not self.places:
            return FORMS[self.format]
        parts = []
        for role, place in self.places.items():
            unit = f" {self._in_unit()}" if role == "timestamp" and self.rows else ""
            at = f'"{place.name}"' if self.format == "json" else place
            parts.append(f"{SHORT.get(role, role)} = {at}{unit}")
        header = "" if self.header is None else f"; header: {'yes' if self.header else 'no'}"
        return ", ".join(parts) + header

    def _in_unit(self) -> str:
        unit = self.unit or ""
        return unit if unit.startswith("such as") else f"as {unit}" if "/" in unit or "YY" in unit else f"in {unit}"

    def lines(self) -> list[str]:
        """The report in sentences."""
        blank = f", {self.blank:,} blank line{'s' * (self.blank != 1)}" if self.blank else ""
        count = f"{self.rows:,} row{'s' * (self.rows != 1)}{blank}"
        ratings = self.ratings.lines() if self.ratings else []
        return [f"read as {self.format}: {self.roles()}", count, *ratings, *self.remarks]

    def facts(self) -> dict[str, Any]:
        """The report as figures, ready for JSON."""
        return {
            "format": self.format,
            "columns": {role: {"position": place.position, "name": place.name} for role, place in self.places.items()},
            "header": self.header,
            "time": self.unit,
            "rows": self.rows,
            "blank_lines": self.blank,
            "ratings": self.ratings.facts() if self.ratings else None,
            "remarks": list(self.remarks),
        }


def of_parts(reports: Sequence[ReadReport]) -> tuple[str, ...]:
    """Sentences about the files of a split, the first of which is for training; equal ones are said once."""
    first, *others = reports
    lines = [f"{first.path.name}, {line}" if i == 0 else line for i, line in enumerate(first.lines())]
    for report in others:
        head, count = report.lines()[:2]
        same = (report.format, report.roles()) == (first.format, first.roles())
        lines.append(f"{report.path.name}, {'read in the same way' if same else head}; {count}")
        lines += [f"{report.path.name}: {line}" for line in report.remarks]
    return tuple(lines)
