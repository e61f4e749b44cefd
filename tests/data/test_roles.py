from pathlib import Path

import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import read, read_with_report
from perfedrec.data.roles import is_header, plain_name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("user,item\n1,2\n", True),
        ("username,artist_name\nann,abba\n", True),
        ("reviewerName,book_title\nann,abba\n", True),
        ("customer_name,thing_id\nann,abba\n", True),
        ("buyer,thing,stars\nann,abba,3\n", True),
        ("who,what\n1,2\n3,4\n", True),
        (",Cust_Id,Rating,Movie_Id\n0,1488844,3.0,1\n", True),
        ("0,1,2\nu1,i1,5\nu2,i2,3\n", True),
        ("u1,00000001X,5\nu2,000000022,3\n", False),
        ("u1,i1\nu2,i2\n", False),
        ("ann,book\nann,lamp\nbob,book\n", False),
        ("ann,book,5\nann,lamp,3\n", False),
        ("0,1,2\n0,3,4\n", False),
        ("1,2,nan\n1,3,4\n", False),
        ("u1,x,5\nu2,1,3\n", False),
    ],
)
def test_whether_the_first_line_is_a_header(text: str, header: bool) -> None:
    assert is_header([line.split(",") for line in text.split()]) == header


def test_an_option_says_whether_there_is_a_header(path: Path) -> None:
    path.write_text("ann,abba\nbob,queen\n")
    assert read(path).rows() == [("ann", "abba"), ("bob", "queen")]
    assert "header: no" in read_with_report(path)[1].lines()[0]
    assert read(path, columns={"user": 2, "item": 1}, header=True).rows() == [("queen", "bob")]
    path.write_text("user,item\nx,y\n")
    assert read(path, header=False).rows() == [("user", "item"), ("x", "y")]
    path.write_text("ann,abba\nbob,queen\n")
    with pytest.raises(DataError, match=r"no user and no item column; the columns are ann, abba; .*or --no-header"):
        read(path, header=True)


def test_names_of_columns_that_are_numbers(path: Path) -> None:
    """A text that is both a name and a position is a name."""
    path.write_text("0,1,2\n7,8,5\n9,8,4\n")
    assert read(path, columns={"user": 0, "item": 1}).rows() == [(7, 8), (9, 8)]
    assert read(path, columns={"user": 1, "item": 2}, header=True).rows() == [(8, 5), (8, 4)]
    assert read(path, columns={"user": 1, "item": 2}, header=False).rows() == [(0, 1), (7, 8), (9, 8)]
    path.write_text("5,6\n7,8\n")
    with pytest.raises(DataError, match="no column 0 for the user; the columns are 1, 2; there is no header"):
        read(path, columns={"user": 0, "item": 1})


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("reviewerID,asin,overall,unixReviewTime", "user item rating timestamp"),
        ("timestamp,visitorid,event,itemid", "user item timestamp"),
        ("userID,artistID,weight", "user item rating"),
        ("user_id,username,product_id,product_name", "user item"),
        ("user_id,business_id,stars,date", "user item rating timestamp"),
        ("user_id,anime_id,my_rating", "user item rating"),
        ("user_id,video_id,time,date,timestamp,watch_ratio", "user item rating timestamp"),
        ("user_name,song,play_count", "user item rating"),
        ("User-ID,ISBN,Book-Rating", "user item rating"),
    ],
)
def test_known_names(path: Path, header: str, columns: str) -> None:
    values = [str(1_500_000_000 + i) if "time" in name.lower() or name == "date" else "3" for i, name in enumerate(header.split(","))]  # fmt: skip # noqa: E501
    path.write_text(f"{header}\n{','.join(values)}\n{','.join(values)}\n")
    assert read(path).columns == columns.split()


def test_ids_are_preferred_to_names_and_the_report_names_the_columns(path: Path) -> None:
    path.write_text("username,user_id,song,stars\nann,7,abba,5\nann,7,queen,3\n")
    frame, report = read_with_report(path)
    assert frame.rows() == [(7, "abba", 5.0), (7, "queen", 3.0)]
    assert report.lines()[0] == (
        'read as csv: user = column 2 "user_id", item = column 3 "song", rating = column 4 "stars"; header: yes'
    )
    assert report.facts()["columns"]["item"] == {"position": 3, "name": "song"}


def test_one_column_cannot_be_both(path: Path) -> None:
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="user and item are both column 1; expected two columns"):
        read(path, columns={"user": 1, "item": 1})


def test_plain_names() -> None:
    assert [plain_name(name) for name in ("user_id:token", "Book-Rating", "review/userId")] == [
        "userid",
        "bookrating",
        "userid",
    ]
