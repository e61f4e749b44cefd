from pathlib import Path

import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import read_negatives


def test_negatives(tmp_path: Path) -> None:
    path = tmp_path / "a.test.negative"
    path.write_text("(0,25)\t1064\t174\n\n(7, 133)\t9\n(8,4)\n")
    expected = [(0, 25, [1064, 174]), (7, 133, [9]), (8, 4, [])]
    assert read_negatives(path).rows() == expected
    path.write_text("(ann,x1)\tx2\tx3\n(bob,x2)\t17\n")
    frame = read_negatives(path)
    assert frame.rows() == [("ann", "x1", ["x2", "x3"]), ("bob", "x2", ["17"])]
    assert frame["negatives"].dtype == pl.List(pl.String)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(0,25)\t1\n0,26\t2\n", r"a, line 2: expected \(user,item\) and then items"),
        ("(0,25)\t1\n\n(0,-1)\t2\n", r"a, line 3: item is -1; expected an id that is not negative"),
        ("(0,25)\t1\n(1,2)\t3\t-4\n", r"a, line 2: item is -4; expected an id that is not negative"),
        ("(nan,25)\t1\n", r"a, line 1: user is 'nan'; expected an id"),
    ],
)
def test_broken_negatives(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a").write_text(text)
    with pytest.raises(DataError, match=message):
        read_negatives(tmp_path / "a")
