"""Reading interaction files: one function, several formats, one line of explanation for a file that is broken.

The fast path hands the whole file to polars. Only when something is wrong is the file read a second time, record by
record, to name the line.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import polars as pl

from perfedrec.core.errors import DataError

Columns = Mapping[str, str | int]

HEADER_NAMES = {
    "user": {"user", "userid", "uid", "u", "reviewerid", "customer", "customerid", "visitorid"},
    "item": {"item", "itemid", "iid", "i", "movieid", "movie", "bookid", "businessid", "productid", "artistid", "asin"},
    "rating": {"rating", "ratings", "score", "weight", "stars", "value", "r"},
    "timestamp": {"timestamp", "time", "ts", "t", "date", "datetime", "unixreviewtime"},
}
SCHEMA: dict[str, type[pl.DataType]] = {
    "user": pl.Int64,
    "item": pl.Int64,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
}
ROLES = tuple(SCHEMA)
CONTROL = bytes(code for code in range(32) if chr(code) not in "\t\n")
HEAD = 1 << 20  # bytes that are looked at first
EARLIEST_TIME = 10**8  # 1973: larger than ids and ratings, smaller than any log of interactions


@dataclass(frozen=True)
class Layout:
    """How the text of a file is arranged. ``separator`` " " stands for any white space, "" for "find out"."""

    separator: str
    header: bool | None = None  # None: find out
    adjacency: bool = False
    integers: bool = False  # ids must be integers


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
    """Read interactions: columns user, item and, where present, rating (Float64) and timestamp (Int64, seconds).

    ``format`` is one of :data:`FORMATS`; "auto" looks at the content. ``columns`` says where user, item, rating and
    timestamp are, by name or by position counted from 1, where header names are unusual or there is no header. Ids are
    Int64 when all of a column are plain integers, otherwise String ("007" stays what it is). Times may be seconds,
    milliseconds or finer, or ISO dates. Repeated rows are kept. A header without rows gives an empty frame.

    Raises :class:`DataError` with file, line (counted from 1) and what was expected.
    """
    path = Path(path)
    check_name(format, FORMATS, "format")
    for role in columns or {}:
        check_name(role, ROLES, "column role")
    data = read_bytes(path)
    if format == "parquet" or (format == "auto" and data[:4] == b"PAR1"):
        return _read_parquet(path, data, columns)
    text = clean(path, data)
    layout = LAYOUTS[_detect(path, text) if format == "auto" else format]
    if layout.adjacency and format == "auto":
        layout = replace(layout, integers=True)  # without that, any prose would pass for an adjacency list
    return _read_adjacency(path, text, layout) if layout.adjacency else _read_table(path, text, layout, columns)


def parse_columns(text: str) -> dict[str, str | int] | None:
    """Where columns are, as a person writes it: ``user=customer,item=2`` (a name, or a position counted from 1);
    ``None`` where nothing is said."""
    found: dict[str, str | int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        role, equals, place = (piece.strip() for piece in part.partition("="))
        if not equals or not place:
            raise DataError(f"columns: {part!r} says nothing; expected role=column, for example user=customer,item=2")
        check_name(role, ROLES, "column role")
        found[role] = int(place) if place.isdecimal() else place
    return found or None


def check_name(name: str, known: tuple[str, ...], kind: str) -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}")


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


def fail(path: Path, line: int, problem: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {problem}")


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


def _single_spaces(data: bytes) -> bytes:
    """Any run of spaces and tabs as one space, none at either end of a line."""
    if b"\t" in data:
        data = data.replace(b"\t", b" ")
    if b"  " in data:
        data = re.sub(rb" +", b" ", data)
    if b" \n" in data or b"\n " in data or data[:1] == b" ":
        data = re.sub(rb"(?m)^ | $", b"", data)
    return data


# --- finding out -----------------------------------------------------------------------------------------------------


def detect(path: str | Path) -> str:
    """The format of a file, found by looking at its content; :class:`DataError` when it could be either of two."""
    data = read_bytes(Path(path))
    return "parquet" if data[:4] == b"PAR1" else _detect(Path(path), clean(Path(path), data))


def _detect(path: Path, text: bytes) -> str:
    start = text.lstrip()[: 1 << 16]
    first = start.partition(b"\n")[0].decode(errors="replace")
    if re.search(r"\S::\S", first):
        return "ml-1m"
    if re.search(r":(token|float)\b", first):
        return "recbole"
    separator = next((sign for sign in "\t,;" if sign in first), None)
    header = _is_header(first.split(separator))
    if separator != "\t" and (separator or header):
        return "csv"
    if separator == "\t" and (header or re.search(rb"[^\d. \t\r\n]", start)):
        return "tsv"  # ids with spaces are one field only between tabs
    whole_lines = text if len(text) <= HEAD else text[:HEAD].rpartition(b"\n")[0] or text
    head = _lines(_single_spaces(whole_lines))
    verdict = _is_adjacency(head)
    # A table whose users come back in its first lines is a table; anything else has to be seen whole.
    if len(text) > HEAD and (verdict is not False or _users(head).is_unique().all()):
        verdict = _is_adjacency(_lines(_single_spaces(text)))
    if verdict is None:
        raise DataError(
            f"{path}: may be triples (user item weight) or an adjacency list (user item item ...); "
            "say --format triples or --format adjacency"
        )
    return "adjacency" if verdict else "triples"


def _is_adjacency(lines: pl.Series) -> bool | None:
    """Whether lines of single-spaced fields are an adjacency list rather than a table; None if both are plausible.

    The evidence: an adjacency list names a user once, has lines of differing length, and holds item ids, which are
    plain integers, everywhere. A table has one width; its users come back; its third column is a weight.
    """
    table = pl.DataFrame({"line": lines}).with_columns(
        width=pl.col("line").str.count_matches(" ", literal=True) + 1,
        field=pl.col("line").str.splitn(" ", 4),
    )
    n_users, n_lines = _users(lines).n_unique(), len(lines)
    widths = table["width"].value_counts(sort=True)
    width, share = int(widths["width"][0]), widths["count"][0] / n_lines
    if width == 2 and share == 1:
        return False  # pairs; one item per user means the same either way
    if share < 0.9 or width not in (3, 4):
        # Broken either way if a user comes back: then take the reading that most lines fit, so that the message helps.
        return n_users == n_lines or not (width <= 4 and share > 0.5)
    rows = table.filter(pl.col("width") == width).select(pl.col("field").struct.unnest())
    weight = rows["field_2"]
    number = weight.cast(pl.Float64, strict=False)
    item = rows["field_1"].cast(pl.Int64, strict=False)
    if item.null_count() > 0.1 * len(item) or weight.str.contains(r"^\d+\.\d*$").any():
        return False  # names, or fractions: neither occurs in an adjacency list
    if width == 3 and (weight == "1").all() and n_lines >= 5:
        return False  # the constant weight of implicit feedback
    if width == 4:
        time = rows["field_3"].cast(pl.Float64, strict=False)
        if _at_least(time, EARLIEST_TIME) and not _at_least(item, EARLIEST_TIME):
            return False
    if 2 * n_users <= n_lines:
        return False
    if n_users < n_lines and (number <= 10).all() and (item > 10).any():
        return False  # ratings
    return None


def _users(lines: pl.Series) -> pl.Series:
    return lines.str.splitn(" ", 2).struct.field("field_0")


def _at_least(values: pl.Series, bound: int) -> bool:
    return bool((values.fill_null(0) >= bound).all())


def _is_header(fields: list[str]) -> bool:
    """Whether a first line names at least a user or an item column."""
    names = [_plain(field) for field in fields]
    return any(name in HEADER_NAMES["user"] | HEADER_NAMES["item"] - {"i"} for name in names)


def _plain(name: str) -> str:
    """A column name as HEADER_NAMES writes it: "user_id:token" -> "userid"."""
    return re.sub(r"[^a-z0-9]", "", name.split(":")[0].lower())


# --- text ------------------------------------------------------------------------------------------------------------


def _lines(text: bytes) -> pl.Series:
    """The lines that are not blank."""
    return _all_lines(text)["line"].drop_nulls()


def _all_lines(text: bytes) -> pl.DataFrame:
    """One row per line, null where it is blank; row i is line i + 1."""
    return pl.read_csv(
        text, has_header=False, new_columns=["line"], separator="\x1f", quote_char=None, infer_schema=False
    )


def _read_adjacency(path: Path, text: bytes, layout: Layout) -> pl.DataFrame:
    table = _all_lines(_single_spaces(text)).with_row_index("number", offset=1).drop_nulls()
    table = table.select("number", pl.col("line").str.split(" ").alias("fields"))
    table = table.select("number", user=pl.col("fields").list.first(), item=pl.col("fields").list.slice(1))
    again = table.filter(~pl.col("user").is_first_distinct())
    if again.height:
        number, user = again.row(0)[:2]
        problem = f"user {user} occurs a second time; an adjacency list names each user once, followed by all items"
        fail(path, number, f"{problem} (for lines of user item weight say --format triples)")
    rows = table.filter(pl.col("item").list.len() > 0).explode("item")  # users without items are allowed
    if not rows.height:
        raise DataError(f"{path}: holds users but no items; expected lines of user item item ...")

    def line_of(row: int) -> int:
        return int(rows["number"][row])

    # The ids of users without items are checked too: they are ids of the file as well.
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
        if _at_least(number, EARLIEST_TIME):
            table = table.rename({"rating": "timestamp"})
    return _convert(table, layout.integers, complain)


def _arrange(text: bytes, layout: Layout) -> tuple[bytes, Layout]:
    """The text with a separator of one byte, as polars wants it."""
    if layout.separator == "":
        first = text[: text.find(b"\n") % (len(text) + 1)].decode()
        layout = replace(layout, separator=max("\t,; ", key=lambda sign: (sign != " ") * first.count(sign)))
        layout = layout if layout.separator in first else replace(layout, separator=" ")
    if layout.separator == " ":
        return _single_spaces(text), layout
    if layout.separator == "::":
        return text.replace(b"::", b"\x1f"), replace(layout, separator="\x1f")
    return text, layout


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
    for line, fields in records(path, text, layout):
        if fields and len(fields) != width:
            fail(path, line, f"has {_columns(len(fields))}; expected {width} as in the first line")


def _columns(n: int) -> str:
    return "1 column" if n == 1 else f"{n} columns"


def _has_header(path: Path, text: bytes, layout: Layout) -> bool:
    """Known names, or words above numbers."""
    head = [fields for _, fields in islice(records(path, text, layout), 20) if fields]
    if _is_header(head[0]):
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
            matching = [i for i, name in enumerate(names) if _plain(name) in known]
            if len(matching) > 1 and role not in (columns or {}):
                twins = " and ".join(names[i] for i in matching)
                raise DataError(
                    f"{path}: columns {twins} could both be the {role}; say which with --columns user=NAME,item=NAME"
                )
            if matching:
                where[role] = matching[0]
    elif columns is None:
        if not 2 <= len(names) <= 4:
            expected = "user item [rating [timestamp]]"
            fail(
                path, 1, f"has {_columns(len(names))}; expected {expected}, a header, or columns that say what is what"
            )
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
            "say which with --columns user=NAME,item=NAME"
        )
    return where


# --- values ----------------------------------------------------------------------------------------------------------

Bad = tuple[int, str] | None  # row and problem


def _convert(table: pl.DataFrame, integers: bool, complain: Callable[[int, str], NoReturn]) -> pl.DataFrame:
    done: dict[str, pl.Series] = {}
    for role in ROLES:
        if role in table.columns:
            if role in ("user", "item"):
                done[role], bad = parse_ids(table[role], integers)
            else:
                done[role], bad = (_ratings if role == "rating" else _times)(table[role])
            if bad is not None:
                complain(bad[0], f"{role} {bad[1]}")
    return pl.DataFrame(done)


def parse_ids(values: pl.Series, integers: bool = False) -> tuple[pl.Series, Bad]:
    """Ids as Int64 if all are plain integers, else as String; and the first that is none, with what was expected."""
    if values.dtype == pl.String:
        numbers = values.cast(pl.Int64, strict=False)
        if numbers.null_count():
            values = values.str.strip_chars()
            numbers = values.cast(pl.Int64, strict=False)
        if numbers.null_count() or not _canonical(values, numbers):
            if integers:
                return values, _first(
                    ~values.fill_null("").str.contains(r"^\d{1,18}$"), values, "expected an integer id"
                )
            unnamed = values.is_null() | values.str.to_lowercase().is_in(["", "nan", "null"])
            return values, _first(unnamed, values, "expected an id")
        values = numbers
    elif not values.dtype.is_integer():
        if values.dtype.is_float():
            whole = values.cast(pl.Int64, strict=False)
            broken = (whole.cast(values.dtype) != values).fill_null(True)
            return whole, _first(broken | (values < 0), values, "expected an id")
        return parse_ids(values.cast(pl.String), integers)
    values = values.cast(pl.Int64)
    return values, _first((values < 0).fill_null(True), values, "expected an id that is not negative")


def _canonical(values: pl.Series, numbers: pl.Series) -> bool:
    """Whether no number was written with a sign or leading zeros: "007" and "7" may be two items.

    What is parsed is never shorter than the number written plainly, so it is enough to compare total lengths.
    """
    if (numbers < 0).any():
        return True  # refused as such later
    plain = len(numbers)
    for digits in range(1, 19):
        longer = int((numbers >= 10**digits).sum())
        if not longer:
            break
        plain += longer
    return bool(values.str.len_bytes().sum() == plain)


def _ratings(values: pl.Series) -> tuple[pl.Series, Bad]:
    numbers = values.str.strip_chars() if values.dtype == pl.String else values
    numbers = numbers.cast(pl.Float64, strict=False)
    broken = ~(numbers.is_finite() & (numbers >= 0)).fill_null(False)
    return numbers, _first(broken, values, "expected a number that is not negative")


def _times(values: pl.Series) -> tuple[pl.Series, Bad]:
    """Seconds since 1970 as Int64."""
    if values.dtype.is_temporal():
        numbers = values.cast(pl.Datetime("ms")).dt.epoch("s").cast(pl.Float64)
    elif values.dtype == pl.String:
        stripped = values.str.strip_chars()
        numbers = stripped.cast(pl.Float64, strict=False)
        if numbers.null_count() == len(numbers):
            numbers = _dates(stripped)
    else:
        numbers = values.cast(pl.Float64)
    broken = ~(numbers.is_finite() & (numbers >= 0)).fill_null(False)
    bad = _first(broken, values, "expected seconds since 1970 or an ISO date")
    if bad is None:
        while (numbers > 1e11).any():  # milli-, micro- or nanoseconds; seconds reach 1e11 in the year 5138
            numbers = numbers / 1000
        numbers = numbers.floor().cast(pl.Int64)
    return numbers, bad


def _dates(values: pl.Series) -> pl.Series:
    """ISO dates, with or without time, as seconds; null where that fails."""
    for dtype in (pl.Datetime("ms"), pl.Date):
        try:
            return values.str.strptime(dtype, strict=False).cast(pl.Datetime("ms")).dt.epoch("s").cast(pl.Float64)
        except pl.exceptions.PolarsError:
            continue
    return pl.repeat(None, len(values), dtype=pl.Float64, eager=True)


def _first(broken: pl.Series, values: pl.Series, expected: str) -> Bad:
    if not broken.any():
        return None
    row = int(broken.arg_max() or 0)
    value = values[row]
    return row, f"is missing; {expected}" if value is None or value == "" else f"is {value!r}; {expected}"


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, data: bytes, columns: Columns | None) -> pl.DataFrame:
    try:
        table = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
    where = _locate_roles(path, table.columns, True, columns)

    def complain(row: int, problem: str) -> NoReturn:
        raise DataError(f"{path}, row {row + 1}: {problem}")

    return _convert(pl.DataFrame({role: table.to_series(i) for role, i in where.items()}), False, complain)
