"""Detecting the format of a file from its content."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.lists import NEGATIVES, SEQUENCE
from perfedrec.data.roles import MANY, is_header
from perfedrec.data.text import clean, filled_lines, read_bytes, single_spaces
from perfedrec.data.times import EARLIEST

HEAD = 1 << 20  # bytes at the start of a file that are examined first
_SEQUENCE = re.compile(SEQUENCE)
BLOCK = re.compile(r"\S+:\s*")


def detect(path: str | Path) -> str:
    """The format of a file, detected from its content. Raises :class:`DataError` where two formats are possible."""
    data = read_bytes(Path(path))
    return "parquet" if data[:4] == b"PAR1" else detect_text(Path(path), clean(Path(path), data))


def detect_text(path: Path, text: bytes) -> str:
    """Like :func:`detect`, for a text that :func:`.text.clean` returned; ``path`` is for messages."""
    start = text.lstrip()[: 1 << 16]
    head = [line for line in start.decode(errors="replace").split("\n")[: MANY + 1] if line.strip()]
    head = head[:-1] if len(start) == 1 << 16 and len(head) > 1 else head  # the last one may be cut
    if not head:  # spaces of other kinds, such as no-break spaces
        raise DataError(f"{path}: starts with nothing but spaces; expected interactions")
    first = head[0]
    if re.match(r"\{|\[\s*(\{|$)", start[:1000].decode(errors="replace")):
        return "json"
    if re.match(r"\s*@relation\b", first, re.IGNORECASE):
        raise DataError(
            f"{path}: is an ARFF file (LibRec, Weka), which is not read; expected a table: the lines after @data, in a "
            "file of their own, are one"
        )
    if re.match(NEGATIVES, first):
        return "negatives"
    if BLOCK.fullmatch(first) and len(head) > 1 and "," in head[1] and not _SEQUENCE.fullmatch(head[1]):
        return "netflix"
    if re.search(r"\S::\S", first):
        return "ml-1m"
    if re.search(r":(token|float)\b", first):
        return "recbole"
    if _are_sequences(head):
        return "sequences"
    separator = next((sign for sign in "\t,;|" if sign in first), None)
    header = is_header([line.split(separator) for line in head])
    if separator != "\t" and (separator or header):
        return "csv"
    if separator == "\t" and (header or re.search(rb"[^\d. \t\r\n]", start)):
        return "tsv"  # an id that contains spaces can be read only when tabs separate the fields
    whole_lines = text if len(text) <= HEAD else text[:HEAD].rpartition(b"\n")[0] or text
    lines = filled_lines(single_spaces(whole_lines))
    verdict = _is_adjacency(lines)
    # If the first lines look like a table and repeat users, this is enough to decide; otherwise examine the whole file.
    if len(text) > HEAD and (verdict is not False or _users(lines).is_unique().all()):
        verdict = _is_adjacency(filled_lines(single_spaces(text)))
    if verdict is None:
        raise DataError(
            f"{path}: may be triples (user item weight) or an adjacency list (user item item ...); "
            "expected --format triples or --format adjacency"
        )
    return "adjacency" if verdict else "triples"


def _is_adjacency(lines: pl.Series) -> bool | None:
    """Whether lines are an adjacency list (True) or a table (False); None if both are possible.

    The fields of a line are separated by single spaces. An adjacency list names each user once, its lines have
    different lengths, and all its fields are ids, which are plain integers. A table has the same number of fields on
    all lines, it names most users several times, and its third column is a weight.
    """
    table = pl.DataFrame({"line": lines}).with_columns(
        width=pl.col("line").str.count_matches(" ", literal=True) + 1,
        field=pl.col("line").str.splitn(" ", 4),
    )
    n_users, n_lines = _users(lines).n_unique(), len(lines)
    widths = table["width"].value_counts(sort=True)
    width, share = int(widths["width"][0]), widths["count"][0] / n_lines
    if width > 4 and share == 1 and 2 * n_users <= n_lines:
        return False  # a table of many columns, some of which must be named
    if width == 2 and share == 1:
        return False  # pairs of user and item; an adjacency list with one item per user means the same
    if share < 0.9 or width not in (3, 4):
        # If a user is repeated, the file is broken as either. Choose the format that fits most lines, so that the
        # error message helps.
        return n_users == n_lines or not (width <= 4 and share > 0.5)
    rows = table.filter(pl.col("width") == width).select(pl.col("field").struct.unnest())
    weight = rows["field_2"]
    number = weight.cast(pl.Float64, strict=False)
    item = rows["field_1"].cast(pl.Int64, strict=False)
    if item.null_count() > 0.1 * len(item) or weight.str.contains(r"^\d+\.\d*$").any():
        return False  # names or fractions, which an adjacency list does not have
    if width == 3 and (weight == "1").all() and n_lines >= 5:
        return False  # a weight of 1 on all lines, as in implicit feedback
    if width == 4:
        time = rows["field_3"].cast(pl.Float64, strict=False)
        if _at_least(time, EARLIEST) and not _at_least(item, EARLIEST):
            return False
    if 2 * n_users <= n_lines:
        return False
    if n_users < n_lines and (number <= 10).all() and (item > 10).any():
        return False  # the third column looks like ratings
    return None


def _users(lines: pl.Series) -> pl.Series:
    return lines.str.splitn(" ", 2).struct.field("field_0")


def _at_least(values: pl.Series, bound: int) -> bool:
    """Whether no value is missing and all are at least ``bound``."""
    return bool((values.fill_null(0) >= bound).all())


def _are_sequences(lines: list[str]) -> bool:
    """Whether lines are users with their items behind a colon, ``17:301 44``, and most users have one line.

    One line in ten may be of another kind, or one line of three or more, if it is no header: the reader names it.
    """
    found = [_SEQUENCE.fullmatch(line.strip()) for line in lines]
    users = [match[1] for match in found if match]
    odd = len(lines) - len(users)
    if odd > max(len(lines) // 10, len(lines) > 2) or not any(match[2] for match in found if match):
        return False
    fields = [re.split(r"[\s,;|]+", line.strip()) for line in lines]
    if found[0] is None and len(set(map(len, fields))) == 1 and is_header(fields):
        return False
    return 10 * len(set(users)) >= 9 * len(users)
