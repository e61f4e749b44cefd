"""Reading files whose columns have names in any case: JSON (one object a line, or an array of them) and parquet."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.cells import Cells
from perfedrec.data.roles import MANY, Columns, locate, unused
from perfedrec.data.text import UnreadableError, all_lines, fail
from perfedrec.data.values import ALL_ROLES

BETWEEN = re.compile(r"[\s,]*")
LOOKED_AT = 100  # objects whose names are collected


def read_json(path: Path, text: bytes, columns: Columns | None) -> Cells:
    """Read objects of JSON: one a line, or all in an array."""
    array = text.lstrip()[:1] == b"["
    found = _first(path, text, array)
    names = list(found)

    def sample(column: int) -> pl.Series:
        return pl.Series([str(each) for each in found[names[column]] if each is not None], dtype=pl.String)

    places = locate(path, names, True, columns, sample)
    schema = {str(place.name): pl.String for place in places.values()}
    try:
        table = (pl.read_json if array else pl.read_ndjson)(io.BytesIO(text), schema=schema)
    except pl.exceptions.PolarsError as error:
        if not array:
            _complain(path, text)
        raise UnreadableError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    table = table.select(**{role: str(place.name) for role, place in places.items()})
    lines = None if array else all_lines(text)["line"]
    blank = 0 if lines is None else lines.null_count()

    def place(row: int) -> str:
        if lines is None:
            return f"object {row + 1}"
        return f"line {int(lines.is_not_null().arg_true()[row]) + 1}"

    for role in table.columns:
        nested = table[role].str.contains(r"^[{\[]").fill_null(False)
        if nested.any():
            row = int(nested.arg_max() or 0)
            fail(path, place(row), f"{role} is nested: {table[role][row]}; expected a text or a number")
    remarks = unused(names, True, places, columns, sample)
    return Cells(table, place, places, blank=blank, remarks=remarks)


def _first(path: Path, text: bytes, array: bool) -> dict[str, list[object]]:
    """The names in the first objects, in their order, each with its values there."""
    names: dict[str, list[object]] = {}

    def add(found: dict[str, object]) -> None:
        for name, value in found.items():
            names.setdefault(name, []).append(value)

    if array:
        decoder, content = json.JSONDecoder(), text.decode()
        start = content.find("[") + 1
        for _ in range(LOOKED_AT):
            start += len(BETWEEN.match(content, start)[0])  # type: ignore[index]  # it matches the empty text too
            if content[start : start + 1] != "{":
                break
            try:
                found, start = decoder.raw_decode(content, start)
            except ValueError as error:
                raise UnreadableError(f"{path}: cannot be read as JSON ({error})") from None
            add(found)
        if not names:
            raise DataError(f"{path}: is a JSON array, but not of objects; expected [{{...}}, ...] or an object a line")
        return names
    for number, line in enumerate(io.BytesIO(text), start=1):
        if line.strip():
            add(_object(path, number, line))
        if number == LOOKED_AT:
            break
    return names


def _object(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError as error:
        if (number == 1 and line.strip() in (b"{", b"[")) or line.rstrip()[-1:] == b",":
            fail(path, number, "is part of an object of several lines; expected one whole object on each line")
        if line.lstrip()[:2] in (b"{'", b"{u"):
            fail(path, number, "is a Python dictionary, not JSON; rewrite the file with json.dumps, an object a line")
        fail(path, number, f"is not JSON ({error}); expected one object on each line")
    if not isinstance(found, dict):
        fail(path, number, "is not a JSON object; expected one object on each line")
    return found


def _complain(path: Path, text: bytes) -> None:
    """Raise for the first line that is not an object."""
    for number, line in enumerate(io.BytesIO(text), start=1):
        if line.strip():
            _object(path, number, line)


def read_parquet(path: Path, data: bytes, columns: Columns | None) -> Cells:
    """Read a table of parquet."""
    try:
        table = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None

    def sample(column: int) -> pl.Series:
        return table.to_series(column).head(MANY)

    places = locate(path, table.columns, True, columns, sample)
    picked = {role: table.to_series(places[role].position - 1) for role in ALL_ROLES if role in places}
    remarks = unused(table.columns, True, places, columns, sample)
    return Cells(pl.DataFrame(picked), lambda row: f"row {row + 1}", places, remarks=remarks)
