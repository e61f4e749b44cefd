"""Interactions that are in memory: data frames, columns, sparse matrices and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from scipy import sparse

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset
from perfedrec.data.formats import roles_of
from perfedrec.data.interactions import Interactions
from perfedrec.data.readreport import ReadReport
from perfedrec.data.roles import Columns
from perfedrec.data.values import POSITION, ROLES

Table: TypeAlias = Any
"""Interactions in memory: a data frame of polars or pandas, a mapping of columns by name, a sparse matrix of scipy, an
array, or any object that offers its columns as an Arrow stream."""

IN_MEMORY = "data in memory"
"""The name of a data set that was not read from a file."""

DataLike: TypeAlias = str | Path | Dataset | Interactions | Table
"""What :func:`perfedrec.load` takes: the name of data, or data in memory."""


def rows_of(data: Table, columns: Columns | None = None) -> pl.DataFrame:
    """The rows of ``data`` as :func:`perfedrec.data.formats.read` returns them: columns user, item and, where there are
    any, rating and timestamp.

    Columns are found by their names, as in a file with a header, or are named in ``columns``. The rows and columns of a
    sparse matrix [users, items] are ids, and its entries other than 0 are ratings. An array [rows, 2 to 4] has the
    columns user, item, rating and timestamp. Raises :class:`DataError` for anything else.
    """
    return rows_with_report(data, columns)[0]


def rows_with_report(
    data: Table, columns: Columns | None = None, min_rating: float | None = None
) -> tuple[pl.DataFrame, ReadReport]:
    """Like :func:`rows_of`; also tells how the rows were read.

    ``min_rating`` is that of :func:`perfedrec.data.formats.read`.
    """
    if isinstance(data, Interactions):
        data = data.frame()
        if POSITION in data.columns:
            columns = {POSITION: POSITION, **(columns or {})}
    if sparse.issparse(data):
        matrix = sparse.coo_array(data)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        users, items = (index.astype(np.int64) for index in matrix.coords)
        table = pl.DataFrame({"user": users, "item": items, "rating": matrix.data})
        return _by_role("matrix", table, None, min_rating)
    if isinstance(data, np.ndarray) and data.dtype.names is None:
        if data.ndim != 2 or not 2 <= data.shape[1] <= len(ROLES):
            raise DataError(
                f"the array has the shape {list(data.shape)}; expected a row for each interaction: user, item and, if "
                "known, rating and timestamp (a matrix of users and items is given as scipy.sparse.csr_array(matrix))"
            )
        named = {role: _column(role, data[:, place]) for place, role in enumerate(ROLES[: data.shape[1]])}
        return _by_role("array", pl.DataFrame(named), columns, min_rating)
    return _by_role("data frame", columns_of(data), columns, min_rating)


def _by_role(
    where: str, table: pl.DataFrame, columns: Columns | None, min_rating: float | None
) -> tuple[pl.DataFrame, ReadReport]:
    """:func:`roles_of`, with the argument of Python beside the option of the command line that it names."""
    try:
        return roles_of(where, table, columns, min_rating)
    except DataError as error:
        if "--columns" not in str(error):
            raise
        raise DataError(f"{error} (in Python: columns={{'user': NAME, 'item': NAME}})") from None


def columns_of(data: Table) -> pl.DataFrame:
    """All columns of a data frame or of a mapping, as a frame of polars."""
    if isinstance(data, pl.LazyFrame):
        data = data.collect()
    if isinstance(data, pl.DataFrame):
        return data
    is_pandas = type(data).__module__.partition(".")[0] == "pandas"
    if is_pandas and hasattr(data, "columns"):  # column by column: polars would need pyarrow for it
        return _joined({str(name): _column(str(name), data[name]) for name in data.columns})
    if isinstance(data, Mapping):
        return _joined({str(name): _column(str(name), values) for name, values in data.items()})
    if hasattr(data, "__arrow_c_stream__") or isinstance(data, np.ndarray):
        return pl.DataFrame(data)
    raise DataError(
        f"data of type {type(data).__name__} cannot be read; expected a path, a data frame, a mapping with the columns "
        "user and item, a sparse matrix or a data set"
    )


def _joined(columns: Mapping[str, pl.Series]) -> pl.DataFrame:
    if len({len(each) for each in columns.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(each)}" for name, each in columns.items())
        raise DataError(f"the columns have different lengths: {lengths}; expected one value for each interaction")
    return pl.DataFrame(dict(columns))


def _column(name: str, values: Any) -> pl.Series:
    """A column of pandas, of numpy or of a list, with nothing where a value is missing."""
    missing = values.isna().tolist() if hasattr(values, "isna") else None
    array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    if array.dtype.kind in "iubfM":
        return pl.Series(name, array)
    found = array.tolist()
    if missing is not None:
        found = [None if gap else value for gap, value in zip(missing, found, strict=True)]
    try:
        return pl.Series(name, found)
    except (TypeError, pl.exceptions.PolarsError):
        raise DataError(f"the column {name!r} has values of several types; expected one type in a column") from None
