"""Titles, pictures and attributes of items: every form of table, and a line for every mistake."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data.details import PICTURE_BYTES, Details, read_details

PNG = b"\x89PNG\r\n\x1a\n and more"
DATA = os.environ.get("PERFEDREC_TEST_DATA", "")


def written(folder: Path, content: str, name: str = "items.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(content, encoding=encoding)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_with_a_header(separator: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "tea.png").write_bytes(PNG)
    rows = [
        ["price", "item", "Title", "picture", "Genres"],
        ["3", "i1", " Green tea ", "pictures/tea.png", "drink|hot"],
        ["", "i2", "", "", "(no genres listed)"],
    ]
    path = written(tmp_path, "\n".join(separator.join(row) for row in rows) + "\n\n")
    first, second = read_details(path)
    assert first == Details("i1", "Green tea", ("image/png", PNG), {"price": "3", "Genres": "drink, hot"})
    assert second == Details("i2")


def test_quotes_and_the_names_of_movielens(tmp_path: Path) -> None:
    path = written(
        tmp_path, 'movieId,title,genres\n11,"American President, The (1995)",Comedy|Drama\n7,Sabrina,Drama\n'
    )
    assert [(each.item, each.title, dict(each.attributes)) for each in read_details(path)] == [
        ("11", "American President, The (1995)", {"genres": "Comedy, Drama"}),
        ("7", "Sabrina", {"genres": "Drama"}),
    ]
    path = written(tmp_path, "1::Toy Story (1995)::Animation|Comedy\n2::Été::Drama\n", "movies.dat", "latin-1")
    assert [(each.title, each.attributes["genres"]) for each in read_details(path)] == [
        ("Toy Story (1995)", "Animation, Comedy"),
        ("Été", "Drama"),
    ]


def test_a_parquet_table(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    table = {"id": [1, 2], "name": ["a", None], "year": [1999, None], "tags": [["x", "y"], []], "cost": [1.5, 2.0]}
    pl.DataFrame(table).write_parquet(path)
    assert read_details(path) == [
        Details("1", "a", None, {"year": "1999", "tags": "x, y", "cost": "1.5"}),
        Details("2", None, None, {"cost": "2.0"}),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("item,title\n1,a\n1,b\n", "line 3: item '1' occurs a second time"),
        ("item,title\n,a\n", "line 2: item is missing"),
        ("item,title\n1\n", "line 2: has 1 column; expected 2 as in the first line"),
        ("item,title,title\n1,a,b\n", "line 1: expected a header of different names"),
        ("colour,title\nred,a\n", "expected one column item; the columns are colour, title"),
        ("item,title\n", "has no items"),
        ("item,picture\n1,gone.png\n", "line 2: picture gone.png cannot be read"),
        ("item,picture\n1,../outside.png\n", "is not in the folder of the table"),
        ("item,picture\n1,text.png\n", "is none of PNG, JPEG, GIF and WebP"),
        ("item,picture\n1,large.png\n", "has more than 512 kB"),
    ],
)
def test_a_mistake_is_named_with_its_line(content: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(PNG)
    (folder / "text.png").write_bytes(b"<svg></svg>")
    (folder / "large.png").write_bytes(PNG + bytes(PICTURE_BYTES))
    with pytest.raises(DataError, match=said):
        read_details(written(folder, content))


@pytest.mark.real_data
@pytest.mark.skipif(not DATA, reason="PERFEDREC_TEST_DATA names no folder")
def test_movielens_100k() -> None:
    found = {each.item: each for each in read_details(Path(DATA) / "ml-100k" / "u.item")}
    assert len(found) == 1682
    assert found["50"].title == "Star Wars (1977)"
    assert found["50"].attributes == {"released": "01-Jan-1977", "genres": "Action, Adventure, Romance, Sci-Fi, War"}
    assert found["543"].title == "Misérables, Les (1995)"
