"""Which format a file has, found by looking at its content."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.text import clean, filled_lines, read_bytes, single_spaces

HEADER_NAMES = {
    "user": {"user", "userid", "uid", "u", "reviewerid", "customer", "customerid", "visitorid"},
    "item": {"item", "itemid", "iid", "i", "movieid", "movie", "bookid", "businessid", "productid", "artistid", "asin"},
    "rating": {"rating", "ratings", "score", "weight", "stars", "value", "r"},
    "timestamp": {"timestamp", "time", "ts", "t", "date", "datetime", "unixreviewtime"},
}
HEAD = 1 << 20  # bytes that are looked at first
EARLIEST_TIME = 10**8  # 1973: larger than ids and ratings, smaller than any log of interactions


def detect(path: str | Path) -> str:
    """The format of a file, found by looking at its content; :class:`DataError` when it could be either of two."""
    data = read_bytes(Path(path))
    return "parquet" if data[:4] == b"PAR1" else detect_text(Path(path), clean(Path(path), data))


def detect_text(path: Path, text: bytes) -> str:
    """:func:`detect` for a text that is cleaned already; ``path`` is for the message."""
    start = text.lstrip()[: 1 << 16]
    first = start.partition(b"\n")[0].decode(errors="replace")
    if re.search(r"\S::\S", first):
        return "ml-1m"
    if re.search(r":(token|float)\b", first):
        return "recbole"
    separator = next((sign for sign in "\t,;" if sign in first), None)
    header = is_header(first.split(separator))
    if separator != "\t" and (separator or header):
        return "csv"
    if separator == "\t" and (header or re.search(rb"[^\d. \t\r\n]", start)):
        return "tsv"  # ids with spaces are one field only between tabs
    whole_lines = text if len(text) <= HEAD else text[:HEAD].rpartition(b"\n")[0] or text
    head = filled_lines(single_spaces(whole_lines))
    verdict = _is_adjacency(head)
    # A table whose users come back in its first lines is a table; anything else has to be seen whole.
    if len(text) > HEAD and (verdict is not False or _users(head).is_unique().all()):
        verdict = _is_adjacency(filled_lines(single_spaces(text)))
    if verdict is None:
        raise DataError(
            f"{path}: may be triples (user item weight) or an adjacency list (user item item ...); "
            "say --format triples or --format adjacency"
        )
    return "adjacency" if verdict else "triples"


def _is_adjacency(lines: pl.Series) -> bool | None:
    """Whether lines of single-spaced fields are an adjacency list rather than a table; None if both are plausible.

    The evidence: an adjacency list names a user once, has lines of differing length, and holds item ids, which are
    plain integers, everywhere. A table has one width; its users come back; its third column is a weight.
    """
    table = pl.DataFrame({"line": lines}).with_columns(
        width=pl.col("line").str.count_matches(" ", literal=True) + 1,
        field=pl.col("line").str.splitn(" ", 4),
    )
    n_users, n_lines = _users(lines).n_unique(), len(lines)
    widths = table["width"].value_counts(sort=True)
    width, share = int(widths["width"][0]), widths["count"][0] / n_lines
    if width == 2 and share == 1:
        return False  # pairs; one item per user means the same either way
    if share < 0.9 or width not in (3, 4):
        # Broken either way if a user comes back: then take the reading that most lines fit, so that the message helps.
        return n_users == n_lines or not (width <= 4 and share > 0.5)
    rows = table.filter(pl.col("width") == width).select(pl.col("field").struct.unnest())
    weight = rows["field_2"]
    number = weight.cast(pl.Float64, strict=False)
    item = rows["field_1"].cast(pl.Int64, strict=False)
    if item.null_count() > 0.1 * len(item) or weight.str.contains(r"^\d+\.\d*$").any():
        return False  # names, or fractions: neither occurs in an adjacency list
    if width == 3 and (weight == "1").all() and n_lines >= 5:
        return False  # the constant weight of implicit feedback
    if width == 4:
        time = rows["field_3"].cast(pl.Float64, strict=False)
        if at_least(time, EARLIEST_TIME) and not at_least(item, EARLIEST_TIME):
            return False
    if 2 * n_users <= n_lines:
        return False
    if n_users < n_lines and (number <= 10).all() and (item > 10).any():
        return False  # ratings
    return None


def _users(lines: pl.Series) -> pl.Series:
    return lines.str.splitn(" ", 2).struct.field("field_0")


def at_least(values: pl.Series, bound: int) -> bool:
    """Whether all values are known and reach the bound."""
    return bool((values.fill_null(0) >= bound).all())


def is_header(fields: list[str]) -> bool:
    """Whether a first line names at least a user or an item column."""
    names = [plain_name(field) for field in fields]
    return any(name in HEADER_NAMES["user"] | HEADER_NAMES["item"] - {"i"} for name in names)


def plain_name(name: str) -> str:
    """A column name as HEADER_NAMES writes it: "user_id:token" -> "userid"."""
    return re.sub(r"[^a-z0-9]", "", name.split(":")[0].lower())
