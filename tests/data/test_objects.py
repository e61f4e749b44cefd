import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import detect, read, read_with_report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


def test_json_lines(path: Path) -> None:
    rows = [
        {"review_id": "r1", "user_id": "a1", "business_id": "b1", "stars": 4.0, "date": "2018-07-07 22:09:11"},
        {"text": 'a "b",\nc', "user_id": "a2", "business_id": "b1", "stars": 1, "date": "2018-07-08 22:09:11"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert detect(path) == "json"
    frame, report = read_with_report(path)
    assert frame.rows() == [("a1", "b1", 4.0, 1531001351), ("a2", "b1", 1.0, 1531087751)]
    assert report.lines()[0].startswith('read as json: user = "user_id", item = "business_id", rating = "stars", time')
    assert report.blank == 1
    assert read(path, columns={"user": "business_id", "item": "user_id"}).row(0)[:2] == ("b1", "a1")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(path: Path, indent: int | None) -> None:
    path.write_text(json.dumps([{"user": 1, "item": 2}, {"user": 3, "item": 4, "more": [1]}], indent=indent))
    assert detect(path) == "json"
    assert read(path).rows() == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"user": 1, "item": 2}\n{"user": 1\n', r"line 2: is not JSON \(.*\); expected one object on each line"),
        ('{"user": 1, "item": 2}\n[1, 2]\n', r"line 2: is not a JSON object"),
        ('{"user": 1, "item": 2}\n\n{"user": 1}\n', r"line 3: item is missing; expected an id"),
        ('{"user": {"id": 1}, "item": 2}\n', r"line 1: user is nested: .*; expected a text or a number"),
        ('{"who": 1, "what": 2}\n', r"no user and no item column; the columns are who, what"),
        ('{"asin": "a", "parent_asin": "b", "user_id": 1}\n', r"columns asin and parent_asin could both be the item"),
        ("{'user': 1, 'item': 2}\n", r"line 1: is a Python dictionary, not JSON"),
        ('{\n "user": 1\n}\n', r"line 1: is part of an object of several lines"),
        ('[{"user": 1, "item": 2}, {"user": 3]', r"cannot be read as JSON"),
    ],
)
def test_json_that_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


letters = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=5)
rows = st.lists(st.tuples(letters.map("u".__add__), st.integers(0, 10**12)), min_size=1)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=rows)
def test_written_json_is_read_back(path: Path, wanted: list[tuple[str, int]]) -> None:
    path.write_text("".join(json.dumps({"user": user, "item": item}) + "\n" for user, item in wanted))
    columns = {"user": "user", "item": "item"}  # ids that look like dates or missing values are ids
    assert read(path, columns=columns).rows() == wanted
