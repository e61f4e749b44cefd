"""Attributes of users and items: from a CSV file, or from the side files of MovieLens 100K and 1M."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Attributes
from perfedrec.data.formats import Layout, clean, complain_about_width, fail, read_bytes, records
from perfedrec.data.interactions import Ids, encode

MOST_CATEGORIES = 1000
AGES = (18, 25, 35, 45, 50, 56)  # the brackets of MovieLens 1M
AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 or over")


def read_attributes(path: str | Path, ids: Ids, kind: str = "id") -> tuple[Attributes, tuple[str, ...]]:
    """Attributes for ``ids`` [n] from a CSV file: first column id, then numbers or categories; and remarks.

    A column of numbers is one attribute, scaled to [0, 1] unless it lies there already; a column of categories becomes
    one attribute ``column=category`` for each. Empty cells and ids without a line are zeros. The remarks say how many
    ids the file does not have and how many of its ids are not among ``ids``. Raises :class:`DataError` for a broken
    line, a repeated id, or a column with more than 1000 categories.
    """
    path = Path(path)
    text = clean(path, read_bytes(path))
    first = next(fields for _, fields in records(text, Layout(",")) if fields)
    if len(first) < 2 or len(set(first)) < len(first):
        raise DataError(f"{path}, line 1: expected a header of different names: id, attribute, ...")
    cells = _cells(path, text, ",", names=[name.strip() for name in first], skip=1)
    return _finish(path, cells, ids, kind)


def read_movielens_users(folder: Path, ids: Ids) -> tuple[Attributes, tuple[str, ...]]:
    """Age bracket, gender and occupation, one-hot, of MovieLens 100K (u.user) or 1M (users.dat)."""
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
    )  # 1M numbers them
    return _finish(path, cells.select("id", "gender", occupation, age=pl.Series(bracket.tolist())), ids, "user")


def read_movielens_items(folder: Path, ids: Ids) -> tuple[Attributes, tuple[str, ...]]:
    """Genres, multi-hot, of MovieLens 100K (u.item, u.genre) or 1M (movies.dat)."""
    if (folder / "u.item").is_file():
        path = folder / "u.item"
        listed = _cells(folder / "u.genre", _latin(folder / "u.genre"), "|", ["genre", "number"])
        genres = [str(name) for name in listed["genre"]]
        names = ["id", "title", "released", "video", "url", *genres]
        return _finish(path, _cells(path, _latin(path), "|", names).select("id", *genres), ids, "item")
    path = folder / "movies.dat"
    cells = _cells(path, _latin(path), "::", ["id", "title", "genres"])
    listing = cells["genres"].str.split("|")
    genres = sorted(set(listing.explode().drop_nulls().to_list()))
    flags = {genre: listing.list.contains(genre).cast(pl.Int8).cast(pl.String) for genre in genres}
    return _finish(path, cells.select("id").with_columns(**flags), ids, "item")


def _latin(path: Path) -> bytes:
    """Text that MovieLens wrote in latin-1, as UTF-8."""
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


def _finish(path: Path, cells: pl.DataFrame, ids: Ids, kind: str) -> tuple[Attributes, tuple[str, ...]]:
    """Encode the columns after the first, and put the rows in the order of ``ids``."""
    own = cells.to_series(0)
    if own.null_count():
        raise DataError(f"{path}: a line has no id")
    if own.n_unique() < own.len():
        raise DataError(f"{path}: {kind} {own.filter(own.is_duplicated())[0]} occurs twice; expected one line for each")
    names: list[str] = []
    columns: list[np.ndarray] = []
    for column in cells.iter_columns():
        if column.name == own.name:
            continue
        numbers = column.cast(pl.Float64, strict=False)
        if numbers.null_count() > column.null_count():
            categories = column.drop_nulls().unique().sort().to_list()
            if len(categories) > MOST_CATEGORIES:
                raise DataError(
                    f"{path}: column {column.name!r} has {len(categories)} categories; expected numbers or at most "
                    f"{MOST_CATEGORIES} categories"
                )
            names += [f"{column.name}={category}" for category in categories]
            columns += [(column == category).fill_null(False).to_numpy() for category in categories]
            continue
        if not numbers.drop_nulls().is_finite().all():
            raise DataError(f"{path}: column {column.name!r} holds a number that is not finite")
        names.append(column.name)
        columns.append(_scaled(numbers.fill_null(0.0).to_numpy(), numbers.drop_nulls().to_numpy()))
    place = encode(own, ids)
    values = np.zeros((ids.size, len(names)), dtype=np.float32)
    known = place >= 0
    if columns:
        values[place[known]] = np.stack(columns, axis=1)[known]
    remarks = []
    if missing := ids.size - int(known.sum()):
        remarks.append(f"{path.name}: {missing:,} of {ids.size:,} {kind}s have no attributes and get zeros")
    if unknown := int((~known).sum()):
        remarks.append(f"{path.name}: {unknown:,} {kind}s are not in the training data and are ignored")
    return Attributes(tuple(names), values), tuple(remarks)


def _scaled(values: NDArray[np.float64], present: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` moved to [0, 1] by the range of those present, unless they lie there."""
    if not present.size or (present.min() >= 0 and present.max() <= 1):
        return values
    low, high = float(present.min()), float(present.max())
    return np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0)
