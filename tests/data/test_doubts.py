from pathlib import Path

import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import load, read, read_with_report, synthetic, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


LOG = [f"{u},{i},{(u + i) % 5 + 1},{1_500_000_000 + 10 * u + i}" for u in range(6) for i in range(u % 3, 6)]

QUESTIONS = {
    "an item is a date": (
        "u1,2019-10-01,5\nu1,2019-10-02,3\nu2,2019-10-01,4\n",
        r"read with item = column 2; its values are dates or times, such as 2019-10-01; name the columns",
    ),
    "an item is a time": (
        "1,1500000000\n1,1500000001\n2,1500000000\n",
        r"item = column 2; its values are dates or times",
    ),
    "an item is a day": ("1,20191001,5\n1,20191002,3\n2,20191001,4\n", r"item = column 2; its values are dates"),
    "ratings are times": (
        "1,10,1200000000,5\n1,11,1200000001,4\n2,10,1200000002,3\n",
        r"rating = column 3; its values are as large as times \(line 1 has 1200000000\); "
        r"name the columns, as in --columns user=1,item=2,rating=4,timestamp=3",
    ),
    "times are ratings": ("1,10,3,5\n1,11,2,4\n2,10,1,3\n", r"time = column 4; its values would be times in 1970"),
    "users are row numbers": (
        "0,7,1,5\n1,7,2,4\n2,8,1,3\n",
        r"user = column 1; it counts the rows \(0, 1, 2, ...\), and each user occurs once; "
        r"name the columns, as in --columns user=2,item=3,rating=4, or say that it is the user: --columns user=1",
    ),
    "users are row numbers from 1": ("1,7,61\n2,7,52\n3,8,61\n", r"it counts the rows \(1, 2, 3, ...\)"),
    "items first": (
        "i1,u1,5.0,1452643200\ni1,u2,4.0,1452643201\ni2,u2,4.0,1452643201\n",
        r"the users look like items \(i1\) and the items like users \(u1\); name the columns: --columns user=2,item=1,",
    ),
    "Amazon's order": (
        "B001E4KFG0,A3SGXH7AUHU8GW,5.0,1303862400\nB001E4KFG0,A1D87F6ZCVE5NK,1.0,1346976000\n",
        r"the users look like items",
    ),
    "each item once": (
        "k1,a,5,1452643200\nk1,b,4,1452643201\nk2,c,4,1452643201\n",
        r"each item occurs once, and 2 users have 3 rows; if they are the other way round, use --columns user=2,item=1",
    ),
    "below 0": (
        "user,item,rating\n1,2,-3\n1,3,8\n2,2,-1\n",
        r"rating = column 3 \"rating\"; line 2 has -3; --min-rating NUMBER leaves lower ratings out; "
        r"--columns user=user,item=item,rating=none counts all rows",
    ),
    "not rated": (
        "user,item,rating\n1,3,8\n1,2,-1\n2,2,10\n",
        r"line 3 has -1, which often means that nothing was rated; --min-rating 0 leaves such rows out",
    ),
    "99": ("user,item,rating\n1,3,8.5\n1,2,99\n2,2,-10\n", r"line 3 has 99, which often means that nothing was rated"),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUESTIONS)
def test_what_is_doubtful_is_asked(path: Path, kind: str) -> None:
    text, question = QUESTIONS[kind]
    path.write_text(text)
    with pytest.raises(DataError, match=question) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    if kind not in ("below 0", "not rated", "99"):  # columns that are named are an answer
        assert read(path, columns={"user": 1, "item": 2}).height == len(text.strip().split("\n"))


@pytest.mark.parametrize("word", ["NA", "None", "\\N", "?", "-", "N/A", "undefined"])
@pytest.mark.parametrize("role", ["user", "item"])
def test_a_word_for_nothing_is_no_id(path: Path, word: str, role: str) -> None:
    cells = (word, "i1") if role == "user" else ("u1", word)
    path.write_text(f"user,item\nu1,i1\n{','.join(cells)}\nu2,i2\n")
    with pytest.raises(DataError, match=rf"{role} = column . .*; line 3 has .*, as 1 of 3 rows, .* {role} is missing"):
        read(path)
    assert read(path, columns={"user": "user", "item": "item"}).height == 3


def test_a_user_called_unknown_is_asked_about_only_where_it_has_many_rows(path: Path) -> None:
    few = [f"u{i},i{i % 7}" for i in range(60)]
    path.write_text("\n".join(["user,item", *few, "unknown,i1", "unknown,i2"]))
    assert read(path).height == 62
    path.write_text("\n".join(["user,item", *few, *(f"unknown,i{i}" for i in range(30))]))
    with pytest.raises(DataError, match="'unknown', as 30 of 90 rows"):
        read(path)


