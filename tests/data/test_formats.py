import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import detect, parse_columns, read, read_with_report
from perfedrec.data.formats import FORMATS

Pairs = set[tuple[int, int]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


def rows(frame: pl.DataFrame) -> list[tuple[object, ...]]:
    return frame.rows()


def pairs(frame: pl.DataFrame) -> set[tuple[object, object]]:
    return set(frame.select("user", "item").rows())


def attempt(path: Path) -> tuple[pl.DataFrame | None, str]:
    """The content of a file, or the error."""
    try:
        return read(path), ""
    except DataError as error:
        return None, str(error)


# --- each format by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "columns", "expected"),
    [
        ("0 2219 1\n0 2003 1\n7 842 1\n7 11 1\n", "triples", "user item rating", [(0, 2219, 1.0), (7, 842, 1.0)]),
        ("  0   22\t1 \n0 2003 1\n0 84 1\n0 5 1", "triples", "user item rating", [(0, 22, 1.0), (0, 84, 1.0)]),
        ("5 22\n5 23\n6 24\n", "triples", "user item", [(5, 22), (6, 24)]),
        ("0 5 3 9\n1 4\n2\n3 8 8 8 1\n", "adjacency", "user item", [(0, 5), (0, 9)]),
        ("1,2,3.5\n1,3,4\n", "csv", "user item rating", [(1, 2, 3.5)]),
        ("1;2;1112486027\n1;3;1112486028\n", "csv", "user item timestamp", [(1, 2, 1112486027)]),
        ("rating,userId,x,movieId\n3,1,a,2\n4,1,b,3\n", "csv", "user item rating", [(1, 2, 3.0)]),
        ("user item\nann i1\nbob i2\n", "csv", "user item", [("ann", "i1")]),
        ("uid\tiid\n1\t2\n1\t3\n", "tsv", "user item", [(1, 2)]),
        ("New York\tBig Apple\nOslo\tA\n", "tsv", "user item", [("New York", "Big Apple")]),
        ("1::11::5::978300760\n1::6::3::978302109\n", "ml-1m", "user item rating timestamp", [(1, 11, 5, 978300760)]),
        ("1\t2\t3\t881250949\n8\t3\t3\t891717742\n", "triples", "user item rating timestamp", [(1, 2, 3, 881250949)]),
        ("user_id:token\titem_id:token\ttime:float\na\tb\t9e2\n", "recbole", "user item timestamp", [("a", "b", 900)]),
        ("\ufeffuser,item\r\n1,2\r\n\r\n3,4\r\n", "csv", "user item", [(1, 2), (3, 4)]),
        ('user,item\n"a,b","c ""d"""\n', "csv", "user item", [("a,b", 'c "d"')]),
    ],
)  # fmt: skip
def test_the_format_is_detected_and_read(
    path: Path, text: str, found: str, columns: str, expected: list[tuple[object, ...]]
) -> None:
    path.write_bytes(text.encode())
    assert detect(path) == found
    frame = read(path)
    assert frame.columns == columns.split()
    assert set(expected) <= set(rows(frame))
    assert frame.equals(read(path, found))


def test_ids_with_leading_zeros_are_names_not_numbers(path: Path) -> None:
    path.write_text("user,item\n007,1\n7,2\n")
    assert rows(read(path)) == [("007", 1), ("7", 2)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["1700000000", "1700000001"], [1700000000, 1700000001]),
        (["1700000000123", "1700000001999"], [1700000000123, 1700000001999]),
        (["1700000000123456789", "1700000001000000000"], [1700000000123456789, 1700000001000000000]),
        (["2023-11-14", "2023-11-15"], [1699920000, 1700006400]),
        (["2023-11-14 22:13:20", "2023-11-14 22:13:21"], [1700000000, 1700000001]),
    ],
)
def test_times_keep_their_full_value(path: Path, column: list[str], expected: list[int]) -> None:
    path.write_text("user,item,time\n" + "".join(f"1,{i},{value}\n" for i, value in enumerate(column)))
    assert read(path)["timestamp"].to_list() == expected


def test_columns_by_name_and_by_position(path: Path) -> None:
    path.write_text("who,what,when,how\n1,2,1700000000,4\n")
    with pytest.raises(DataError, match="what, when, how; name them with --columns user=NAME,item=NAME"):
        read(path)
    frame = read(path, columns={"user": "who", "item": 2, "rating": "how", "timestamp": "none"})
    assert frame.to_dicts() == [{"user": 1, "item": 2, "rating": 4.0}]
    path.write_text("9,8,1,2,7\n9,8,1,3,7\n")
    assert pairs(read(path, columns={"user": 3, "item": "4"})) == {(1, 2), (1, 3)}
    with pytest.raises(DataError, match="no column 6 for the item; the columns are 1, 2, 3, 4, 5"):
        read(path, columns={"user": 3, "item": 6})
    with pytest.raises(DataError, match=r"unknown column role 'usr': .*; did you mean user"):
        read(path, columns={"usr": 1})


