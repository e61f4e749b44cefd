from pathlib import Path

import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import read, read_with_report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "windows-1252", "latin-1"]
)
def test_encodings(path: Path, encoding: str) -> None:
    path.write_bytes("user,item\r\n1,käse\r\n2,brot\r\n".encode(encoding))
    frame, report = read_with_report(path)
    assert frame.rows() == [(1, "käse"), (2, "brot")]
    told = "the text is not UTF-8: read as windows-1252" in report.lines()
    assert told == (encoding in ("windows-1252", "latin-1"))


def test_damaged_utf_8_is_not_another_encoding(path: Path) -> None:
    path.write_bytes("user,item\n1,käse\n".encode() + b"2,k\xe4se\n")
    with pytest.raises(DataError, match=r"data.csv, line 3: is not UTF-8 text, though other lines are"):
        read(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(path: Path, end: str) -> None:
    path.write_bytes(end.join(["user,item", "1,2", "", "1,3", ""]).encode())
    frame, report = read_with_report(path)
    assert frame.rows() == [(1, 2), (1, 3)]
    assert report.blank == 1
    assert "2 rows, 1 blank line" in report.lines()


def test_mixed_line_ends(path: Path) -> None:
    path.write_bytes(b"user,item\n1,2\r1,3\n")
    with pytest.raises(DataError, match="line 2: holds a carriage return inside the line; expected one kind"):
        read(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    (path.parent / "ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match=r"rating.csv: no such file; did you mean ratings.csv\?"):
        read(path.parent / "rating.csv")
    for far in ("u1", "nope.csv"):  # files of one kind are not alike for that
        with pytest.raises(DataError, match=r"no such file; expected the path of an existing file \(in .*: ratings"):
            read(path.parent / far)
    with pytest.raises(DataError, match=r"did you mean ratings.csv\?"):
        read(path.parent / "ratings.txt")
    with pytest.raises(DataError, match=r"no such file; the folder .*nowhere does not exist"):
        read(path.parent / "nowhere" / "x.csv")
    with pytest.raises(DataError, match=r"is a folder; expected a file, such as one of ratings.csv"):
        read(path.parent)
