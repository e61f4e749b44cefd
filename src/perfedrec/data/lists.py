"""Reading files in which a line holds more than one interaction, or only a part of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.data.cells import Cells
from perfedrec.data.text import all_lines, clean, fail, read_bytes, single_spaces
from perfedrec.data.values import parse_ids

NEGATIVES = r"^\(\s*([^,()\s]+)\s*,\s*([^,()\s]+)\s*\)((?:\s+[^\s()]+)*)\s*$"
SEQUENCE = r"([^\s:,;|]+)\s*:\s*([^\s:,;|]+([\s,]+[^\s:,;|]+)*)?"
SHOWN = 3  # users that are named in a remark
LONG = 60  # letters of a line that are shown in a message


def read_adjacency(path: Path, text: bytes, integers: bool = False) -> Cells:
    """Lines of a user and its items, ``17 301 44``. Each user has one line; the order of items means nothing."""
    lines, blank = _lines(path, single_spaces(text.replace(b",", b" ")))
    fields = pl.col("line").str.split(" ")
    table = lines.select("number", user=fields.list.first(), item=fields.list.slice(1))
    again = table.filter(~pl.col("user").is_first_distinct())
    if again.height:
        if (table["user"] == table["item"].list.len().cast(pl.String)).all():
            raise DataError(f"{path}: each line begins with the number of its items; expected a user first")
        number, user = again.row(0)[:2]
        problem = f"user {user} occurs a second time; an adjacency list names each user once, followed by all items"
        fail(path, number, f"{problem} (for lines of user, item and weight use --format triples)")
    return _exploded(path, table, blank, integers)


def read_sequences(path: Path, text: bytes, colons: bool = False) -> Cells:
    """Lines of a user and its items in the order of time, ``17:301 44`` or ``17 301 44``; a user may have several.

    With ``colons``, all lines have to be as in the first example."""
    lines, blank = _lines(path, single_spaces(text.replace(b",", b" ")))
    odd = lines.filter(~pl.col("line").str.strip_chars().str.contains(f"^{SEQUENCE}$")) if colons else lines.clear()
    if odd.height:
        number, line = odd.row(0)
        others = (
            f" ({counted(odd.height - 1, 'more line does', 'more lines do')} not fit either)" if odd.height > 1 else ""
        )
        shown = line if len(line) <= LONG else f"{line[:LONG]}..."
        fail(path, number, f"{shown!r} does not fit; expected user:item item ..., as other lines are{others}")
    parts = pl.col("line").str.replace(r"^([^ :]+) ?: ?", "${1} ").str.strip_chars_end(" ").str.split(" ")
    table = lines.select("number", user=parts.list.first(), item=parts.list.slice(1))
    return _exploded(path, table, blank, False, ordered=True)


def read_netflix(path: Path, text: bytes) -> Cells:
    """Blocks of an item, ``17:``, and the lines of its users, ``301,5,2005-09-06``: user, rating, date."""
    lines, blank = _lines(path, text)
    heads = pl.col("line").str.extract(r"^(\S+):\s*$")
    table = lines.with_columns(item=heads.forward_fill(), head=heads.is_not_null()).filter(~pl.col("head"))
    cells = pl.col("line").str.split_exact(",", 3).struct
    parts = [cells.field(f"field_{i}").alias(role) for i, role in enumerate(_NETFLIX)]
    table = table.select("number", "item", *parts, extra=cells.field("field_3"))
    broken = table["item"].is_null() | table["extra"].is_not_null()
    if broken.any():
        number = int(table["number"][int(broken.arg_max() or 0)])
        fail(path, number, "expected item: in a line of its own, then lines of user,rating,date")
    used = [role for role in _NETFLIX if not table[role].is_null().all()]
    return Cells(table.select("user", "item", *used[1:]), _place(table["number"]), blank=blank)


_NETFLIX = ("user", "rating", "timestamp")


def read_negatives(path: str | Path) -> pl.DataFrame:
    """Read held-out interactions, each with the items it is ranked against: ``(user,item)<TAB>item<TAB>item ...``.

    This is the layout of the ``.test.negative`` files of NCF. Returns a frame with columns user, item and negatives (a
    list of items, which may be empty), one row per line. Items of both columns have one type, as in
    :func:`perfedrec.data.formats.read`. Raises :class:`DataError` for a line of another form.
    """
    path = Path(path)
    table, _ = _negatives(path, clean(path, read_bytes(path)))
    users, bad = parse_ids(table["user"])
    if bad is not None:
        fail(path, int(table["number"][bad[0]]), f"user {bad[1]}")
    held_out, others = table["item"], table["negatives"].explode().drop_nulls()
    items, bad = parse_ids(held_out.append(others))
    if bad is not None:
        numbers = [*table["number"], *table.explode("negatives").drop_nulls()["number"]]
        fail(path, int(numbers[bad[0]]), f"item {bad[1]}")
    cast = pl.col("negatives").cast(pl.List(items.dtype))
    return table.select(users.alias("user"), items[: table.height].alias("item"), cast)


def read_positives(path: Path, text: bytes) -> Cells:
    """The interactions in a file of negatives (see :func:`read_negatives`); the negatives are left out."""
    table, blank = _negatives(path, text)
    left = int(table["negatives"].list.len().sum())
    remarks = (f"{left:,} negatives are left out: only the pairs in brackets are interactions",) if left else ()
    return Cells(table.select("user", "item"), _place(table["number"]), blank=blank, remarks=remarks)


def _negatives(path: Path, text: bytes) -> tuple[pl.DataFrame, int]:
    lines, blank = _lines(path, text)
    table = lines.with_columns(pl.col("line").str.extract_groups(NEGATIVES)).unnest("line")
    strange = table["1"].is_null()
    if strange.any():
        number = int(table["number"][int(strange.arg_max() or 0)])
        fail(path, number, "expected (user,item) and then items that are separated by tabs")
    return table.select("number", user="1", item="2", negatives=pl.col("3").str.extract_all(r"\S+")), blank


def _exploded(path: Path, table: pl.DataFrame, blank: int, integers: bool, ordered: bool = False) -> Cells:
    """One row per item of lists. Users without items are left out and counted."""
    empty = table.filter(pl.col("item").list.len() == 0)
    rows = table.filter(pl.col("item").list.len() > 0).explode("item")
    if not rows.height:
        raise DataError(f"{path}: holds users but no items; expected lines of user item item ...")
    bad = parse_ids(table["user"], integers)[1]  # of all lines, also of those without items
    if bad is not None:
        fail(path, int(table["number"][bad[0]]), f"user {bad[1]}")
    remarks: tuple[str, ...] = ()
    if empty.height:
        named = ", ".join(empty["user"].head(SHOWN)) + (", ..." if empty.height > SHOWN else "")
        what = counted(empty.height, "user without items is", "users without items are")
        remarks = (f"{what} left out ({named})",)
    return Cells(
        rows.select("user", "item"),
        _place(rows["number"]),
        blank=blank,
        integers=integers,
        ordered=ordered,
        remarks=remarks,
    )


def _lines(path: Path, text: bytes) -> tuple[pl.DataFrame, int]:
    """The lines that are not blank, with their numbers, and how many are blank."""
    table = all_lines(text).with_row_index("number", offset=1)
    filled = table.drop_nulls()
    return filled, table.height - filled.height


def _place(numbers: pl.Series) -> Callable[[int], str]:
    return lambda row: f"line {numbers[row]}"