def test_answers_about_ratings(path: Path) -> None:
    path.write_text("user,item,rating\n1,2,-1\n1,3,8\n2,2,10\n")
    assert read(path, min_rating=0)["rating"].to_list() == [-1, 8, 10]
    assert load(path, min_rating=0).train.n_interactions == 2
    assert load(path, columns={"rating": "none"}).train.n_interactions == 3


def test_labels_of_0_are_negatives(path: Path) -> None:
    path.write_text("a1\ti1\t1\na1\ti2\t0\na2\ti1\t1\na2\ti3\t0\na3\ti2\t1\na3\ti3\t0\n")
    frame, report = read_with_report(path)
    assert frame.select("user", "item").rows() == [("a1", "i1"), ("a2", "i1"), ("a3", "i2")]
    assert "the 3 rows of 0 are read as negatives and left out (--min-rating 0 keeps them)" in report.lines()[3]
    assert report.rows == 6
    assert read(path, min_rating=0).height == 6
    assert (
        load(pl.read_csv(path, separator="\t", new_columns=["user", "item", "rating"], has_header=False)).n_users == 3
    )


def test_ratings_below_the_middle_are_told_with_the_option(path: Path) -> None:
    path.write_text("user,item,rating\n" + "".join(f"1,{i},{r}\n" for i, r in enumerate([0.5, 1, 2.5, 3, 5, 5, 5, 5])))
    told = read_with_report(path)[1].lines()
    assert "ratings: 0.5 to 5, mean 3.38; 0.5: 12%, 1: 12%, 2.5: 12%, 3: 12%, 5: 50%" in told
    assert (
        "all ratings count as interactions, also the 38% below the middle of the scale; --min-rating 3 leaves these out"
        in told
    )
    assert not any("middle" in line for line in read_with_report(path, min_rating=2)[1].lines())


def test_counts_are_no_scale(path: Path) -> None:
    path.write_text("user,item,plays\n1,2,3\n1,3,500\n2,2,1\n2,3,7\n")
    report = read_with_report(path)[1]
    assert report.ratings is not None
    assert report.ratings.middle is None
    assert (report.ratings.low, report.ratings.high) == (1, 500)


def test_what_cannot_be_decided_is_told(path: Path) -> None:
    path.write_text("".join(f"{i % 3},{i}\n" for i in range(40)))
    told = read_with_report(path)[1].lines()
    assert "an item occurs 1.0 times and a user 13.3 times on average" in told[-1]
    assert "use --columns user=2,item=1" in told[-1]
    path.write_text("user,item,time\n1,2,5\n1,3,6\n")
    assert "the times lie near 1970: only their order is used" in read_with_report(path)[1].lines()
    path.write_text("1 7 1\n2 8 1\n3 7 1\n4 9 1\n5 9 1\n")
    assert "each user occurs once: a split can hold out nothing" in read_with_report(path)[1].lines()
    assert "each user occurs once" not in str(read_with_report(path, held_out=True)[1].lines())


@pytest.mark.parametrize("separator", [",", "\t", "::", " "])
@pytest.mark.parametrize("n_columns", [2, 3, 4])
def test_an_ordinary_log_is_not_asked_about(path: Path, separator: str, n_columns: int) -> None:
    path.write_text("\n".join(separator.join(line.split(",")[:n_columns]) for line in LOG))
    assert read(path).height == len(LOG)


def test_synthetic_data_are_not_asked_about(path: Path) -> None:
    data = load("synthetic:users=60,items=50,clusters=2,interactions_per_user=6")
    for format in ("csv", "parquet"):
        folder = write(data, path.parent / format, format)
        for part in ("train", "valid", "test"):
            assert read(next(folder.glob(f"{part}.*"))).height == getattr(data, part).n_interactions
    frame = synthetic(users=60, items=50, clusters=2, interactions_per_user=6)[0].frame()
    for header in (True, False):
        frame.write_csv(path, include_header=header)
        assert read(path).height == frame.height


def test_a_first_line_of_words_above_ids_with_digits_is_remarked_on(path: Path) -> None:
    rows = [f"c-{row % 7},sku_{row % 11}" for row in range(40)]
    remark = "the first line (who, what) may be the names of the columns: if it is, say so with --header"

    def remarks(first: str) -> tuple[str, ...]:
        path.write_text("\n".join([first, *rows]) + "\n")
        return read_with_report(path)[1].remarks

    assert remark in remarks("who,what")
    assert not any("first line" in each for each in remarks("c-9,sku_12") + remarks("user,item"))
    path.write_text("\n".join(["who,what", *(row.replace("c-1", "ann") for row in rows)]) + "\n")
    assert remark not in read_with_report(path)[1].remarks  # others have words for ids, too
