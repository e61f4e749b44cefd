"""The list of all items of a federation, in the order that every party numbers them by."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.formats import HEADER_NAMES, clean, fail, parse_ids, read_bytes
from perfedrec.data.interactions import Ids


def read_catalogue(path: str | Path) -> Ids:
    """Item ids [m], int64 if all are plain integers, else objects of str, in the order of the file.

    The file has one id a line, after a header ``item`` if it likes, or is a parquet file with a column of that name.
    Raises :class:`DataError` with the line for an id that is missing or repeated.
    """
    path = Path(path)
    data = read_bytes(path)
    if data[:4] == b"PAR1":
        try:
            table = pl.read_parquet(io.BytesIO(data))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
        named = [name for name in table.columns if _names_items(name)]
        if len(named) != 1:
            raise DataError(f"{path}: expected one column of items; the columns are {', '.join(table.columns)}")
        values, first = table[named[0]], 1
    else:
        lines = [line.strip().strip('"') for line in clean(path, data).decode().split("\n")]
        first = 2 if _names_items(lines[0]) else 1
        values = pl.Series(lines[first - 1 :], dtype=pl.String)
    ids, bad = parse_ids(values)
    if bad is not None:
        fail(path, bad[0] + first, f"item {bad[1]}")
    if ids.n_unique() < ids.len():
        place = int((~ids.is_first_distinct()).arg_max() or 0)
        fail(path, place + first, f"item {ids[place]!r} occurs a second time; expected each item once")
    return ids.to_numpy() if ids.dtype.is_integer() else np.array(ids.to_list(), dtype=object)


def _names_items(name: str) -> bool:
    return name.lower().replace("_", "") in HEADER_NAMES["item"] - {"i"}
