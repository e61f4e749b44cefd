import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import Interactions, detect, load, read, read_negatives, read_with_report, split


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


# --- lists in the order of time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["1:11 12 13\n2:16 17\n3:\n", "1: 11, 12, 13\n2: 16, 17\n3:", "1 : 11 12 13\n2 :16 17\n3 :"]
)
def test_sequences(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text)
    assert detect(path) == "sequences"
    frame, report = read_with_report(path)
    assert frame.rows() == [(1, 11, 0), (1, 12, 1), (1, 13, 2), (2, 16, 3), (2, 17, 4)]
    assert frame.columns == ["user", "item", "position"]
    assert report.lines() == [
        "read as sequences: each line is a user and its items in the order of time",
        "5 rows",
        "1 user without items is left out (3)",
    ]


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize("odd", ["{} 1 2 3", "{}:1 2:3", "hello world", "{}"])
def test_a_line_that_is_no_sequence_is_named(odd: str, at: int, tmp_path: Path) -> None:
    lines = [f"{u}:{' '.join(str(u * 3 + k) for k in range(6))}" for u in range(1, 11)]
    lines[at] = odd.format(at + 1)
    path = tmp_path / "data.txt"
    path.write_text("\n".join(lines) + "\n")
    said = (
        f"data.txt, line {at + 1}: '{lines[at]}' does not fit; expected user:item item ..., as other lines are; read as"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        read_with_report(path)
    (tmp_path / "train.txt").write_text("\n".join(f"{u}:1 2 3 4" for u in range(1, 11)))
    (tmp_path / "test.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=re.escape(said.replace("data.txt", "test.txt"))):
        load(tmp_path)  # the format was detected in the training file
    assert read_with_report(path, "sequences")[0].height > 50  # who names the format has decided


def test_a_user_with_two_lines_and_commas_in_one_are_no_odd_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(f"{u}:1 2 3" for u in range(1, 11)) + "\n3:4,5\n")
    frame = read_with_report(path)[0]
    assert frame.filter(frame["user"] == 3)["item"].to_list() == [1, 2, 3, 4, 5]


def test_a_table_with_a_time_of_day_in_front_is_no_list_of_sequences(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("hour user item\n" + "\n".join(f"{hour}:30 u{hour % 3} i{hour % 5}" for hour in range(1, 20)))
    assert detect(path) != "sequences"


def test_sequences_are_split_by_their_order(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    lists = {u: [(7 * u + 3 * i) % 11 + 100 for i in range(5)] for u in range(8)}
    path.write_text("".join(f"u{u}:{' '.join(map(str, items))}\n" for u, items in lists.items()))
    data = load(path)
    assert data.notes.how == "leave-one-out in the order of the file"
    assert dict(data.test.frame()["user", "item"].rows()) == {f"u{u}": items[-1] for u, items in lists.items()}
    assert dict(data.valid.frame()["user", "item"].rows()) == {f"u{u}": items[-2] for u, items in lists.items()}
    assert data.train.timestamps is None
    path.write_text("".join(f"{u} {' '.join(map(str, items))}\n" for u, items in lists.items()))
    assert load(path, format="sequences").test.n_interactions == 8
    assert "random order" in load(path, format="adjacency").notes.how


def test_any_file_can_be_split_by_the_order_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    rows = [(u, (7 * u + 3 * i) % 11 + 100) for i in range(5) for u in range(8)]
    path.write_text("".join(f"{u} {i}\n" for u, i in rows))
    data = load(path, order="file")
    assert dict(data.test.frame()["user", "item"].rows()) == dict(rows[-8:])
    assert "random order" in load(path).notes.how
    with pytest.raises(DataError, match="the order of the file is not known"):
        split(Interactions.from_frame(read(path)), order="file")


def test_users_without_items_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("0 3 5 7\n1 \n2 1 4\n3\n4 0 2 6 7\n")
    frame, report = read_with_report(path)
    assert frame.height == 9
    assert "2 users without items are left out (1, 3)" in report.lines()


def test_netflix(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("1:\n301,5,2005-09-06\n302,3,2005-09-07\n2:\n301,4,2005-09-08\n")
    assert detect(path) == "netflix"
    assert read(path).rows() == [(301, 1, 5.0, 1125964800), (302, 1, 3.0, 1126051200), (301, 2, 4.0, 1126137600)]
    path.write_text("1:\n301,5,2005-09-06\n302,3,2005-09-07,9\n")
    with pytest.raises(DataError, match="line 3: expected item: in a line of its own"):
        read(path)


def test_negatives_as_interactions(tmp_path: Path) -> None:
    path = tmp_path / "a.test.negative"
    path.write_text("(0,25)\t1064\t174\n(7,133)\t9\t3\n")
    frame, report = read_with_report(path)
    assert frame.rows() == [(0, 25), (7, 133)]
    assert "4 negatives are left out: only the pairs in brackets are interactions" in report.lines()


def test_lines_that_begin_with_a_count(tmp_path: Path) -> None:
    path = tmp_path / "users.dat"
    path.write_text("3 1 2 3\n2 4 5\n3 1 5 6\n1 4\n")
    with pytest.raises(DataError, match="each line begins with the number of its items; expected a user first"):
        read(path)


lists = st.lists(st.lists(st.integers(0, 10**6), max_size=6), min_size=2, max_size=9).filter(any)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=lists)
def test_written_sequences_are_read_back(tmp_path: Path, wanted: list[list[int]]) -> None:
    path = tmp_path / "data.txt"
    path.write_text("".join(f"{u}:{' '.join(map(str, items))}\n" for u, items in enumerate(wanted)))
    frame = read(path)
    assert frame.select("user", "item").rows() == [(u, item) for u, items in enumerate(wanted) for item in items]
    assert frame["position"].to_list() == list(range(frame.height))
