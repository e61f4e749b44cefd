"""Interactions in memory give the data set that the same rows in a file give."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from perfedrec import DataError, Interactions, load
from perfedrec.data import rows_of

USERS = ["ann", "ann", "ann", "bob", "bob", "bob", "cy"]
ITEMS = [3, 1, 2, 2, 3, 1, 3]
RATINGS = [5.0, 4.0, 1.0, 2.0, 5.0, 3.0, 4.0]
TIMES = [10, 20, 30, 30, 20, 10, 5]
ROWS = pl.DataFrame({"user": USERS, "item": ITEMS, "rating": RATINGS, "timestamp": TIMES})


def in_a_file(folder: Path, **options: Any) -> str:
    ROWS.write_csv(folder / "ratings.csv")
    return load(folder / "ratings.csv", **options).fingerprint


@pytest.mark.parametrize("options", [{}, {"min_rating": 2}, {"split_how": "ratio"}, {"order": "random", "seed": 3}])
def test_a_frame_is_prepared_and_split_like_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    assert load(ROWS, **options).fingerprint == in_a_file(tmp_path, **options)
    assert load(ROWS.lazy(), **options).fingerprint == in_a_file(tmp_path, **options)


@pytest.mark.parametrize(
    "data",
    [
        {"user": USERS, "item": ITEMS, "rating": RATINGS, "timestamp": TIMES},
        {"userId": np.array(USERS), "movie": np.array(ITEMS), "stars": np.array(RATINGS), "ts": np.array(TIMES)},
        ROWS.with_columns(pl.col("user").cast(pl.Categorical)),
        ROWS.with_columns(pl.from_epoch("timestamp")),
        ROWS.with_columns(pl.col("item").cast(pl.Float64), pl.col("timestamp").cast(pl.Float32)),
        ROWS.select("timestamp", "item", pl.lit("x").alias("comment"), "rating", "user"),
        {**ROWS.to_dict(as_series=False), "timestamp": [datetime.fromtimestamp(each, UTC) for each in TIMES]},
        ROWS.to_struct().to_frame().unnest(""),
    ],
    ids=["lists", "arrays", "categories", "dates", "floats", "more columns", "datetimes", "unnested"],
)
def test_columns_are_found_by_name_whatever_their_type(data: Any, tmp_path: Path) -> None:
    assert load(data).fingerprint == in_a_file(tmp_path)


def test_columns_can_be_named(tmp_path: Path) -> None:
    renamed = ROWS.rename({"user": "a", "item": "b", "rating": "c", "timestamp": "d"})
    named: dict[str, str | int] = {"user": "a", "item": "b", "rating": 3, "timestamp": "d"}
    assert load(renamed, columns=named, min_rating=2).fingerprint == in_a_file(tmp_path, min_rating=2)


def test_interactions_and_data_sets_are_data(tmp_path: Path) -> None:
    interactions = Interactions.from_frame(ROWS)
    assert load(interactions).fingerprint == in_a_file(tmp_path)
    dataset = load(ROWS)
    assert load(dataset) is dataset


@pytest.mark.parametrize("valid", [True, False])
def test_a_split_in_memory_is_that_of_the_same_files(valid: bool, tmp_path: Path) -> None:
    parts = {"train": ROWS[:1].vstack(ROWS[2:6]), "test": ROWS[6:].with_columns(user=pl.lit("ann"))}
    if valid:
        parts["valid"] = ROWS[1:2]
    for name, frame in parts.items():
        frame.write_csv(tmp_path / f"{name}.csv")
    paths = {name: str(tmp_path / f"{name}.csv") for name in parts}
    options: dict[str, Any] = {"min_rating": 2}
    assert load(**parts, **options).fingerprint == load(**paths, **options).fingerprint
    mixed = {**paths, "train": Interactions.from_frame(parts["train"])}
    assert load(**mixed).fingerprint == load(**paths).fingerprint
    assert load(**parts).origin is None
    with pytest.raises(DataError, match="data in memory: users and items of a split that is given are not removed"):
        load(**parts, k_core=2)


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array, sparse.lil_matrix])
def test_the_entries_of_a_sparse_matrix_are_ratings_by_row_and_column(kind: Any) -> None:
    dense = np.array([[0, 5, 0, 1], [2, 0, 0, 0], [0, 0, 0, 4]])
    rows = rows_of(kind(dense)).sort("user", "item").rows()
    assert rows == [(0, 1, 5.0), (0, 3, 1.0), (1, 0, 2.0), (2, 3, 4.0)]


def test_a_stored_zero_is_no_interaction_and_repeated_entries_add_up() -> None:
    matrix = sparse.coo_array((np.array([1, 1, 0]), (np.array([0, 0, 1]), np.array([1, 1, 0]))), shape=(2, 2))
    assert rows_of(matrix).rows() == [(0, 1, 2.0)]


def test_an_array_has_a_row_for_each_interaction() -> None:
    pairs = np.array([[7, 1], [7, 2], [9, 1]])
    assert rows_of(pairs).rows() == [(7, 1), (7, 2), (9, 1)]
    whole = np.array([[7, 1, 4, 100], [9, 2, 3.5, 200]])
    assert rows_of(whole).rows() == [(7, 1, 4.0, 100), (9, 2, 3.5, 200)]
    named = np.array([(7, 1)], dtype=[("uid", "i8"), ("iid", "i8")])
    assert rows_of(named).rows() == [(7, 1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            np.ones((4, 9)),
            r"the array has the shape \[4, 9\]; expected a row for each interaction: user, item .*csr_arr",
        ),
        (["a", "b"], "data of type list cannot be read; expected a path, a data frame"),
        (42, "data of type int cannot be read"),
        ({"user": ["a"], "item": [1, 2]}, "different lengths: user has 1, item has 2; expected one value"),
        (
            {"user": np.array(["a", 5], dtype=object), "item": [1, 2]},
            "the column 'user' has values of several types; expected one type",
        ),
        (
            pl.DataFrame({"buyer": [1], "item": [2]}),
            r"no user column; .*\(in Python: columns=\{'user': NAME",
        ),
        (pl.DataFrame({"user": [1, None], "item": [2, 3]}), "data frame, row 2: user is missing; expected an id"),
        (pl.DataFrame({"user": [1], "item": [2], "rating": [float("nan")]}), "data frame, row 1: rating is nan"),
    ],
)
def test_what_cannot_be_read_is_an_error_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_a_frame_of_pandas_needs_no_pyarrow(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"user": USERS, "item": ITEMS, "rating": RATINGS, "timestamp": TIMES})
    expected = in_a_file(tmp_path)
    assert load(frame).fingerprint == expected
    assert load(frame.astype({"user": "category", "item": "Int64", "rating": "Float32"})).fingerprint == expected
    assert load(frame.assign(timestamp=pandas.to_datetime(frame["timestamp"], unit="s"))).fingerprint == expected
    aware = pandas.to_datetime(frame["timestamp"], unit="s", utc=True).dt.tz_convert("Asia/Tokyo")
    assert load(frame.assign(timestamp=aware)).fingerprint == expected
    assert load(frame.set_index("user").reset_index()).fingerprint == expected
    with pytest.raises(DataError, match="data frame, row 3: user is missing; expected an id"):
        load(frame.assign(user=["ann", "ann", None, "bob", "bob", "bob", "cy"]))
    with pytest.raises(DataError, match="data frame, row 3: item is nan; expected an id"):
        load(frame.astype({"item": "Int64"}).assign(item=lambda it: it["item"].where(it.index != 2)))
