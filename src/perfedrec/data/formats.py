"""Reading interaction files of several formats by one function.

polars reads the whole file at once, which is fast. Only where something is wrong, the file is read a second time,
record by record, to find the line for the error message.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.detection import EARLIEST_TIME, HEADER_NAMES, at_least, detect_text, is_header, plain_name
from perfedrec.data.text import (
    Layout,
    all_lines,
    clean,
    complain_about_width,
    counted,
    fail,
    read_bytes,
    records,
    single_spaces,
)
from perfedrec.data.values import ROLES, SCHEMA, convert, parse_ids

Columns = Mapping[str, str | int]
LAYOUTS = {
    "triples": Layout(" ", header=False),
    "adjacency": Layout(" ", header=False, adjacency=True),
    "csv": Layout(""),
    "tsv": Layout("\t"),
    "ml-100k": Layout("\t", header=False, integers=True),
    "ml-1m": Layout("::", header=False, integers=True),
    "ml-csv": Layout(",", header=True, integers=True),
    "recbole": Layout("\t", header=True),
}
FORMATS = ("auto", *LAYOUTS, "parquet")


def read(path: str | Path, format: str = "auto", columns: Columns | None = None) -> pl.DataFrame:
    """Read interactions. Returns a frame with columns user, item and, where the file has them, rating and timestamp.

    ``format`` is one of :data:`FORMATS`; "auto" detects it from the content. ``columns`` gives the columns of user,
    item, rating and timestamp, by name or by position counted from 1; it is needed where the header has unusual names
    or is missing. Ids are Int64 if all ids of a column are plain integers, otherwise String ("007" stays "007").
    Ratings are Float64. Timestamps are Int64, in seconds since 1970; the file may have seconds, milliseconds or finer,
    or ISO dates. Repeated rows are kept. A header without rows gives an empty frame.

    Raises :class:`DataError`, which names the file, the line (counted from 1) and what was expected.
    """
    path = Path(path)
    check_name(format, FORMATS, "format")
    for role in columns or {}:
        check_name(role, ROLES, "column role")
    data = read_bytes(path)
    if format == "parquet" or (format == "auto" and data[:4] == b"PAR1"):
        return _read_parquet(path, data, columns)
    text = clean(path, data)
    layout = LAYOUTS[detect_text(path, text) if format == "auto" else format]
    if layout.adjacency and format == "auto":
        layout = replace(layout, integers=True)  # otherwise any text could be read as an adjacency list
    return _read_adjacency(path, text, layout) if layout.adjacency else _read_table(path, text, layout, columns)


def parse_columns(text: str) -> dict[str, str | int] | None:
    """Read the places of columns from a text such as ``user=customer,item=2``; ``None`` for an empty text.

    A place is a name, or a position counted from 1. Raises :class:`DataError` for any other text.
    """
    found: dict[str, str | int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        role, equals, place = (piece.strip() for piece in part.partition("="))
        if not equals or not place:
            raise DataError(f"columns: {part!r} names no column; expected role=column, as in user=customer,item=2")
        check_name(role, ROLES, "column role")
        found[role] = int(place) if place.isdecimal() else place
    return found or None


def check_name(name: str, known: tuple[str, ...], kind: str) -> None:
    """Raise :class:`DataError` for a name that is not among ``known``; the message names the nearest one that is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}")


def _read_adjacency(path: Path, text: bytes, layout: Layout) -> pl.DataFrame:
    table = all_lines(single_spaces(text)).with_row_index("number", offset=1).drop_nulls()
    table = table.select("number", pl.col("line").str.split(" ").alias("fields"))
    table = table.select("number", user=pl.col("fields").list.first(), item=pl.col("fields").list.slice(1))
    again = table.filter(~pl.col("user").is_first_distinct())
    if again.height:
        number, user = again.row(0)[:2]
        problem = f"user {user} occurs a second time; an adjacency list names each user once, followed by all items"
        fail(path, number, f"{problem} (for lines of user, item and weight use --format triples)")
    rows = table.filter(pl.col("item").list.len() > 0).explode("item")  # users without items are allowed
    if not rows.height:
        raise DataError(f"{path}: holds users but no items; expected lines of user item item ...")

    def line_of(row: int) -> int:
        return int(rows["number"][row])

    # Check all users, also those without items.
    users, bad = parse_ids(table["user"], layout.integers)
    if bad is not None:
        fail(path, int(table["number"][bad[0]]), f"user {bad[1]}")
    items, bad = parse_ids(rows["item"], layout.integers)
    if bad is not None:
        fail(path, line_of(bad[0]), f"item {bad[1]}")
    return rows.select(pl.col("user").cast(users.dtype), items.alias("item"))