def test_the_name_of_a_column_may_have_commas(path: Path) -> None:
    columns = parse_columns("user=who, item=what, short,rating=3,")
    assert columns == {"user": "who", "item": "what, short", "rating": 3}
    path.write_text('who,"what, short",how\n1,2,4\n')
    assert pairs(read(path, columns=columns)) == {(1, 2)}
    for text, part in (("user=1,item", "item"), ("who,item=2", "who"), ("user=,item=2", "user=")):
        with pytest.raises(DataError, match=f"columns: '{part}' names no column; expected role=column"):
            parse_columns(text)
    with pytest.raises(DataError, match="unknown column role 'itm'"):
        parse_columns("user=1,itm=2")


def test_two_columns_that_could_be_the_user(path: Path) -> None:
    path.write_text("user,user_id,item\n1,2,3\n")
    with pytest.raises(DataError, match="columns user and user_id could both be the user"):
        read(path)
    assert pairs(read(path, columns={"user": "user_id"})) == {(2, 3)}


def test_parquet(path: Path) -> None:
    frame = pl.DataFrame({"uid": [3, 1], "movieId": ["a", "b"], "score": [1.0, 0.5], "date": [1700000000, 1700000001]})
    frame.write_parquet(path)
    assert detect(path) == "parquet"
    assert rows(read(path)) == [(3, "a", 1.0, 1700000000), (1, "b", 0.5, 1700000001)]
    frame.with_columns(pl.Series("score", [1.0, -1.0])).write_parquet(path)
    with pytest.raises(DataError, match=r"rating = column 3 .*; row 2 has -1; --min-rating NUMBER"):
        read(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="is not a readable parquet file"):
        read(path)


def test_a_header_without_rows_gives_an_empty_frame(path: Path) -> None:
    path.write_text("user,item,timestamp\n")
    frame = read(path)
    assert frame.height == 0
    assert frame.columns == ["user", "item", "timestamp"]


# --- triples or adjacency --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("".join(f"{u} {u + 50} 1\n" for u in range(8)), "triples"),  # the weight of implicit feedback
        ("".join(f"{u % 3} {u + 50} {u % 5 + 1}\n" for u in range(30)), "triples"),  # users are repeated
        ("".join(f"{u} {u + 50} {u % 5}.5\n" for u in range(8)), "triples"),  # an item id is not a fraction
        ("".join(f"{u} {u + 50} 3 {u + 10**9}\n" for u in range(8)), "triples"),  # item ids do not look like times
        ("".join(f"u{u} i{u} {u % 5}\n" for u in range(8)), "triples"),
        ("".join(f"{u} {u + 50} {u + 60} {u + 1}\n" for u in range(8)), None),
        ("".join(f"{u} {u + 50} {u % 5 + 1}\n" for u in range(8)), None),  # each line could have two items
        ("0 5 1\n1 7 1\n", None),  # too few lines to trust a constant
        ("".join(f"{u} {u + 50} {u + 60}\n" for u in [0, 0, *range(1, 20)]), None),
        ("".join(f"{u} 1 2 3 4 5\n" for u in range(8)), "adjacency"),
        ("0 5 1\n1 7\n2 8 9 4\n", "adjacency"),
        ("0 5\n1\n2 8\n", "adjacency"),
    ],
)
def test_triples_or_adjacency(path: Path, text: str, expected: str | None) -> None:
    path.write_text(text)
    if expected is None:
        with pytest.raises(DataError, match=r"data: may be triples .* expected --format triples or --format adjacency"):
            read(path)
    else:
        assert detect(path) == expected


def test_an_ambiguous_file_can_be_read_in_both_formats(path: Path) -> None:
    path.write_text("0 5 3\n1 7 4\n")
    assert rows(read(path, "triples")) == [(0, 5, 3.0), (1, 7, 4.0)]
    assert rows(read(path, "adjacency")) == [(0, 5), (0, 3), (1, 7), (1, 4)]


RELAXED = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
some_pairs = st.sets(st.tuples(st.integers(0, 30), st.integers(0, 10**7)), min_size=1, max_size=60)


