import shlex
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import parse_columns, read, read_with_report
from perfedrec.data.frames import rows_with_report
from perfedrec.data.roles import NoUserError, is_header, plain_name

TIMED = "not used: column 4, which looks like times; --columns user=1,item=2,timestamp="


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
        ("wer,was,wann\nann,abba,10.03.2021\nbob,abba,11.03.2021\n", True),
        ("wer,was,wann\nann,abba,2021-03-10\nbob,abba,2021-03-11\n", True),
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


@pytest.mark.parametrize("name", ["Buchung, Zeit", "when, utc", "Größe", "Дата", "Zeit (UTC)", "price, %", "日付"])
def test_names_of_columns_may_have_commas_and_letters_of_any_language(name: str) -> None:
    assert is_header([[name, "Karte", "Ware"], ["10.03.2021", "k1", "w1"], ["11.03.2021", "k2", "w1"]])
    assert is_header([["Karte", "Ware", name], ["k1", "w1", "4"], ["k2", "w1", "2"]])


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
    assert read(path, columns={"user": 1, "item": 2}, header=False).rows() == [(0, 1, 2.0), (7, 8, 5.0), (9, 8, 4.0)]
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


DATED = [f"u{user},i{(user + step) % 7},{step + 1},{{}}" for user in range(5) for step in range(3)]


@pytest.mark.parametrize(
    ("header", "time", "told"),
    [
        ("username,artist,plays,when", "2021-03-{}", 'time = column 4 "when" such as'),
        ("customer_id,product_id,quantity,order_date", "12/{}/2021", 'time = column 4 "order_date" as month/day/year'),
        ("user_id,song,plays,listened_at", "16000000{}", 'time = column 4 "listened_at" in seconds'),
        ("user_id,song,plays,created_at", "16000000{}", 'time = column 4 "created_at" in seconds'),
        ("user_id,song,plays,Date Time", "{}.03.2021", 'time = column 4 "Date Time" as day/month/year'),
        ("user_id,song,plays,shipping_date", "2021-03-{}", 'time = column 4 "shipping_date" such as'),
        ("user_id,song,plays,heardAt", "16000000{}", 'time = column 4 "heardAt" in seconds'),
    ],
)
def test_columns_of_times_are_found(path: Path, header: str, time: str, told: str) -> None:
    rows = [line.format(time.format(14 + i)) for i, line in enumerate(DATED)]
    path.write_text("\n".join([header, *rows]))
    frame, report = read_with_report(path)
    assert told in report.lines()[0]
    assert frame["timestamp"].is_sorted()
    assert not report.remarks


@pytest.mark.parametrize(
    ("header", "value", "remarks"),
    [
        (
            "user,item,rating,moment",
            "2021-03-{}",
            ['column 4 "moment", which looks like times; --columns timestamp='],
        ),
        ("user,item,rating,moment", "1/2/2021", ['column 4 "moment", which looks like times; --columns timestamp=mo']),
        ("user,item,rating,release_date", "2021-03-{}", ['column 4 "release_date", which looks like times; --columns']),
        ("user,item,rating,moment,x", "2021-03-{},a", ['column 4 "moment", which looks like times', 'column 5 "x"']),
        ("user,item,rating,a_date,b_date", "2021-03-{},2021-03-01", ['column 4 "a_date", which looks', '5 "b_date"']),
        ("user,item,rating,runtime", "1{}", ['column 4 "runtime"']),
        ("user,item,rating,a,b,c,d,e", "1,2,3,4,{}", ['column 4 "a", column 5 "b", column 6 "c" and 2 more']),
    ],
)
def test_columns_that_are_not_used_are_told(path: Path, header: str, value: str, remarks: list[str]) -> None:
    rows = [line.format(value.format(14 + i)) for i, line in enumerate(DATED)]
    path.write_text("\n".join([header, *rows]))
    frame, report = read_with_report(path)
    assert frame.columns == ["user", "item", "rating"]
    assert len(report.remarks) == len(remarks)
    for told, expected in zip(report.remarks, remarks, strict=True):
        assert told.startswith("not used: ")
        assert expected in told
    assert read_with_report(path, columns={"timestamp": "none"})[1].remarks[0].find("--columns") == -1


def test_columns_that_are_not_used_in_tables_and_objects(tmp_path: Path) -> None:
    table = pl.DataFrame({"user": [1, 2], "item": [3, 4], "moment": [date(2021, 1, 2), date(2021, 1, 3)], "x": "a"})
    table.write_parquet(tmp_path / "a.parquet")
    table.write_ndjson(tmp_path / "a.json")
    told = ('not used: column 3 "moment", which looks like times; --columns timestamp=moment', 'not used: column 4 "x"')
    assert read_with_report(tmp_path / "a.parquet")[1].remarks == told
    assert read_with_report(tmp_path / "a.json")[1].remarks == told
    assert rows_with_report(table)[1].remarks == told
    assert "timestamp" in read(tmp_path / "a.json", columns={"timestamp": "moment"}).columns


