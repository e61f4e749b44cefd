"""The text of data files: bytes that are read, cleaned, and cut into lines, fields and records."""

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
    """How the text of a file is arranged. ``separator`` " " stands for any white space, "" for "find out"."""

    separator: str
    header: bool | None = None  # None: find out
    adjacency: bool = False
    integers: bool = False  # ids must be integers


def fail(path: Path, line: int, problem: str) -> NoReturn:
    """Say what is wrong in a line, counted from 1."""
    raise DataError(f"{path}, line {line}: {problem}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that exists and is not empty."""
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
    """UTF-8 text with plain line ends and none at the end; line numbers stay as they are."""
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
    """Any run of spaces and tabs as one space, none at either end of a line."""
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
    """One row per line, null where it is blank; row i is line i + 1."""
    return pl.read_csv(
        text, has_header=False, new_columns=["line"], separator="\x1f", quote_char=None, infer_schema=False
    )


def records(path: Path, text: bytes, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Line number, counted from 1, and fields of each record; a blank line has none. Slow: for heads and errors."""
    stream = io.TextIOWrapper(io.BytesIO(text), newline="")
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
    """Say which record has not ``width`` fields, where there is one."""
    for line, fields in records(path, text, layout):
        if fields and len(fields) != width:
            fail(path, line, f"has {counted(len(fields))}; expected {width} as in the first line")


def counted(n: int) -> str:
    """So many columns, in words."""
    return "1 column" if n == 1 else f"{n} columns"