def adjacency(wanted: Pairs) -> str:
    users = sorted({user for user, _ in wanted})
    return "".join(" ".join(map(str, [u, *(i for v, i in sorted(wanted) if v == u)])) + "\n" for u in users)


WRITERS = {
    "triples": lambda wanted: "".join(f"{u} {i} 1\n" for u, i in sorted(wanted)),
    "adjacency": adjacency,
    "csv": lambda wanted: "user;item\n" + "".join(f"{u};{i}\n" for u, i in wanted),
    "tsv": lambda wanted: "".join(f"{u}\t{i}\n" for u, i in wanted),
    "ml-100k": lambda wanted: "".join(f"{u}\t{i}\t{i % 5 + 1}\t{i + 881250949}\n" for u, i in wanted),
    "ml-1m": lambda wanted: "".join(f"{u}::{i}::{i % 5 + 1}::{i + 978300760}\n" for u, i in wanted),
    "ml-csv": lambda wanted: "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},0.5,11\n" for u, i in wanted),
    "recbole": lambda wanted: "user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u, i in wanted),
}


@pytest.mark.parametrize("format", WRITERS)
@RELAXED
@given(wanted=some_pairs)
def test_a_written_file_is_read_back(path: Path, format: str, wanted: Pairs) -> None:
    path.write_text(WRITERS[format](wanted))
    frame = read(path, format)
    assert frame.height == len(wanted)
    assert pairs(frame) == wanted


@pytest.mark.parametrize("format", WRITERS)
@RELAXED
@given(wanted=some_pairs)
def test_auto_reads_the_same_or_refuses(path: Path, format: str, wanted: Pairs) -> None:
    path.write_text(WRITERS[format](wanted))
    got, problem = attempt(path)
    if got is None:
        assert format in ("triples", "adjacency")
        assert "expected --format triples or --format adjacency" in problem
    else:
        assert pairs(got) == wanted


