"""Reading the catalogue, by which all parties number the items in the same way."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Catalogue, read_catalogue


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b\na\nc\n", ["b", "a", "c"]),
        ("item\nb\na\n", ["b", "a"]),
        ("item_id\r\n3\r\n1\r\n", [3, 1]),
        ("007\n7\n", ["007", "7"]),
        ('"two words"\nx', ["two words", "x"]),
    ],
)
def test_ids_are_read_line_by_line_in_the_order_of_the_file(text: str, expected: list[object], tmp_path: Path) -> None:
    file = tmp_path / "items.txt"
    file.write_bytes(text.encode())
    assert read_catalogue(file).item_ids.tolist() == expected


def test_ids_with_quotes_are_read_back(tmp_path: Path) -> None:
    ids = ['Screen 24"', '"big" deal', '"enclosed"', 'a "b" c', '""', "plain"]
    Catalogue(np.array(ids, dtype=object)).write(tmp_path / "items.txt")
    assert read_catalogue(tmp_path / "items.txt").item_ids.tolist() == ids


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pl.DataFrame({"title": ["x", "y"], "item_id": [4, 2]}).write_parquet(file)
    assert read_catalogue(file).item_ids.tolist() == [4, 2]
    pl.DataFrame({"title": ["x", "y"]}).write_parquet(file)
    with pytest.raises(DataError, match="expected one column of items; the columns are title"):
        read_catalogue(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item\na\nb\na\n", "line 4: item 'a' occurs a second time"),
        ("a\n\nb\n", "line 2: item is missing"),
        ("", "empty"),
        ("user,item,time\na,b,1\n", "has 3 columns, user, item, time; expected one item id on each line"),
    ],
)
def test_an_error_names_the_line_and_the_problem(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "items.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_catalogue(file)
