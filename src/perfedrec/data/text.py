"""The text of data files: reading bytes, cleaning them, and cutting them into lines, fields and records."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import polars as pl

from perfedrec.core.errors import DataError

CONTROL = bytes(code for code in range(32) if chr(code) not in "\t\n")


@dataclass(frozen=True)
class Layout:
    """How the text of a file is arranged.

    The ``separator`` " " stands for any white space, and "" means that it is to be detected.
    """

    separator: str
    header: bool | None = None  # None: to be detected
    adjacency: bool = False
    integers: bool = False  # ids must be integers


def fail(path: Path, line: int, problem: str) -> NoReturn:
    """Raise :class:`DataError` for a problem in a line, counted from 1."""
    raise DataError(f"{path}, line {line}: {problem}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises :class:`DataError` where it does not exist, is empty or cannot be read."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not data:
        raise DataError(f"{path}: is empty")
    return data


def clean(path: Path, data: bytes) -> bytes:
    """The text of a file as UTF-8, with line ends ``\\n`` and none at the end. Line numbers do not change.

    Raises :class:`DataError` for an empty text, a control character, and text that is not UTF-8.
    """
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n ")
    if not data.strip():
        raise DataError(f"{path}: is empty")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    if any(len(part) != len(part.translate(None, CONTROL)) for part in _parts(data)):
        control = re.search(b"[" + re.escape(CONTROL) + b"]", data)
        assert control is not None
        line = data.count(b"\n", 0, control.start()) + 1
        fail(path, line, f"holds the control character {control[0][0]:#04x}; expected text or parquet")
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            fail(path, data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text; convert the file to UTF-8")
    return data


def _parts(data: bytes) -> Iterator[bytes]:
    return (data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20))


def single_spaces(data: bytes) -> bytes:
    """The text with each run of spaces and tabs replaced by one space, and without spaces at the ends of lines."""
    if b"\t" in data:
        data = data.replace(b"\t", b" ")
    if b"  " in data:
        data = re.sub(rb" +", b" ", data)
    if b" \n" in data or b"\n " in data or data[:1] == b" ":
        data = re.sub(rb"(?m)^ | $", b"", data)
    return data


def filled_lines(text: bytes) -> pl.Series:
    """The lines that are not blank."""
    return all_lines(text)["line"].drop_nulls()


def all_lines(text: bytes) -> pl.DataFrame:
    """A column ``line`` with one row per line, null where the line is blank; row i is line i + 1."""
    return pl.read_csv(
        text, has_header=False, new_columns=["line"], separator="\x1f", quote_char=None, infer_schema=False
    )


def records(path: Path, text: bytes, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """The line number (counted from 1) and the fields of each record; a blank line has no fields.

    This is slow: it is meant for the first lines of a file and for error messages. Raises :class:`DataError` where a
    line cannot be split.
    """
    stream = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", newline="")
    if layout.separator in (",", ";", "\t"):
        reader, line = csv.reader(stream, delimiter=layout.separator), 1
        try:
            for fields in reader:
                yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            fail(path, line, f"cannot be split into columns ({error})")
    else:
        for line, content in enumerate(stream, start=1):
            content = content.rstrip("\n")
            yield line, content.split(layout.separator) if content else []


def complain_about_width(path: Path, text: bytes, layout: Layout, width: int) -> None:
    """Raise :class:`DataError` for the first record that does not have ``width`` fields; do nothing if all have."""
    for line, fields in records(path, text, layout):
        if fields and len(fields) != width:
            fail(path, line, f"has {counted(len(fields))}; expected {width} as in the first line")


def counted(n: int) -> str:
    """A number of columns as text: ``1 column``, ``3 columns``."""
    return "1 column" if n == 1 else f"{n} columns"