def test_the_documentation_names_formats_as_they_are_recognised(path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`[a-z`, 0-9-]+) \|.*$", text[: text.index("| synthetic")], flags=re.MULTILINE)
    assert {name for each in lines for name in re.findall("`(.*?)`", each)} == {*FORMATS} - {"auto"}
    for format in ("ml-100k", "ml-1m", "ml-csv", "recbole"):
        path.write_text(WRITERS[format]({(user, item) for user in range(4) for item in range(5)}))
        (row,) = re.findall(rf"^\| `{format}` \|.*$", text, flags=re.MULTILINE)
        found = read_with_report(path)[1].format
        assert ("with `--format` only" in row) == (found != format)
        assert f"`{found}`" in row


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@RELAXED
@given(wanted=st.sets(st.tuples(names.map("u".__add__), names.map("i".__add__)), min_size=1, max_size=20))
def test_names_of_any_letters_survive_csv(path: Path, wanted: set[tuple[str, str]]) -> None:
    pl.DataFrame(sorted(wanted), schema=["user", "item"], orient="row").write_csv(path)
    assert pairs(read(path)) == wanted


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (b"", "auto", r"data: is empty"),
        (b" \n\n", "auto", r"data: is empty"),
        (b"\xef\xbb\xbf\n", "csv", r"data: is empty"),
        (b"\x7fELF\0\0\1", "auto", r"data, line 1: holds the control character 0x00; expected text"),
        ("user,item\né,2\n".encode() + b"caf\xe9,3\n", "auto", r"data, line 3: is not UTF-8 text, though other lines"),
        (b"0 1 1\n0 2 1\n0 3 1 9\n0 4 1\n", "triples", r"data, line 3: has 4 columns; expected 3 as in the first line"),
        (b"0 1 1\n0 2 1\n0 3 1 9\n0 4 1\n", "auto", r"data, line 3: has 4 columns; expected 3"),
        (b"0 1 1\n0 2\n0 3 1\n", "auto", r"data, line 2: has 2 columns; expected 3"),
        (b"0 1 1\n\n0 2\n0 3 1\n", "triples", r"data, line 3: has 2 columns; expected 3"),
        (b"user,item\n1,2\n1,3,4\n", "auto", r"data, line 3: has 3 columns; expected 2"),
        (b"1\n2\n3\n", "auto", r"data: holds users but no items"),
        (b"1,2,3,4,5\n1,2,3,4,5\n", "auto", r"data, line 1: has 5 columns; expected user item"),
        (b"0 1 1\n0 -2 1\n", "triples", r"data, line 2: item is -2; expected an id that is not negative"),
        (b"\n0 1 1\n\n0 2 -1\n", "triples", r"data: .*; line 4 has -1; --min-rating NUMBER leaves"),
        (b"0 1 1\n0 2 nan\n", "triples", r"data, line 2: rating is 'nan'; expected a number"),
        (b"0 1 1\n0 2 inf\n", "triples", r"data, line 2: rating is 'inf'; expected a number"),
        (b"0 1 1\n0 2 x\n", "triples", r"data, line 2: rating is 'x'; expected a number"),
        (b"user,item\n1,2\n,3\n", "auto", r"data, line 3: user is missing; expected an id"),
        (b"user,item\n1,2\nnan,3\n", "auto", r"data, line 3: user is 'nan'; expected an id"),
        (b'user,item\n"a\nb",2\nc,\n', "auto", r"data, line 4: item is missing; expected an id"),
        (b"user,item,time\n1,2,yesterday\n", "auto", r"data, line 2: timestamp is 'yesterday'; expected seconds"),
        (
            b"user,item,time\n1,2,5\n1,3,6\n1,4,1997-09-22\n",
            "auto",
            r"data, line 4: timestamp is '1997-09-22'; expected seconds since 1970, as in other lines",
        ),
        (
            b"user,item,time\n1,2,1997-09-21\n1,3,1997-09-22\n1,4,9\n",
            "auto",
            r"data, line 4: timestamp is '9'; expected a date such as '1997-09-21', as in other lines",
        ),
        (b"user,item,time\n1,2,5\n1,3,-5\n", "auto", r"data, line 3: timestamp is '-5'; expected seconds"),
        (b"1\t2\t3\t88\n1\tx\t3\t88\n", "ml-100k", r"data, line 2: item is 'x'; expected an integer id"),
        (b"0 1 2\n1 5\n\n0 3 4 9\n", "adjacency", r"data, line 4: user 0 occurs a second time"),
        (b"0 1 2\n1 5 -6\n", "adjacency", r"data, line 2: item is -6; expected an id that is not negative"),
        (b"0 1 2 7\n1 5\n2 nan\n", "adjacency", r"data, line 3: item is 'nan'; expected an id"),
        (b"0 1 2 7\n1 5\n2 x\n", "auto", r"data, line 3: item is 'x'; expected an integer id"),
        (b"This is\nnot a table of any kind\nreally\n", "auto", r"data, line 1: user is 'This'; expected an integer"),
        (b"\xa0\n", "auto", r"data: starts with nothing but spaces; expected interactions"),
        (b"@RELATION all\n\n@ATTRIBUTE user NUMERIC\n@DATA\n1,2,3\n", "auto", r"data: is an ARFF file.*after @data"),
        (b"a,b\n1,2\n", "ml-csv", r"data: no user and no item column; the columns are a, b"),
    ],
)  # fmt: skip
def test_broken_files(path: Path, content: bytes, format: str, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path, format)
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a folder; expected a file"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"unknown format 'tripels': expected one of .*; did you mean triples"):
        read(tmp_path, "tripels")


@RELAXED
@given(content=st.binary(max_size=200))
def test_no_content_escapes_as_another_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    frame, problem = attempt(path)
    if frame is None:
        assert str(path) in problem
    else:
        assert frame["user"].null_count() == frame["item"].null_count() == 0


@RELAXED
@given(text=st.text(st.sampled_from("01 9\t\n,.;-ux:\"'"), max_size=60))
def test_no_near_miss_escapes_as_another_error(path: Path, text: str) -> None:
    path.write_text(text)
    frame, problem = attempt(path)
    if frame is None:
        assert str(path) in problem
    else:
        assert frame["user"].null_count() == frame["item"].null_count() == 0


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        ([f"{u} {u}" for u in range(20)], ["90 1 2 3", "91 4"], "adjacency"),
        ([f"{u} {u} 1" for u in range(20)], ["20 5", "21 4 8 9"] * 1 + [f"{u}" for u in range(30, 60)], "adjacency"),
        ([f"{u % 2} {u + 50} {u}" for u in range(20)], [f"{u} 99 77" for u in range(100, 200)], "triples"),
        ([f"{u} {u + 50} {u % 5 + 1}" for u in range(20)], [f"{u} {u + 80} 5" for u in range(20)], "triples"),
    ],
)
def test_the_whole_file_is_examined_where_its_first_lines_do_not_decide(
    path: Path, monkeypatch: pytest.MonkeyPatch, head: list[str], tail: list[str], expected: str
) -> None:
    path.write_text("\n".join(head + tail))
    monkeypatch.setattr("perfedrec.data.detection.HEAD", len("\n".join(head)) + 1)
    assert detect(path) == expected
