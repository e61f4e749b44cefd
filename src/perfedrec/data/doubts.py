"""Questions about a file that was read: where its content does not fit what the reader assumed.

A question is an error with one line: what was assumed, what is doubtful, and the option that answers. Where the content
does not decide, the report of the file gets a remark instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, cast

import numpy as np
import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing
from perfedrec.data.readreport import Ratings, ReadReport
from perfedrec.data.roles import NOTHING, Columns, Place, as_option
from perfedrec.data.times import EARLIEST, ISO, PLAUSIBLE, SLASHES, largest

SOME = 100  # ids that are looked at
CERTAIN = 20  # rows from which on counts mean something
NO_IDS = ("na", "n/a", "#n/a", "<na>", "none", "nat", "nil", "undefined", "\\n", "?", "-", "--")
HARDLY_IDS = ("unknown", "anonymous", "anon", "guest", "missing", "other", "not available", "deleted", "[deleted]")
OFTEN = 10  # times the mean number of rows of an id
BOOK_OR_ASIN, AMAZON_USER = r"^(B[0-9][0-9A-Z]{8}|[0-9]{9}[0-9X])$", r"^A[0-9A-Z]{9,27}$"
LIKE_ITEMS = r"^(?i)(i|item|m|movie|film|b|book|p|prod|product|song|track|artist|game)[_-]?[0-9]+$"
LIKE_USERS = r"^(?i)(u|usr|user|reader|customer|client|member|person)[_-]?[0-9]+$"
LARGEST_SCALE = 10


@dataclass(frozen=True)
class _Reading:
    """What was read: the frame, its report, the place of a row, and whether columns were taken by their position."""

    frame: pl.DataFrame
    report: ReadReport
    place: Callable[[int], str]
    by_position: bool
    held_out: bool

    def ask(self, assumed: str, doubt: str, way: str) -> NoReturn:
        raise DataError(f"{self.report.path}: read with {assumed}; {doubt}; {way}")

    def column(self, role: str) -> str:
        name = "time" if role == "timestamp" else role
        return f"{name} = {self.report.places[role]}" if role in self.report.places else f"{role}s as they are"

    def option(self, **roles: str) -> str:
        """The option --columns with the columns as now, but with other columns for ``roles``, or with none."""
        places = self.report.places
        wanted = {role: places[new] for role in places if (new := roles.get(role, role)) in places}
        given: dict[str, Place | str | int] = dict(wanted)
        # A role that is not named keeps its usual column: the one of its name, or of its position if that is free.
        left = [role for role in places if role not in wanted]
        kept = [role for role in left if places[role].name is not None or places[role] not in wanted.values()]
        given |= dict.fromkeys(kept, NOTHING)
        return as_option(given) if given else "--format"

    @property
    def timed(self) -> bool:
        """Whether there are times that an interaction can have."""
        return "timestamp" in self.frame.columns and bool((self.frame["timestamp"] >= EARLIEST).all())


def ask(
    frame: pl.DataFrame,
    report: ReadReport,
    place: Callable[[int], str],
    by_position: bool,
    columns: Columns | None,
    min_rating: float | None,
    held_out: bool,
) -> tuple[pl.DataFrame, ReadReport]:
    """Ask what is doubtful about a file. Returns its frame and its report, with ratings and remarks.

    ``by_position`` says that the columns were taken by their position alone. ``columns`` and ``min_rating`` are answers
    that were given. Where all ratings are 0 or 1 and there is no ``min_rating``, the rows of 0 are left out.

    Raises :class:`DataError` with the question.
    """
    reading = _Reading(frame, report, place, by_position, held_out)
    remarks: list[str] = []
    if frame.height and columns is None:
        for role in ("user", "item"):
            _missing(reading, role)
            _dates(reading, role)
        remarks += _first_line(reading) + _counts(reading)
        _times(reading)
    if "timestamp" in frame.columns and frame.height and largest(frame["timestamp"]) < EARLIEST:
        remarks.append("the times lie near 1970: only their order is used")
    if "rating" not in frame.columns or not frame.height:
        return frame, replace(report, remarks=report.remarks + tuple(remarks))
    at = report.places.get("rating")
    ratings = Ratings.of(frame["rating"], at.name if at else None)
    assert ratings is not None
    if min_rating is None:
        _not_rated(reading, ratings)
        if set(ratings.shares) == {0.0, 1.0}:
            zeros = int((frame["rating"] == 0).sum())
            ratings, frame = replace(ratings, negatives=zeros), frame.filter(pl.col("rating") > 0)
    else:
        ratings = replace(ratings, middle=None)
    return frame, replace(report, ratings=ratings, remarks=report.remarks + tuple(remarks))


def _missing(reading: _Reading, role: str) -> None:
    """Ask where an id is a word for a missing value."""
    ids = reading.frame[role]
    if ids.dtype != pl.String:
        return
    for words, often in ((NO_IDS, False), (HARDLY_IDS, True)):
        variants = [*words, *map(str.upper, words), *map(str.capitalize, words)]
        found = ids.is_in(variants)
        n = int(found.sum())
        if not n or (often and n < max(CERTAIN, OFTEN * ids.len() / ids.n_unique())):
            continue
        row = int(found.arg_max() or 0)
        reading.ask(
            reading.column(role),
            f"{reading.place(row)} has {ids[row]!r}, as {n:,} of {ids.len():,} rows, which seems to mean that the "
            f"{role} is missing",
            f"remove such lines, or say that it is an id: {reading.option()}",
        )


def _dates(reading: _Reading, role: str) -> None:
    """Ask where ids are dates or times."""
    ids = reading.frame[role]
    if ids.dtype == pl.String:
        some = ids.head(SOME).to_list()
        found = all(ISO.fullmatch(each) or SLASHES.fullmatch(each) for each in some)
    else:
        low, high = -largest(-ids), largest(ids)
        ranges = (PLAUSIBLE, (PLAUSIBLE[0] * 1000, PLAUSIBLE[1] * 1000), (19_900_101, 20_361_231))
        found = reading.by_position and not reading.timed and any(a <= low and high <= b for a, b in ranges)
        found = found and (low > 20_361_231 or not (ids % 100).is_between(1, 31).not_().any())
    if found:
        reading.ask(
            reading.column(role),
            f"its values are dates or times, such as {ids[0]}",
            f"name the columns, as in {reading.option()}",
        )


def _times(reading: _Reading) -> None:
    """Ask where ratings are as large as times, or times as small as ratings."""
    frame, columns = reading.frame, reading.frame.columns
    large = "rating" in columns and cast(float, frame["rating"].mean()) >= EARLIEST
    if large:
        swapped = reading.option(rating="timestamp", timestamp="rating")
        reading.ask(
            reading.column("rating"),
            f"its values are as large as times ({reading.place(0)} has {frame['rating'][0]:.0f})",
            f"name the columns, as in {swapped if 'timestamp' in columns else reading.option()}",
        )
    latest = largest(frame["timestamp"]) if "timestamp" in columns else EARLIEST
    if reading.by_position and "rating" in columns and latest <= LARGEST_SCALE:
        reading.ask(
            reading.column("timestamp"),
            f"its values would be times in 1970 and look like ratings (the largest is {latest})",
            f"name the columns, as in {reading.option()}",
        )


def _first_line(reading: _Reading) -> list[str]:
    """A remark where the first line has words without digits that occur nowhere else, above ids with digits."""
    if reading.report.header is not False or not reading.by_position or reading.frame.height < CERTAIN:
        return []
    words = []
    for ids in (reading.frame["user"], reading.frame["item"]):
        digits = ids.cast(pl.String).str.contains("[0-9]")
        if digits[0] or not digits[1:].all():
            return []
        words.append(str(ids[0]))
    return [f"the first line ({listing(words)}) may be the names of the columns: if it is, say so with --header"]


def _counts(reading: _Reading) -> list[str]:
    """Ask where the users are row numbers, or where users and items seem to be the other way round."""
    frame, n = reading.frame, reading.frame.height
    users, items = frame["user"], frame["item"]
    swap = reading.option(user="item", item="user")
    if users.dtype == items.dtype == pl.String and reading.by_position:
        one, other = users.head(SOME), items.head(SOME)
        pairs = ((BOOK_OR_ASIN, AMAZON_USER), (LIKE_ITEMS, LIKE_USERS))
        if any(one.str.contains(a).all() and other.str.contains(b).all() for a, b in pairs):
            reading.ask(
                f"{reading.column('user')}, {reading.column('item')}",
                f"the users look like items ({users[0]}) and the items like users ({items[0]})",
                f"name the columns: {swap}",
            )
    if reading.held_out or n < 3 or not reading.report.places:
        return []
    if not reading.by_position and not _once(users):
        return []
    n_users, n_items = users.n_unique(), items.n_unique()
    if n_users == n:
        if reading.by_position and users.dtype != pl.String and _no_rating(reading):
            start = int(users[0])
            if start in (0, 1) and np.array_equal(users.to_numpy(), np.arange(start, start + n)):
                shifted = reading.option(user="item", item="rating", rating="timestamp", timestamp="")
                reading.ask(
                    reading.column("user"),
                    f"it counts the rows ({start}, {start + 1}, {start + 2}, ...), and each user occurs once",
                    f"name the columns, as in {shifted}, or say that it is the user: {reading.option()}",
                )
        return ["each user occurs once: a split can hold out nothing"]
    words = users.dtype == items.dtype == pl.String
    if n_items == n and n_users > 1 and words and reading.by_position and (n >= CERTAIN or len(frame.columns) == 4):
        reading.ask(
            f"{reading.column('user')}, {reading.column('item')}",
            f"each item occurs once, and {n_users:,} users have {n:,} rows",
            f"if they are the other way round, use {swap}; if not, {reading.option()}",
        )
    if reading.by_position and n >= CERTAIN and n < 2 * n_items and n / n_users >= 5 * n / n_items:
        return [
            f"an item occurs {n / n_items:.1f} times and a user {n / n_users:.1f} times on average; "
            f"if they are the other way round, use {swap}"
        ]
    return []


def _once(ids: pl.Series) -> bool:
    """Whether each id occurs once; the first ones decide in most cases, which is fast."""
    return bool(ids.head(10 * SOME).is_unique().all()) and ids.n_unique() == ids.len()


def _no_rating(reading: _Reading) -> bool:
    """Whether a third column is there that does not look like ratings, or a fourth that does not look like times."""
    frame = reading.frame
    if "timestamp" in frame.columns:
        return not reading.timed
    if "rating" not in frame.columns:
        return False
    ratings = frame["rating"]
    return ratings.n_unique() > 1 and bool((ratings > LARGEST_SCALE).any()) and bool((ratings == ratings.floor()).all())


def _not_rated(reading: _Reading, ratings: Ratings) -> None:
    """Ask where a rating seems to mean "not rated", and refuse ratings below 0 without a threshold."""
    values = reading.frame["rating"]
    without = reading.option(rating="")
    others = values.filter(values != 99)
    if ratings.high == 99 and others.len() and float(others.max()) <= LARGEST_SCALE:  # type: ignore[arg-type]
        row = int((values == 99).arg_max() or 0)
        reading.ask(
            reading.column("rating"),
            f"{reading.place(row)} has 99, which often means that nothing was rated",
            f"remove such lines; --min-rating NUMBER counts 99 as a rating; {without} counts all rows",
        )
    if ratings.low < 0:
        row = int((values < 0).arg_max() or 0)
        alone = ratings.low == -1 and values.filter(values < 0).n_unique() == 1 and ratings.high > 1
        reading.ask(
            reading.column("rating"),
            f"{reading.place(row)} has {values[row]:g}" + ", which often means that nothing was rated" * alone,
            f"--min-rating {'0 leaves such rows out' if alone else 'NUMBER leaves lower ratings out'}; "
            f"{without} counts all rows, whatever their rating",
        )
