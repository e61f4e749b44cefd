"""Times of interactions: reading their common forms, and telling their unit.

Times are kept as whole numbers since 1970 in the unit that the file has, so that no order is lost: seconds,
milliseconds, microseconds or nanoseconds. The size of the largest number tells the unit, because no time of an
interaction lies before 1973 or after 5138.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import polars as pl

SIZES = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
LATEST = 10**11  # seconds, in the year 5138
EARLIEST = 10**8  # seconds, in the year 1973: larger than ids and ratings, smaller than any log of interactions
ISO = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ]+\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?)?\s*(Z|UTC|GMT|[+-]\d{2}(:?\d{2})?)?"
)
SLASHES = re.compile(r"\d{1,2}([/.-])\d{1,2}\1\d{4}( +\d{1,2}:\d{2}(:\d{2})?)?")
COMPACT = {8: "%Y%m%d", 14: "%Y%m%d%H%M%S"}
OTHERS = (
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%d %b %Y %H:%M:%S",
    "%d/%b/%Y:%H:%M:%S %z",
    "%b %d, %Y",
    "%B %d, %Y",
    "%d %b %Y",
    "%d %B %Y",
    "%d-%b-%Y",
    "%m %d, %Y",
)
SAMPLE = 200
PLAUSIBLE = (900_000_000, 2_100_000_000)  # seconds, 1998 to 2036


@dataclass(frozen=True)
class Times:
    """Times as read: ``values`` Int64, null where a cell is none, and how they were written (for people)."""

    values: pl.Series
    form: str


def time_unit(largest: int) -> str:
    """The unit of times of which the largest is given: "seconds", "milliseconds", "microseconds" or "nanoseconds"."""
    return next((name for name, size in SIZES.items() if largest < LATEST * size), "nanoseconds")


def largest(values: pl.Series) -> int:
    """The largest of some times, 0 where there is none."""
    return cast(int, values.max()) if values.drop_nulls().len() else 0


def utc(value: int, unit: str = "") -> datetime:
    """A time in UTC. ``unit`` is that of :func:`time_unit`; if empty, the unit is told by the size of the value."""
    return datetime.fromtimestamp(value / SIZES[unit or time_unit(value)], UTC)


def from_numbers(values: pl.Series) -> Times:
    """Times from a column of numbers. Fractions of seconds become microseconds."""
    if values.dtype.is_integer():
        whole = values.cast(pl.Int64)
        width = len(str(whole.max() or 0))
        if width in COMPACT and len(str(whole.min() or 0)) == width:
            dates = _strptime(whole.cast(pl.String), COMPACT[width])
            if not dates.null_count() and str(dates.dt.year().min()) >= "1970" and str(dates.dt.year().max()) < "2100":
                return Times(_counted(dates), "YYYYMMDD" + "HHMMSS" * (width > 8))
        return Times(whole, "numbers")
    finite = values.is_finite().fill_null(False)
    values = pl.select(pl.when(finite).then(values)).to_series()
    if (values.floor() != values).any():
        scaled = (values * 10**6).round()
        if (values < LATEST).all():
            return Times(scaled.cast(pl.Int64, strict=False), "seconds with fractions")
    return Times(values.floor().cast(pl.Int64, strict=False), "numbers")


def from_text(values: pl.Series) -> Times:
    """Times from a column of text, by the form that fits the first cells.

    Raises ``ValueError`` where days and months cannot be told apart.
    """
    whole = values.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return from_numbers(whole)
    values = values.str.strip_chars()
    whole = values.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return from_numbers(whole)
    numbers = values.cast(pl.Float64, strict=False)
    sample = [value for value in values.drop_nulls().head(SAMPLE).to_list() if value]
    if not sample or 2 * numbers.head(SAMPLE).is_not_null().sum() > len(sample):
        exact = pl.select(pl.coalesce(whole, numbers.floor().cast(pl.Int64, strict=False))).to_series()
        if whole.null_count() < len(values) and (numbers.floor() == numbers).all():
            return Times(exact, "numbers")
        return from_numbers(numbers)
    if _most(sample, ISO):
        return _from_iso(values, sample)
    if _most(sample, SLASHES):
        return _from_slashes(values)
    series = pl.Series(sample, dtype=pl.String).str.replace(r"(UTC|GMT|Z)$", "+0000")
    form = max(OTHERS, key=lambda each: len(sample) - _strptime(series, each).null_count())
    fits = _strptime(series, form).is_not_null()
    if not fits.any():
        return Times(pl.repeat(None, len(values), dtype=pl.Int64, eager=True), "numbers")
    example = sample[int(fits.arg_max() or 0)]
    return Times(_counted(_strptime(values.str.replace(r"(UTC|GMT|Z)$", "+0000"), form)), f"such as {example!r}")


def like_times(values: pl.Series) -> bool:
    """Whether all of some values that are not empty are dates, or numbers that are plausible times."""
    if values.dtype == pl.String:
        values = values.str.strip_chars()
        values = values.filter(values != "")
    values = values.drop_nulls()
    if values.dtype.is_temporal() or not values.len():
        return bool(values.len())
    if values.dtype != pl.String and not values.dtype.is_numeric():
        return False
    try:
        times = from_text(values) if values.dtype == pl.String else from_numbers(values)
    except ValueError:  # dates, of which day and month cannot be told apart
        return True
    if times.values.null_count() or times.form != "numbers":
        return not times.values.null_count()
    low, high = PLAUSIBLE
    return any(bool(times.values.is_between(low * size, high * size).all()) for size in SIZES.values())


def from_dates(values: pl.Series) -> Times:
    """Times from a column of dates (of parquet)."""
    fine = values.dtype == pl.Datetime("ns") and (values.dt.epoch("ns") % 1000 != 0).any()
    if fine:
        return Times(values.dt.epoch("ns"), "dates")
    return Times(_counted(values.cast(pl.Datetime("us"))), "dates")


def units_in(values: pl.Series) -> list[tuple[str, int]]:
    """Each unit that occurs in times, by their size, with the first row that has it. A 0 has no unit."""
    found = []
    low = 0
    for name, size in SIZES.items():
        high = LATEST * size if name != "nanoseconds" else None
        inside = (values > low) if high is None else (values > low) & (values < high)
        if inside.any():
            found.append((name, int(inside.arg_max() or 0)))
        low = LATEST * size - 1
    return found


def _from_iso(values: pl.Series, sample: list[str]) -> Times:
    sample = [value for value in sample if ISO.fullmatch(value)]  # the first cell may be the name of the column
    text = values.str.replace(r"(\d)T(\d)", "${1} ${2}")
    for sign in "/.":
        if sign in sample[0][:8]:
            text = text.str.replace(sign, "-", literal=True).str.replace(sign, "-", literal=True)
    form = "%Y-%m-%d"
    if any(":" in value for value in sample):
        zone = any(re.search(r"(Z|UTC|GMT|:\d+(\.\d+)?\s*[+-]\d{2}(:?\d{2})?)$", value) for value in sample)
        form += " %H:%M" + ":%S%.f" * any(value.count(":") > 1 for value in sample) + " %z" * zone
        if zone:
            text = text.str.replace(r"\s*(Z|UTC|GMT)$", " +0000")
            text = text.str.replace(r"(\d)\s*([+-]\d{2}):?(\d{2})$", "${1} ${2}${3}")
            text = text.str.replace(r"(:\d{2}(?:\.\d+)?)\s*([+-]\d{2})$", "${1} ${2}00")
        text = text.str.replace(r"(:\d{2}),(\d)", "${1}.${2}")
    elif any(value[-1] in "ZCT" for value in sample):
        text = text.str.replace(r"\s*(Z|UTC|GMT)$", "")
    return Times(_counted(_strptime(text, form)), f"such as {sample[0]!r}")


def _from_slashes(values: pl.Series) -> Times:
    parts = values.str.extract_groups(r"^(\d{1,2})([/.-])(\d{1,2})[/.-](\d{4})(?: +(\d{1,2}:\d{2}))?(:\d{2})?$")
    first, second = (parts.struct.field(name).cast(pl.Int64) for name in "13")
    days_first, months_first = bool((first > 12).any()), bool((second > 12).any())
    if "." in (parts.struct.field("2").drop_nulls().head(1).to_list() or [""]):
        days_first = not months_first
    if days_first == months_first:
        both = "both day/month and month/day occur" if days_first else "which may be day/month or month/day"
        raise ValueError(f"{both}; write the dates as year-month-day")
    month, day = (second, first) if days_first else (first, second)
    year = parts.struct.field("4")
    clock = parts.struct.field("5").fill_null("0:00") + parts.struct.field("6").fill_null(":00")
    text = year + "-" + month.cast(pl.String) + "-" + day.cast(pl.String) + " " + clock
    return Times(_counted(_strptime(text, "%Y-%m-%d %H:%M:%S")), "day/month/year" if days_first else "month/day/year")


def _most(sample: list[str], form: re.Pattern[str]) -> bool:
    return 2 * sum(form.fullmatch(value) is not None for value in sample) >= len(sample)


def _strptime(text: pl.Series, form: str) -> pl.Series:
    """Dates in microseconds, UTC where they have a zone; null where a value has another form."""
    if not any(sign in form for sign in ("%H", "%z")):
        return text.str.strptime(pl.Date, form, strict=False).cast(pl.Datetime("us"))
    return text.str.strptime(pl.Datetime("us"), form, strict=False)


def _counted(dates: pl.Series) -> pl.Series:
    """Dates as whole seconds since 1970, or as microseconds where one of them has a fraction of a second."""
    fine = dates.dt.epoch("us")
    if (fine % 10**6 != 0).any() and (fine.abs() >= EARLIEST * 10**6).all():
        return fine
    return fine // 10**6
