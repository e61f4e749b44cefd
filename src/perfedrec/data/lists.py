"""Reading files whose lines hold lists: of items, or of negatives."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from perfedrec.data.text import all_lines, clean, fail, read_bytes
from perfedrec.data.values import parse_ids

NEGATIVES = r"^\(\s*([^,()\s]+)\s*,\s*([^,()\s]+)\s*\)((?:\s+[^\s()]+)*)\s*$"


def read_negatives(path: str | Path) -> pl.DataFrame:
    """Read held-out interactions, each with the items it is ranked against: ``(user,item)<TAB>item<TAB>item ...``.

    This is the layout of the ``.test.negative`` files of NCF. Returns a frame with columns user, item and negatives (a
    list of items, which may be empty), one row per line. Items of both columns have one type, as in
    :func:`perfedrec.data.formats.read`. Raises :class:`DataError` for a line of another form.
    """
    path = Path(path)
    return negatives(path, clean(path, read_bytes(path)))


def negatives(path: Path, text: bytes) -> pl.DataFrame:
    """Like :func:`read_negatives`, for a text that :func:`.text.clean` returned; ``path`` is for messages."""
    table = all_lines(text).with_row_index("number", offset=1).drop_nulls()
    table = table.with_columns(pl.col("line").str.extract_groups(NEGATIVES)).unnest("line")
    strange = table["1"].is_null()
    if strange.any():
        number = int(table["number"][int(strange.arg_max() or 0)])
        fail(path, number, "expected (user,item) and then items that are separated by tabs")
    table = table.select("number", user="1", item="2", negatives=pl.col("3").str.extract_all(r"\S+"))
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