@pytest.mark.parametrize(
    ("line", "columns", "expected", "remarks"),
    [
        ("1,2,3,1600000000", {"item": 1, "user": 2}, (2, 1, 3.0, 1_600_000_000), ()),
        ("1,2,3,1600000000", {"item": 1, "user": 2, "rating": "none"}, (2, 1, 1_600_000_000), ("not used: column 3",)),
        ("1,2,3,1600000000", {"rating": "none"}, (1, 2, 1_600_000_000), ("not used: column 3",)),
        ("1,2,1600000000", {"item": 1, "user": 2}, (2, 1, 1_600_000_000), ()),
        ("1,2,3", {"item": 1, "user": 2}, (2, 1, 3.0), ()),
        ("1,2,word", {"item": 1, "user": 2}, (2, 1), ("not used: column 3",)),
        ("1,2,3,word", {"item": 1, "user": 2}, (2, 1, 3.0), ("not used: column 4",)),
        ("1,2,3,4", {"user": 3, "item": 4}, (3, 4), ("not used: column 1, column 2",)),
        ("1,2,3,1600000000,5", {"user": 1, "item": 2}, (1, 2), (f"{TIMED}4", "not used: column 3, column 5")),
    ],
)
def test_columns_that_are_not_named_keep_their_role_without_a_header(
    path: Path, line: str, columns: dict[str, str | int], expected: tuple[float, ...], remarks: tuple[str, ...]
) -> None:
    path.write_text(f"{line}\n{line}\n")
    frame, report = read_with_report(path, columns=columns, header=False)
    assert frame.rows() == [expected] * 2
    assert report.remarks == remarks


def test_unknown_names_above_decimal_commas_are_a_header(path: Path) -> None:
    path.write_text("Benutzer;Artikel;Bewertung;Datum\nb1;a1;4,5;24.03.2021\nb2;a1;3;25.03.2021\n")
    expected = (
        r"no user and no item column; the columns are Benutzer, Artikel, Bewertung, Datum; name them with --columns "
        r"user=NAME,item=NAME, as in --columns user=Benutzer,item=Artikel \(or --no-header, if these are data\)"
    )
    with pytest.raises(DataError, match=expected):
        read(path)
    named = {"user": "Benutzer", "item": "Artikel", "rating": "Bewertung", "timestamp": "Datum"}
    assert read(path, columns=named)["rating"].to_list() == [4.5, 3.0]
    assert read(path, columns=named)["timestamp"].to_list() == [1_616_544_000, 1_616_630_400]
    path.write_text("b1;a1;4,5\nb2;a1;3,5\n")
    assert read(path).rows() == [("b1", "a1", 4.5), ("b2", "a1", 3.5)]
    assert read(path, columns={"user": 1, "item": 2}).rows() == [("b1", "a1", 4.5), ("b2", "a1", 3.5)]


def test_a_file_without_users_is_read_as_the_one_of_a_user_who_is_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("item,rating\n10,4\n20,5\n")
    with pytest.raises(NoUserError, match="no user column; the columns are item, rating"):
        read_with_report(file)
    found, _ = read_with_report(file, user="007")
    assert found.rows() == [("007", 10, 4.0), ("007", 20, 5.0)]
    file.write_text("item,whose\n10,ann\n20,bo\n")
    with pytest.raises(DataError, match="no user column") as raised:
        read_with_report(file)
    assert not isinstance(raised.value, NoUserError)  # the other column may name the users


def test_options_that_are_suggested_can_be_pasted(path: Path) -> None:
    """Names with spaces and commas are in quotes, and the columns that were given are in the option again."""
    rows = "".join(f"k{n % 3},w{n % 4},2021-03-{10 + n} 10:00:00\n" for n in range(9))
    path.write_text('Kunde Nr,"Ware, Art","Buchung, Zeit"\n' + rows)
    with pytest.raises(DataError, match=r'the columns are "Kunde Nr", "Ware, Art", "Buchung, Zeit"; ') as caught:
        read(path)
    assert pasted(str(caught.value)) == {"user": "Kunde Nr", "item": "Ware, Art"}
    (told,) = read_with_report(path, columns=pasted(str(caught.value)))[1].remarks
    assert pasted(told) == {"user": "Kunde Nr", "item": "Ware, Art", "timestamp": "Buchung, Zeit"}
    assert read(path, columns=pasted(told)).columns == ["user", "item", "timestamp"]
    path.write_text("Wann,Wer,Was\n" + "".join(f"2021-03-{10 + n},k{n % 3},w{n % 4}\n" for n in range(9)))
    with pytest.raises(DataError, match=r"as in --columns user=Wer,item=Was \(or"):  # no users are times
        read(path)


def pasted(message: str) -> dict[str, str | int] | None:
    """What a shell makes of the last option --columns in a message."""
    return parse_columns(shlex.split(message.rpartition("--columns ")[2].partition(" (or")[0])[0])


def test_a_name_that_is_missing_is_compared_with_the_first_line_where_that_is_no_header(path: Path) -> None:
    path.write_text("alpha beta\n" + "".join(f"k{n % 3} w{n % 4}\n" for n in range(9)))
    with pytest.raises(DataError, match=r"there is no header \(.*\); did you mean alpha\?"):
        read(path, columns={"user": "alfa", "item": "betta"})


def test_the_example_of_a_date_is_no_name_of_a_column(path: Path) -> None:
    for value in ("2021-03-10", "10 Mar 2021"):
        path.write_text("Wer,Was,Wann\n" + f"k1,w1,{value}\nk2,w1,{value}\nk2,w2,{value}\n")
        with pytest.raises(DataError, match=f"timestamp is 'Wann'; expected a date such as '{value}'"):
            read(path, columns={"user": 1, "item": 2, "timestamp": 3}, header=False)
