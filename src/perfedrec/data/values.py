"""Converting cells of text to ids, ratings and times, and finding the first cell that cannot be converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from perfedrec.data.text import fail
from perfedrec.data.times import from_dates, from_numbers, from_text, largest, time_unit, units_in

SCHEMA: dict[str, type[pl.DataType]] = {
    "user": pl.Int64,
    "item": pl.Int64,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
}
ROLES = tuple(SCHEMA)
"""The usual roles of columns, in their usual order."""

POSITION = "position"
"""The role of a column that says which place an interaction has in the order of time. It is only taken by its name."""

ALL_ROLES = (*ROLES, POSITION)
Bad = tuple[int, str] | None
"""The first cell that cannot be converted: its row and the problem. ``None`` where there is no such cell."""


def convert(
    path: Path, table: pl.DataFrame, integers: bool, place: Callable[[int], str]
) -> tuple[pl.DataFrame, str | None]:
    """Convert a table with columns by role to ids, ratings and times; and tell the form of the times, or ``None``.

    ``integers`` requires all ids to be integers. ``place`` gives the place of a row in the file ``path``, as in
    ``line 7``. Raises :class:`.text.UnreadableError` for the first cell that cannot be converted.
    """
    done: dict[str, pl.Series] = {}
    form = None
    for role in ALL_ROLES:
        if role in table.columns:
            if role in ("user", "item"):
                done[role], bad = parse_ids(table[role], integers)
            elif role == "rating":
                done[role], bad = _ratings(table[role])
            elif role == POSITION:
                done[role], bad = _positions(table[role])
            else:
                done[role], bad, form = _times(table[role], place)
            if bad is not None:
                fail(path, place(bad[0]), f"{role} {bad[1]}")
    return pl.DataFrame(done), form


def parse_ids(values: pl.Series, integers: bool = False) -> tuple[pl.Series, Bad]:
    """Ids as Int64 if all are plain integers, otherwise as String; and the first cell that is not an id.

    With ``integers``, only integers are ids.
    """
    if values.dtype == pl.String:
        numbers = values.cast(pl.Int64, strict=False)
        if numbers.null_count():
            values = values.str.strip_chars()
            numbers = values.cast(pl.Int64, strict=False)
        if numbers.null_count() or not _canonical(values, numbers):
            if integers:
                return values, _first(
                    ~values.fill_null("").str.contains(r"^\d{1,18}$"), values, "expected an integer id"
                )
            unnamed = values.is_null() | values.str.to_lowercase().is_in(["", "nan", "null"])
            return values, _first(unnamed, values, "expected an id")
        values = numbers
    elif not values.dtype.is_integer():
        if values.dtype.is_float():
            whole = values.cast(pl.Int64, strict=False)
            broken = (whole.cast(values.dtype) != values).fill_null(True)
            return whole, _first(broken | (values < 0), values, "expected an id")
        return parse_ids(values.cast(pl.String), integers)
    values = values.cast(pl.Int64)
    return values, _first((values < 0).fill_null(True), values, "expected an id that is not negative")


def _canonical(values: pl.Series, numbers: pl.Series) -> bool:
    """Whether all numbers are written without a plus sign and leading zeros: "007" and "7" may be different items.

    A text is never shorter than its number in plain form, so it is enough to compare the total lengths.
    """
    if (numbers < 0).any():
        return True  # the caller refuses negative numbers with another message
    plain = len(numbers)
    for digits in range(1, 19):
        longer = int((numbers >= 10**digits).sum())
        if not longer:
            break
        plain += longer
    return bool(values.str.len_bytes().sum() == plain)


def _ratings(values: pl.Series) -> tuple[pl.Series, Bad]:
    numbers = values.cast(pl.Float64, strict=False)
    if values.dtype == pl.String and numbers.null_count():
        cells = values.str.strip_chars()
        numbers = cells.str.replace(r"^(-?\d+),(\d+)$", "${1}.${2}").cast(pl.Float64, strict=False)
    return numbers, _first(~numbers.is_finite().fill_null(False), values, "expected a number")


def _positions(values: pl.Series) -> tuple[pl.Series, Bad]:
    numbers = values.str.strip_chars() if values.dtype == pl.String else values
    numbers = numbers.cast(pl.Int64, strict=False)
    return numbers, _first(~(numbers >= 0).fill_null(False), values, "expected a whole number from 0 on")


def _times(values: pl.Series, place: Callable[[int], str]) -> tuple[pl.Series, Bad, str | None]:
    """Times as Int64 in the unit of the file, the first cell that is none, and their form for people."""
    try:
        if values.dtype.is_temporal():
            times = from_dates(values)
        else:
            times = from_text(values) if values.dtype == pl.String else from_numbers(values)
    except ValueError as error:
        return values, (0, f"is {values[0]!r}, {error}"), None
    numbers, numeric = times.values, times.form == "numbers"
    expected = "seconds since 1970 or a date"
    if 0 < numbers.null_count() < len(numbers):
        expected = f"{'seconds since 1970' if numeric else f'a date {times.form}'}, as in other lines"
    bad = _first((numbers < 0).fill_null(True), values, f"expected {expected}")
    if bad is None and numeric and len(units := units_in(numbers)) > 1:
        (one, first), (other, second) = units[:2]
        problem = f"{place(first)} has {values[first]}, which seems to be in {one}; expected one unit"
        bad = second, f"is {values[second]} and seems to be in {other}, but {problem}"
    form = time_unit(largest(numbers)) if numeric and len(numbers) and not numbers.null_count() else times.form
    return numbers, bad, form


def _first(broken: pl.Series, values: pl.Series, expected: str) -> Bad:
    if not broken.any():
        return None
    row = int(broken.arg_max() or 0)
    value = values[row]
    return row, f"is missing; {expected}" if value is None or value == "" else f"is {value!r}; {expected}"
