"""Reading interaction files of several formats by one function."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.core.nearest import nearest
from perfedrec.data.cells import Cells
from perfedrec.data.detection import detect_text
from perfedrec.data.doubts import ask
from perfedrec.data.lists import read_adjacency, read_netflix, read_positives, read_sequences
from perfedrec.data.objects import read_json, read_parquet
from perfedrec.data.readreport import ReadReport
from perfedrec.data.roles import MANY, ONE_USER, Columns, locate, unused
from perfedrec.data.tables import read_table
from perfedrec.data.text import Layout, UnreadableError, clean, encoding_of, read_bytes
from perfedrec.data.values import ALL_ROLES, convert

LAYOUTS = {
    "triples": Layout(" ", header=False),
    "csv": Layout(""),
    "tsv": Layout("\t"),
    "ml-100k": Layout("\t", header=False, integers=True),
    "ml-1m": Layout("::", header=False, integers=True),
    "ml-csv": Layout(",", header=True, integers=True),
    "recbole": Layout("\t", header=True),
}
LISTS = {"adjacency": read_adjacency, "sequences": read_sequences, "negatives": read_positives, "netflix": read_netflix}
FORMATS = ("auto", *LAYOUTS, *LISTS, "json", "parquet")


def read(
    path: str | Path,
    format: str = "auto",
    columns: Columns | None = None,
    *,
    header: bool | None = None,
    min_rating: float | None = None,
) -> pl.DataFrame:
    """Read interactions. Returns a frame with columns user, item and, where the file has them, rating and timestamp.

    ``format`` is one of :data:`FORMATS`; "auto" detects it from the content. ``columns`` gives the columns of user,
    item, rating and timestamp, by name or by position counted from 1; it is needed where the header has unusual names
    or is missing; "none" stands for a rating or timestamp that is not to be read. ``header`` says whether the first
    line names the columns; ``None``: as it looks. A file may be packed (gzip, bzip2, xz, or zip with one file) and have
    any encoding.

    Ids are Int64 if all ids of a column are plain integers, otherwise String ("007" stays "007"). Ratings are Float64.
    Timestamps are Int64 in the unit of the file, seconds, milli-, micro- or nanoseconds since 1970 (see
    :func:`.times.time_unit`); dates become seconds. Where the items of a user are in the order of time, the frame has a
    column position. Where all ratings are 0 or 1, those of 0 are negatives and left out. Repeated rows are kept. A
    header without rows gives an empty frame.

    Where the content does not fit what was assumed, for example a column of dates as items, an error asks instead of
    going on. An argument that is given is an answer. ``min_rating``, a threshold that the caller will apply, answers
    questions about ratings; it removes nothing here.

    Raises :class:`DataError`, which names the file, the line (counted from 1) and what was expected.
    """
    return read_with_report(path, format, columns, header=header, min_rating=min_rating)[0]


def read_with_report(
    path: str | Path,
    format: str = "auto",
    columns: Columns | None = None,
    *,
    header: bool | None = None,
    min_rating: float | None = None,
    held_out: bool = False,
    user: str | None = None,
    guessed: bool = False,
) -> tuple[pl.DataFrame, ReadReport]:
    """Like :func:`read`, and also tell how the file was read.

    ``held_out`` says that the file is a part of the data that is not for training alone, such as a test part: there it
    is no surprise that each user or each item occurs once. ``user`` says whose interactions all rows are; then no
    column is read as users. ``guessed`` says that nobody has chosen the ``format``: it was detected in another file.
    """
    path, guessed = Path(path), guessed or format == "auto"
    columns = columns if user is None else {**(columns or {}), "user": ONE_USER}
    check_name(format, FORMATS, "format")
    for role in columns or {}:
        check_name(role, ALL_ROLES, "column role")
    data = read_bytes(path)
    remarks: tuple[str, ...] = ()
    found = format
    if format == "parquet" or (format == "auto" and data[:4] == b"PAR1"):
        found = "parquet"
    else:
        encoding = encoding_of(path, data)
        if encoding == "windows-1252":
            remarks = ("the text is not UTF-8: read as windows-1252",)
        data = clean(path, data)
        found = detect_text(path, data) if format == "auto" else format
    try:
        cells = _cells(path, data, found, columns, header, guessed)
        frame, unit = convert(path, cells.table, cells.integers, cells.place)
    except UnreadableError as error:
        guess = _guess(guessed, found, header, columns)
        raise DataError(f"{error}{guess and f'; {guess}'}") from None
    if user is not None:
        frame = frame.select(pl.lit(user).alias("user"), pl.all())
    if cells.ordered:
        frame = frame.with_row_index("position").with_columns(pl.col("position").cast(pl.Int64))
        frame = frame.select(pl.exclude("position"), "position")
    report = ReadReport(
        path=path,
        format=found,
        places=dict(cells.places),
        header=cells.header,
        unit=unit,
        rows=frame.height,
        blank=cells.blank,
        remarks=remarks + cells.remarks,
    )
    by_position = not cells.header and found in ("csv", "tsv", "triples") and format != "triples"
    return ask(frame, report, cells.place, by_position, columns, min_rating, held_out)


def roles_of(
    where: str, table: pl.DataFrame, columns: Columns | None = None, min_rating: float | None = None
) -> tuple[pl.DataFrame, ReadReport]:
    """The columns of a ``table`` that have a role, as :func:`read` returns them, and how they were read.

    ``where`` is the name of the data for messages. The arguments are those of :func:`read`.
    """
    for role in columns or {}:
        check_name(role, ALL_ROLES, "column role")

    def sample(column: int) -> pl.Series:
        return table.to_series(column).head(MANY)

    path, places = Path(where), locate(Path(where), table.columns, True, columns, sample)

    def place(row: int) -> str:
        return f"row {row + 1}"

    picked = {role: table.to_series(at.position - 1) for role, at in places.items()}
    frame, unit = convert(path, pl.DataFrame(picked), False, place)
    remarks = unused(table.columns, True, places, columns, sample)
    report = ReadReport(path, "data frame", places, None, unit, frame.height, remarks=remarks)
    return ask(frame, report, place, False, columns, min_rating, held_out=False)


def _cells(path: Path, data: bytes, format: str, columns: Columns | None, header: bool | None, guessed: bool) -> Cells:
    if format == "parquet":
        return read_parquet(path, data, columns)
    if format == "json":
        return read_json(path, data, columns)
    if format in LAYOUTS:
        return read_table(path, data, LAYOUTS[format], columns, header)
    if columns or header:
        raise DataError(f"{path}: the format {format} has no columns or header to choose; see --format")
    if format == "adjacency":
        return read_adjacency(path, data, integers=guessed)  # otherwise any text could be read as an adjacency list
    if format == "sequences":
        return read_sequences(path, data, colons=guessed)
    return LISTS[format](path, data)


def _guess(guessed: bool, found: str, header: bool | None, columns: Columns | None) -> str:
    """What was guessed about a file that could not be read, and the options that say otherwise."""
    options = ["--format"] * guessed
    options += ["--header", "--no-header"] * (found in ("csv", "tsv") and header is None)
    options += ["--columns"] * (found in LAYOUTS and columns is None)
    if not options:
        return ""
    hints = {
        "adjacency": " (with --format adjacency, ids may be names)",
        "sequences": " (--format sequences also takes lines without a colon, and items with one)",
    }
    return f"read as {found}, which is a guess in part; if it is wrong, see {', '.join(options)}{hints.get(found, '')}"


def parse_columns(text: str) -> dict[str, str | int] | None:
    """Read the places of columns from a text such as ``user=customer,item=2``; ``None`` for an empty text.

    A place is a name, or a position counted from 1. A name may have commas: the next role comes after a comma, and has
    an equals sign. Raises :class:`DataError` for any other text.
    """
    found: dict[str, str | int] = {}
    ends = rf",(?=\s*(?:$|[\w-]+\s*=|(?:{'|'.join(ALL_ROLES)})\s*(?:,|$)))"  # a role alone is a mistake, and no name
    for part in filter(None, (piece.strip() for piece in re.split(ends, text))):
        role, equals, place = (piece.strip() for piece in part.partition("="))
        if not equals or not place:
            raise DataError(f"columns: {part!r} names no column; expected role=column, as in user=customer,item=2")
        check_name(role, ALL_ROLES, "column role")
        if role in found:
            raise DataError(f"columns: {role} is given twice, as {found[role]} and {place}; expected one column for it")
        found[role] = int(place) if place.isdecimal() else place
    return found or None


def check_name(name: str, known: tuple[str, ...], kind: str) -> None:
    """Raise :class:`DataError` for a name that is not among ``known``; the message names the nearest one that is."""
    if name not in known:
        raise DataError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
