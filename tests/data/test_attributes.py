from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Attributes, read_attributes
from perfedrec.data.attributes import read_encoding, read_movielens_items, read_movielens_users, write_encoding

IDS = np.array([3, 1, 7])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_numbers_are_scaled_and_categories_one_hot(tmp_path: Path) -> None:
    path = write(tmp_path / "user_attributes.csv", "id,age,job,share\n1,20,cook,0.5\n9,60,baker,1\n3,30,,0.25\n")
    attributes, remarks = read_attributes(path, IDS, "user")
    assert attributes.names == ("age", "job=baker", "job=cook", "share")
    assert attributes.values.tolist() == [[0.25, 0, 0, 0.25], [0, 0, 1, 0.5], [0, 0, 0, 0]]
    assert attributes.values.dtype == np.float32
    assert remarks == (
        "user_attributes.csv: 1 of 3 users have no attributes and get zeros",
        "user_attributes.csv: 1 user is ignored that is not in the training data",
    )


def test_an_encoding_is_kept_and_applied_to_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,age,job,share\n1,20,cook,0.5\n9,60,baker,1\n3,30,,0.25\n")
    encoding = read_attributes(path, IDS)[0].encoding
    assert encoding.ranges == ((20.0, 60.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
    write_encoding(tmp_path / "encoding.csv", encoding)
    assert read_encoding(tmp_path / "encoding.csv") == encoding
    other = write(tmp_path / "b.csv", "id,share,job,age\n7,0.1,cook,25\n")
    found = read_attributes(other, np.array([7]), encoding=encoding)[0]
    assert (found.names, found.encoding) == (encoding.names, encoding)
    assert np.allclose(found.values, [[0.125, 0, 1, 0.1]])
    written = write(tmp_path / "by hand.csv", "attribute,low,high\nage,18,99.5\njob=cook,,\n")
    assert read_encoding(written).ranges == ((18.0, 99.5), (0.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,low,high\nage,0,1\n", "line 1: expected the header attribute,low,high"),
        ("attribute,low,high\nage,0,1\nage,0,2\n", "each name once"),
        ("attribute,low,high\nage,2,1\n", "'age' has the range 2, 1; expected two numbers, ascending"),
        ("attribute,low,high\nage,,1\n", "'age' has the range None, 1"),
        ("attribute,low,high\nage,0,nan\n", "'age' has the range 0, nan"),
    ],
)
def test_a_broken_encoding_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_encoding(write(tmp_path / "encoding.csv", text))


def test_names_as_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,x\nbob,1\nann,0\n")
    attributes, remarks = read_attributes(path, np.array(["ann", "bob"], dtype=object))
    assert attributes.values.tolist() == [[0], [1]]
    assert remarks == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,x\n1,2\n1,3\n", "a.csv: id 1 occurs twice"),
        ("id,x\n1,2\n,3\n", "a.csv: a line has no id"),
        ("id,x\n1,2\n2,3,4\n", "a.csv, line 3: has 3 columns; expected 2"),
        ("id,x,y\n1,2,3\n2,3\n", "a.csv, line 3: has 2 columns; expected 3"),
        ("id,x\n1,2\n2,inf\n", "a.csv: column 'x' holds a number that is not finite"),
        ("id,x,x\n1,2,3\n", "a.csv, line 1: expected a header of different names"),
        ("id\n1\n", "a.csv, line 1: expected a header of different names"),
        ("id,x\n" + "".join(f"{i},w{i}\n" for i in range(1001)), "column 'x' has 1001 categories; expected numbers"),
        ("", "a.csv: is empty"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_attributes(write(tmp_path / "a.csv", text), IDS)


def test_attributes_must_fit_their_names() -> None:
    with pytest.raises(DataError, match=r"must be \[rows, 2\], got \(3, 1\)"):
        Attributes(("a", "b"), np.zeros((3, 1), dtype=np.float32))
    with pytest.raises(DataError, match="finite"):
        Attributes(("a",), np.array([[np.nan]], dtype=np.float32))
    with pytest.raises(ValueError, match="read-only"):
        Attributes(("a",), np.zeros((1, 1), dtype=np.float32)).values[0, 0] = 1


def test_movielens_1m(tmp_path: Path) -> None:
    write(tmp_path / "users.dat", "1::F::1::10::48067\n3::M::56::16::70072\n7::M::25::15::55117\n")
    (tmp_path / "movies.dat").write_bytes("3::Café (1995)::Comedy|Drama\n7::Jumanji (1995)::Drama\n".encode("latin-1"))
    users, remarks = read_movielens_users(tmp_path, IDS)
    assert users.names == (
        *("gender=F", "gender=M"),
        *("occupation=group 10", "occupation=group 15", "occupation=group 16"),
        *("age=25-34", "age=56 or over", "age=under 18"),
    )
    assert users.values.tolist() == [[0, 1, 0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0, 0]]
    assert remarks == ()
    items, remarks = read_movielens_items(tmp_path, IDS)
    assert items.names == ("Comedy", "Drama")
    assert items.values.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert remarks == ("movies.dat: 1 of 3 items have no attributes and get zeros",)
    write(tmp_path / "users.dat", "1::F::1::10::48067\n3::M::old::16::70072\n")
    with pytest.raises(DataError, match=r"users.dat, line 2: age is 'old'; expected an integer"):
        read_movielens_users(tmp_path, IDS)


@pytest.mark.real_data
def test_movielens_100k(real_data: Callable[[str], Path]) -> None:
    folder = real_data("ml-100k")
    users, _ = read_movielens_users(folder, np.array([2, 1]))
    named = [{name for name, value in zip(users.names, row, strict=True) if value} for row in users.values]
    assert named == [{"age=50-55", "gender=F", "occupation=other"}, {"age=18-24", "gender=M", "occupation=technician"}]
    everyone, _ = read_movielens_users(folder, np.arange(1, 944))
    assert everyone.values.sum(1).tolist() == [3.0] * 943
    assert len(everyone.names) == 21 + 2 + 7  # occupations, genders, ages
    items, remarks = read_movielens_items(folder, np.array([1, 50]))
    named = [{name for name, value in zip(items.names, row, strict=True) if value} for row in items.values]
    assert named == [
        {"Animation", "Children's", "Comedy"},
        {"Action", "Adventure", "Romance", "Sci-Fi", "War"},
    ]
    assert len(items.names) == 19
    assert remarks == ("u.item: 1,680 items are ignored that are not in the training data",)
