"""Attributes of users and items: from a CSV file, or from the side files of MovieLens 100K and 1M."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Attributes, Encoding
from perfedrec.data.interactions import Ids, encode
from perfedrec.data.text import Layout, clean, complain_about_width, fail, read_bytes, records

MOST_CATEGORIES = 1000
AGES = (18, 25, 35, 45, 50, 56)  # the lower bounds of the age groups of MovieLens 1M
AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 or over")


def read_attributes(
    path: str | Path, ids: Ids, kind: str = "id", encoding: Encoding | None = None
) -> tuple[Attributes, tuple[str, ...]]:
    """Read the attributes of ``ids`` [n] from a CSV file. Returns the attributes and remarks in sentences.

    The first column of the file is the id; the others are numbers or categories. A column of numbers becomes one
    attribute, scaled to [0, 1] unless all its values are in that range. A column of categories becomes one attribute
    ``column=category`` for each category. With an ``encoding``, the attributes are those of the encoding, and columns
    that it does not name are ignored. Empty cells, and ids that the file does not have, are zeros.

    The remarks say how many ids the file does not have, and how many of its ids are not among ``ids``; ``kind`` ("user"
    or "item") names the ids in messages. Raises :class:`DataError` for a broken line, a repeated id, a column with more
    than 1000 categories, and a column that the encoding needs but that is missing or has other values.
    """
    path = Path(path)
    text = clean(path, read_bytes(path))
    first = next(fields for _, fields in records(path, text, Layout(",")) if fields)
    if len(first) < 2 or len(set(first)) < len(first):
        raise DataError(f"{path}, line 1: expected a header of different names: id, attribute, ...")
    cells = _cells(path, text, ",", names=[name.strip() for name in first], skip=1)
    return _finish(path, cells, ids, kind, encoding)


def read_encoding(path: Path) -> Encoding:
    """Read an encoding from a CSV file with columns ``attribute``, ``low`` and ``high``.

    Where both numbers of an attribute are empty, they are 0 and 1. Raises :class:`DataError` for a broken line, a
    repeated name, and a range that is not two ascending numbers.
    """
    text = clean(path, read_bytes(path))
    if text.split(b"\n", 1)[0].strip() != b"attribute,low,high":
        raise DataError(f"{path}, line 1: expected the header attribute,low,high")
    cells = _cells(path, text, ",", ["attribute", "low", "high"], skip=1)
    names = cells["attribute"].to_list()
    if None in names or len(set(names)) < len(names):
        raise DataError(f"{path}: expected a name on each line, and each name once")
    ranges = []
    for name, low, high in cells.iter_rows():
        try:
            limits = (0.0, 1.0) if low is None and high is None else (float(low), float(high))
        except (TypeError, ValueError):
            limits = (1.0, 0.0)
        if not -np.inf < limits[0] <= limits[1] < np.inf:
            raise DataError(f"{path}: attribute {name!r} has the range {low}, {high}; expected two numbers, ascending")
        ranges.append(limits)
    return Encoding(tuple(names), tuple(ranges))


def write_encoding(path: Path, encoding: Encoding) -> None:
    """Write a file that :func:`read_encoding` can read."""
    low, high = zip(*encoding.ranges, strict=True)
    pl.DataFrame({"attribute": encoding.names, "low": low, "high": high}).write_csv(path)


def read_movielens_users(
    folder: Path, ids: Ids, encoding: Encoding | None = None
) -> tuple[Attributes, tuple[str, ...]]:
    """Age group, gender and occupation of users, one-hot, from MovieLens 100K (u.user) or 1M (users.dat).

    Arguments, result and errors are those of :func:`read_attributes`.
    """
    if (folder / "u.user").is_file():
        path, separator, names = folder / "u.user", "|", ["id", "age", "gender", "occupation", "zip"]
    else:
        path, separator, names = folder / "users.dat", "::", ["id", "gender", "age", "occupation", "zip"]
    cells = _cells(path, _latin(path), separator, names)
    age = cells["age"].cast(pl.Int64, strict=False)
    if age.null_count():
        row = int(age.is_null().arg_max() or 0)
        fail(path, row + 1, f"age is {cells['age'][row]!r}; expected an integer")
    bracket = np.array(AGE_NAMES)[np.searchsorted(AGES, age.to_numpy(), side="right")]
    occupation = (
        pl.col("occupation") if separator == "|" else ("group " + pl.col("occupation")).alias("occupation")
    )  # MovieLens 1M has numbers instead of names
    cells = cells.select("id", "gender", occupation, age=pl.Series(bracket.tolist()))
    return _finish(path, cells, ids, "user", encoding)


def read_movielens_items(
    folder: Path, ids: Ids, encoding: Encoding | None = None
) -> tuple[Attributes, tuple[str, ...]]:
    """Genres of items, multi-hot, from MovieLens 100K (u.item and u.genre) or 1M (movies.dat).

    Arguments, result and errors are those of :func:`read_attributes`.
    """
    if (folder / "u.item").is_file():
        path = folder / "u.item"
        listed = _cells(folder / "u.genre", _latin(folder / "u.genre"), "|", ["genre", "number"])
        genres = [str(name) for name in listed["genre"]]
        names = ["id", "title", "released", "video", "url", *genres]
        return _finish(path, _cells(path, _latin(path), "|", names).select("id", *genres), ids, "item", encoding)
    path = folder / "movies.dat"
    cells = _cells(path, _latin(path), "::", ["id", "title", "genres"])
    listing = cells["genres"].str.split("|")
    genres = sorted(set(listing.explode().drop_nulls().to_list()))
    flags = {genre: listing.list.contains(genre).cast(pl.Int8).cast(pl.String) for genre in genres}
    return _finish(path, cells.select("id").with_columns(**flags), ids, "item", encoding)


def _latin(path: Path) -> bytes:
    """The text of a file in latin-1, the encoding of MovieLens, as UTF-8."""
    return clean(path, read_bytes(path).decode("latin-1").encode())


def _cells(path: Path, text: bytes, separator: str, names: list[str], skip: int = 0) -> pl.DataFrame:
    """A table of strings, null where a cell is empty."""
    if separator == "::":
        text, separator = text.replace(b"::", b"\x1f"), "\x1f"
    layout = Layout(separator)
    try:
        cells = pl.read_csv(
            text,
            has_header=False,
            skip_rows=skip,
            separator=separator,
            quote_char='"' if separator == "," else None,
            schema=dict.fromkeys(names, pl.String),
        )
    except pl.exceptions.PolarsError as error:
        complain_about_width(path, text, layout, len(names))
        raise DataError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    if cells[names[-1]].null_count():
        complain_about_width(path, text, layout, len(names))
    cells = cells.filter(~pl.all_horizontal(pl.all().is_null()))
    return cells.with_columns(pl.all().str.strip_chars().replace("", None))


def _finish(
    path: Path, cells: pl.DataFrame, ids: Ids, kind: str, encoding: Encoding | None
) -> tuple[Attributes, tuple[str, ...]]:
    """Encode all columns but the first, which is the id, and put the rows in the order of ``ids``."""
    own = cells.to_series(0)
    if own.null_count():
        raise DataError(f"{path}: a line has no id")
    if own.n_unique() < own.len():
        twice = own.filter(own.is_duplicated())[0]
        raise DataError(f"{path}: {kind} {twice} occurs twice; expected one line for each {kind}")
    cells = cells.drop(own.name)
    columns = _encoded(path, cells, encoding := encoding or _encoding(path, cells))
    place = encode(own, ids)
    values = np.zeros((ids.size, len(encoding.names)), dtype=np.float32)
    known = place >= 0
    if columns:
        values[place[known]] = np.stack(columns, axis=1)[known]
    remarks = []
    if missing := ids.size - int(known.sum()):
        remarks.append(f"{path.name}: {missing:,} of {ids.size:,} {kind}s have no attributes and get zeros")
    if unknown := int((~known).sum()):
        others = counted(unknown, f"{kind} is ignored that is", f"{kind}s are ignored that are")
        remarks.append(f"{path.name}: {others} not in the training data")
    return Attributes(encoding.names, values, encoding.ranges), tuple(remarks)


def _encoding(path: Path, cells: pl.DataFrame) -> Encoding:
    """The encoding that fits the values of the columns."""
    names: list[str] = []
    ranges: list[tuple[float, float]] = []
    for column in cells.iter_columns():
        numbers = column.cast(pl.Float64, strict=False)
        if numbers.null_count() > column.null_count():
            categories = column.drop_nulls().unique().sort().to_list()
            if len(categories) > MOST_CATEGORIES:
                raise DataError(
                    f"{path}: column {column.name!r} has {len(categories)} categories; expected numbers or at most "
                    f"{MOST_CATEGORIES} categories"
                )
            names += [f"{column.name}={category}" for category in categories]
            ranges += [(0.0, 1.0)] * len(categories)
            continue
        present = numbers.drop_nulls().to_numpy()
        if not np.isfinite(present).all():
            raise DataError(f"{path}: column {column.name!r} holds a number that is not finite")
        inside = not present.size or (present.min() >= 0 and present.max() <= 1)
        names.append(column.name)
        ranges.append((0.0, 1.0) if inside else (float(present.min()), float(present.max())))
    return Encoding(tuple(names), tuple(ranges))


def _encoded(path: Path, cells: pl.DataFrame, encoding: Encoding) -> list[NDArray[np.float64]]:
    """The values [rows] of each attribute of the encoding."""
    found = []
    for name, (low, high) in zip(encoding.names, encoding.ranges, strict=True):
        if name in cells.columns:
            column = cells[name]
            numbers = column.cast(pl.Float64, strict=False)
            if numbers.null_count() > column.null_count() or not numbers.drop_nulls().is_finite().all():
                raise DataError(f"{path}: column {name!r} holds values that are not finite numbers; expected numbers")
            found.append(np.clip((numbers.fill_null(0.0).to_numpy() - low) / ((high - low) or 1.0), 0.0, 1.0))
            continue
        of = next((each for each in cells.iter_columns() if name.startswith(f"{each.name}=")), None)
        if of is None:
            raise DataError(
                f"{path}: has no column for the attribute {name!r}; expected all attributes of the federation"
            )
        prefix = f"{of.name}="
        known = {each.removeprefix(prefix) for each in encoding.names if each.startswith(prefix)}
        if strange := set(of.drop_nulls()) - known:
            raise DataError(
                f"{path}: column {of.name!r} holds {min(strange)!r}; expected one of the categories of the federation, "
                f"{', '.join(sorted(known))}"
            )
        found.append((of == name.removeprefix(prefix)).fill_null(False).to_numpy().astype(np.float64))
    return found
