"""Reading tables of text: one interaction a line, its fields separated by commas, tabs, white space and the like.

polars reads the whole file at once, which is fast. Only where something is wrong, the file is read a second time,
record by record, to find the line for the error message.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import polars as pl

from perfedrec.core.counted import counted
from perfedrec.data.cells import Cells
from perfedrec.data.quotes import settle_quotes
from perfedrec.data.roles import MANY, Columns, is_header, locate, unused
from perfedrec.data.text import QUOTING, Layout, UnreadableError, complain_about_width, fail, records, single_spaces
from perfedrec.data.times import EARLIEST, ISO, SLASHES

SEPARATORS = "\t,;|"


def read_table(path: Path, text: bytes, layout: Layout, columns: Columns | None, header: bool | None) -> Cells:
    """Read a table. ``header`` says whether the first line is one; ``None``: as the layout says, or as it looks."""
    text, layout = _arrange(text, layout)
    inner = 0
    if layout.separator in QUOTING:
        text, inner = settle_quotes(path, text, layout.separator)
    head = [fields for _, fields in islice(records(path, text, layout), MANY + 100) if fields]
    has_header = header if header is not None else layout.header
    if has_header is None:
        has_header = _names_columns(head[0], columns) or is_header(head)
    names = [name.strip() for name in head[0]]

    def sample(column: int) -> pl.Series:
        return pl.Series([line[column] for line in head[has_header:] if column < len(line)], dtype=pl.String)

    places = locate(path, names, has_header, columns, sample)
    skipped = next(i for i, (_, fields) in enumerate(records(path, text, layout)) if fields) + int(has_header)
    table = _cut(path, text, layout, len(names), skipped)
    if table is None:  # a header alone: no interactions
        return Cells(pl.DataFrame(schema=dict.fromkeys(places, pl.String)), str, places, has_header)
    expected = text.count(b"\n") + 1 - inner - skipped
    if table.height != expected:
        complain_about_width(path, text, layout, len(names))
        raise UnreadableError(f"{path}: has {counted(expected, 'line')}, of which {table.height:,} could be read")
    table = table.select(**{role: f"c{place.position - 1}" for role, place in places.items()}).with_row_index("row")
    blank = 0
    if table.null_count().sum_horizontal()[0]:
        complain_about_width(path, text, layout, len(names))
        empty = pl.all_horizontal(pl.exclude("row").is_null())
        blank = table.select(empty.sum()).item()
        for number, fields in records(path, text, layout) if blank else ():
            if fields and not any(fields[place.position - 1] for place in places.values()):
                fail(path, number, "user is missing; expected an id")
        table = table.filter(~empty)

    def place(row: int) -> str:
        wanted = int(table["row"][row]) + skipped
        return f"line {next(line for i, (line, _) in enumerate(records(path, text, layout)) if i == wanted)}"

    cells = table.drop("row")
    if not has_header and columns is None and "rating" in places and "timestamp" not in places and _times(cells):
        cells = cells.rename({"rating": "timestamp"})
        places = {"timestamp" if role == "rating" else role: place for role, place in places.items()}
    remarks = unused(names, has_header, places, columns, sample)
    return Cells(cells, place, places, has_header, blank, layout.integers, remarks=remarks)


def _arrange(text: bytes, layout: Layout) -> tuple[bytes, Layout]:
    """The text with a separator of one byte, which is what polars can read, and the layout with that separator."""
    if layout.separator == "":
        first = text.lstrip(b"\n").partition(b"\n")[0].decode()
        layout = replace(layout, separator=max(SEPARATORS, key=first.count))
        layout = layout if layout.separator in first else replace(layout, separator=" ")
    if layout.separator == " ":
        return single_spaces(text), layout
    if layout.separator == "::":
        return text.replace(b"::", b"\x1f"), replace(layout, separator="\x1f")
    return text, layout


def _cut(path: Path, text: bytes, layout: Layout, width: int, skipped: int) -> pl.DataFrame | None:
    """All cells as text, null where one is empty, or ``None`` where there are no lines."""
    try:
        return pl.read_csv(
            text,
            has_header=False,
            skip_rows=skipped,
            separator=layout.separator,
            quote_char='"' if layout.separator in QUOTING else None,
            schema={f"c{i}": pl.String for i in range(width)},
        )
    except pl.exceptions.NoDataError:
        return None
    except pl.exceptions.PolarsError as error:
        complain_about_width(path, text, layout, width)
        raise UnreadableError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None


def _names_columns(first: list[str], columns: Columns | None) -> bool:
    """Whether the first line holds a name that ``columns`` gives and that is no position."""
    names = [name.strip() for name in first]
    wanted = [str(each) for each in (columns or {}).values()]
    return any(each in names and not (each.isdigit() and 1 <= int(each) <= len(names)) for each in wanted)


def _times(cells: pl.DataFrame) -> bool:
    """Whether the third column, which would be the rating, holds times."""
    numbers = cells["rating"].cast(pl.Float64, strict=False)
    if not numbers.null_count():
        return bool((numbers >= EARLIEST).all())
    sample = [value.strip() for value in cells["rating"].drop_nulls().head(MANY).to_list()]
    return bool(sample) and all(ISO.fullmatch(value) or SLASHES.fullmatch(value) for value in sample)
