"""Converting cells of text to ids, ratings and times, and finding the first cell that cannot be converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import polars as pl

SCHEMA: dict[str, type[pl.DataType]] = {
    "user": pl.Int64,
    "item": pl.Int64,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
}
ROLES = tuple(SCHEMA)
Bad = tuple[int, str] | None
"""The first cell that cannot be converted: its row and the problem. ``None`` where there is no such cell."""


def convert(table: pl.DataFrame, integers: bool, complain: Callable[[int, str], NoReturn]) -> pl.DataFrame:
    """Convert a table with columns by role to ids, ratings and times.

    ``integers`` requires all ids to be integers. ``complain`` is called with the row and the problem of the first cell
    that cannot be converted; it must raise.
    """
    done: dict[str, pl.Series] = {}
    for role in ROLES:
        if role in table.columns:
            if role in ("user", "item"):
                done[role], bad = parse_ids(table[role], integers)
            else:
                done[role], bad = (_ratings if role == "rating" else _times)(table[role])
            if bad is not None:
                complain(bad[0], f"{role} {bad[1]}")
    return pl.DataFrame(done)


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
    numbers = values.str.strip_chars() if values.dtype == pl.String else values
    numbers = numbers.cast(pl.Float64, strict=False)
    broken = ~(numbers.is_finite() & (numbers >= 0)).fill_null(False)
    return numbers, _first(broken, values, "expected a number that is not negative")


def _times(values: pl.Series) -> tuple[pl.Series, Bad]:
    """Seconds since 1970 as Int64. A column is read as numbers or as dates, whichever fits more of its cells."""
    expected = "seconds since 1970 or an ISO date"
    if values.dtype.is_temporal():
        numbers = values.cast(pl.Datetime("ms")).dt.epoch("s").cast(pl.Float64)
    elif values.dtype == pl.String:
        stripped = values.str.strip_chars()
        numbers = stripped.cast(pl.Float64, strict=False)
        if numbers.null_count():
            dates, kind = _dates(stripped), "seconds since 1970"
            mixed = max(numbers.null_count(), dates.null_count()) < len(dates)
            if dates.null_count() < numbers.null_count():
                numbers, kind = dates, "an ISO date"
            expected = f"{kind}, as in other lines" if mixed else expected
    else:
        numbers = values.cast(pl.Float64)
    broken = ~(numbers.is_finite() & (numbers >= 0)).fill_null(False)
    bad = _first(broken, values, f"expected {expected}")
    if bad is None:
        while (numbers > 1e11).any():  # milli-, micro- or nanoseconds; seconds reach 1e11 in the year 5138
            numbers = numbers / 1000
        numbers = numbers.floor().cast(pl.Int64)
    return numbers, bad


def _dates(values: pl.Series) -> pl.Series:
    """ISO dates, with or without time, as seconds since 1970; null where a value is not such a date."""
    for dtype in (pl.Datetime("ms"), pl.Date):
        try:
            return values.str.strptime(dtype, strict=False).cast(pl.Datetime("ms")).dt.epoch("s").cast(pl.Float64)
        except pl.exceptions.PolarsError:
            continue
    return pl.repeat(None, len(values), dtype=pl.Float64, eager=True)


def _first(broken: pl.Series, values: pl.Series, expected: str) -> Bad:
    if not broken.any():
        return None
    row = int(broken.arg_max() or 0)
    value = values[row]
    return row, f"is missing; {expected}" if value is None or value == "" else f"is {value!r}; {expected}"