def _read_table(path: Path, text: bytes, layout: Layout, columns: Columns | None) -> pl.DataFrame:
    text, layout = _arrange(text, layout)
    first = next(fields for _, fields in records(path, text, layout) if fields)
    header = layout.header
    if header is None:
        header = _has_header(path, text, layout)
    names = [name.strip() for name in first] if header else [str(i + 1) for i in range(len(first))]
    n_skipped = next(i for i, (_, fields) in enumerate(records(path, text, layout)) if fields) + bool(header)
    where = _locate_roles(path, names, header, columns)
    try:
        table = pl.read_csv(
            text,
            has_header=False,
            skip_rows=n_skipped,
            separator=layout.separator,
            quote_char='"' if layout.separator in (",", ";", "\t") else None,
            schema={f"c{i}": pl.String for i in range(len(names))},
        ).select(**{role: f"c{i}" for role, i in where.items()})
    except pl.exceptions.NoDataError:  # a header alone: no interactions
        return pl.DataFrame(schema={role: SCHEMA[role] for role in ROLES if role in where})
    except pl.exceptions.PolarsError as error:
        complain_about_width(path, text, layout, len(names))
        raise DataError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    if table.null_count().sum_horizontal()[0]:
        complain_about_width(path, text, layout, len(names))
        table = table.with_row_index("row").filter(~pl.all_horizontal(pl.exclude("row").is_null()))
    else:
        table = table.with_row_index("row")

    def complain(row: int, problem: str) -> NoReturn:
        wanted = int(table["row"][row]) + n_skipped
        line = next(line for i, (line, _) in enumerate(records(path, text, layout)) if i == wanted)
        fail(path, line, problem)

    if not header and columns is None and "rating" in where and "timestamp" not in where:
        number = table["rating"].cast(pl.Float64, strict=False)
        if at_least(number, EARLIEST_TIME):
            table = table.rename({"rating": "timestamp"})
    return convert(table, layout.integers, complain)


def _arrange(text: bytes, layout: Layout) -> tuple[bytes, Layout]:
    """The text with a separator of one byte, which is what polars can read, and the layout with that separator."""
    if layout.separator == "":
        first = text[: text.find(b"\n") % (len(text) + 1)].decode()
        layout = replace(layout, separator=max("\t,; ", key=lambda sign: (sign != " ") * first.count(sign)))
        layout = layout if layout.separator in first else replace(layout, separator=" ")
    if layout.separator == " ":
        return single_spaces(text), layout
    if layout.separator == "::":
        return text.replace(b"::", b"\x1f"), replace(layout, separator="\x1f")
    return text, layout


def _has_header(path: Path, text: bytes, layout: Layout) -> bool:
    """Whether the first line is a header: it has known names, or words in a column that has numbers further down."""
    head = [fields for _, fields in islice(records(path, text, layout), 20) if fields]
    if is_header(head[0]):
        return True
    return any(not _is_number(head[0][i]) and _is_number(cell) for i, cell in enumerate(head[-1][: len(head[0])]))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _locate_roles(path: Path, names: list[str], header: bool, columns: Columns | None) -> dict[str, int]:
    """Column position, counted from 0, of each role that the file has."""
    where: dict[str, int] = {}
    if header:
        for role, known in HEADER_NAMES.items():
            matching = [i for i, name in enumerate(names) if plain_name(name) in known]
            if len(matching) > 1 and role not in (columns or {}):
                twins = " and ".join(names[i] for i in matching)
                raise DataError(
                    f"{path}: columns {twins} could both be the {role}; choose with --columns user=NAME,item=NAME"
                )
            if matching:
                where[role] = matching[0]
    elif columns is None:
        if not 2 <= len(names) <= 4:
            expected = "user item [rating [timestamp]]"
            fail(path, 1, f"has {counted(len(names))}; expected {expected}, a header, or --columns user=1,item=2")
        where = {role: i for i, role in enumerate(ROLES[: len(names)])}
    for role, wanted in (columns or {}).items():
        if wanted in names:
            where[role] = names.index(str(wanted))
        elif str(wanted).isdigit() and 1 <= int(wanted) <= len(names):
            where[role] = int(wanted) - 1
        else:
            raise DataError(f"{path}: no column {wanted!r} for the {role}; the columns are {', '.join(names)}")
    missing = [role for role in ("user", "item") if role not in where]
    if missing:
        raise DataError(
            f"{path}: no {' and no '.join(missing)} column; the columns are {', '.join(names)}; "
            "name them with --columns user=NAME,item=NAME"
        )
    return where


def _read_parquet(path: Path, data: bytes, columns: Columns | None) -> pl.DataFrame:
    try:
        table = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
    return roles_of(str(path), table, columns)


def roles_of(where: str, table: pl.DataFrame, columns: Columns | None) -> pl.DataFrame:
    """The columns of a ``table`` that have a role, as :func:`read` returns them; ``where`` is for messages."""
    for role in columns or {}:
        check_name(role, ROLES, "column role")
    places = _locate_roles(Path(where), table.columns, True, columns)

    def complain(row: int, problem: str) -> NoReturn:
        raise DataError(f"{where}, row {row + 1}: {problem}")

    return convert(pl.DataFrame({role: table.to_series(i) for role, i in places.items()}), False, complain)
