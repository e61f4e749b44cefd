"""The text of data files: reading bytes, cleaning them, and cutting them into lines, fields and records."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError, reason
from perfedrec.core.nearest import listing, quoted
from perfedrec.data.packed import unpack

QUOTING = (",", ";", "|")  # separators between fields that quotes may enclose
CONTROL = bytes(code for code in range(32) if chr(code) not in "\t\n")


@dataclass(frozen=True)
class Layout:
    """How the text of a file is arranged.

    The ``separator`` " " stands for any white space, and "" means that it is to be detected.
    """

    separator: str
    header: bool | None = None  # None: to be detected
    integers: bool = False  # ids must be integers


class UnreadableError(DataError):
    """A file that does not have the form it is read in. Where the form is a guess, the guess may be wrong."""


def fail(path: Path, line: int | str, problem: str) -> NoReturn:
    """Raise :class:`UnreadableError` for a problem in a line, counted from 1, or in a place such as ``row 7``."""
    raise UnreadableError(f"{path}, {line if isinstance(line, str) else f'line {line}'}: {problem}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked where it is packed (see :func:`.packed.unpack`).

    Raises :class:`DataError` where it does not exist, is empty or cannot be read.
    """
    if path.is_dir():
        found = listing(sorted(each.name for each in path.iterdir())[:8])
        raise DataError(f"{path}: is a folder; expected a file{f', such as one of {found}' if found else ''}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_nearest(path)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    data = unpack(path, data)
    if not data:
        raise DataError(f"{path}: is empty; expected lines with data")
    return data


def _nearest(path: Path) -> str:
    """What to do about a file that does not exist."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    names = sorted(each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    stems = {name: Path(name).stem for name in names}  # files of one kind have the same end
    alike = difflib.get_close_matches(path.stem, stems.values(), n=3, cutoff=0.7)
    near = [name for name in names if stems[name] in alike or name.startswith(path.stem)][:3]
    if near:
        return f"; did you mean {' or '.join(map(quoted, near))}?"
    there = f"{listing(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "nothing"
    return f"; expected the path of an existing file (in {path.parent.absolute()}: {there})"


def encoding_of(path: Path, data: bytes) -> str:
    """The encoding of a text: utf-8, utf-16 or utf-32 (by their marks or zero bytes), or windows-1252.

    A text that is not UTF-8 and holds no letter of UTF-8 either is taken as windows-1252. This tells ids apart even
    where the encoding is another one. Raises :class:`DataError` for damaged UTF-8, which holds both.
    """
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    start = data[:1000]
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) > 3 and start[offset::2].count(0) > 0.9 * len(start) // 2 and not start[1 - offset :: 2].count(0):
            return name
    if data.isascii():
        return "utf-8"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        text = data.decode(errors="ignore")
        if text.isascii():
            return "windows-1252"
        line = data.count(b"\n", 0, error.start) + 1
        fail(path, line, "is not UTF-8 text, though other lines are; convert the file to UTF-8")
    return "utf-8"


def clean(path: Path, data: bytes) -> bytes:
    """The text of a file as UTF-8, with line ends ``\\n`` and none at the end. Line numbers do not change.

    Lines may end with ``\\n``, ``\\r\\n`` or, as in old files, ``\\r``. Raises :class:`DataError` for an empty text, a
    control character, and damaged text.
    """
    encoding = encoding_of(path, data)
    if encoding != "utf-8":
        try:
            data = data.decode(encoding).encode()
        except UnicodeDecodeError as error:
            if encoding != "windows-1252":
                raise DataError(
                    f"{path}: is damaged {encoding.upper()} text ({error.reason}); save it as UTF-8"
                ) from None
            data = data.decode("latin-1").encode()  # differs from windows-1252 in the few codes that this one lacks
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n ")
    if not data.strip():
        raise DataError(f"{path}: is empty; expected lines with data")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n") if b"\n" in data else data.replace(b"\r", b"\n")
    if any(len(part) != len(part.translate(None, CONTROL)) for part in _parts(data)):
        control = re.search(b"[" + re.escape(CONTROL) + b"]", data)
        assert control is not None
        line = data.count(b"\n", 0, control.start()) + 1
        if control[0] == b"\r":
            fail(path, line, "holds a carriage return inside the line; expected one kind of line end in the whole file")
        fail(path, line, f"holds the control character {control[0][0]:#04x}; expected text or parquet")
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

    This is slow: it is meant for the first lines of a file and for error messages. Where quotes may enclose fields, the
    text must come from :func:`.quotes.settle_quotes`. Raises :class:`DataError` where a line cannot be split.
    """
    stream = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", newline="")
    if layout.separator in QUOTING:
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
            fail(path, line, f"has {counted(len(fields), 'column')}; expected {width} as in the first line")
