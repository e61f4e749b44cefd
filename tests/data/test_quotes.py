import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import read
from perfedrec.data.quotes import settle_quotes

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('user,item\na"b,1\nc,2\nd"e,3\n', [('a"b', 1), ("c", 2), ('d"e', 3)]),
        ('user,item\n5" nail,1\nc,2\n', [('5" nail', 1), ("c", 2)]),
        ('user,item\n"big" deal,1\nc,2\n', [('"big" deal', 1), ("c", 2)]),
        ('user,item\n"a "b" c",1\nc,2\n', [('a "b" c', 1), ("c", 2)]),
        ('user,item\n"a, b",1\n"c ""d""",2\n', [("a, b", 1), ('c "d"', 2)]),
        ('user,item\n"a\n\nb",1\nx"y,2\n', [("a\n\nb", 1), ('x"y', 2)]),
        ('user;item\n"a";1\n"b;c";2\n', [("a", 1), ("b;c", 2)]),
        ('user|item\n"a"|1\nx"|2\n', [("a", 1), ('x"', 2)]),
        ('user\titem\n"a\t1\nb\t2\nc"\t3\n', [('"a', 1), ("b", 2), ('c"', 3)]),
        ('user\titem\n"a b" c\t1\n"d"\t2\n', [('"a b" c', 1), ('"d"', 2)]),
    ],
)
def test_quotes(path: Path, text: str, expected: list[tuple[str, int]]) -> None:
    path.write_text(text)
    assert read(path).rows() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('user,item\na,1\n"b,2\nc,3\n', "line 3: opens a quote that never closes; double it if it is a character"),
        (
            'user,item,plays\nu1,"Aaa,5\nu1,bbb,7\nu2,Ccc",3\n',
            "line 2: opens a quote that closes in line 4, but each of these lines looks like a row",
        ),
        (
            'user,item,plays\nu1,"Aaa,5\nu1,bbb,7\nu2,"Mug, ""XL""",3\n',
            "line 2: opens a quote that closes in line 4, but each of these lines looks like a row",
        ),
        ('user,item,plays\nu1,a"a,5\nu1,bbb\nu2,c,3\n', "line 3: has 2 columns; expected 3"),
    ],
)
def test_doubtful_quotes_are_refused_with_their_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path)


cells = st.text(st.sampled_from('ab ,"\n;'), min_size=1, max_size=6).map(lambda text: f"x{text}y")


@RELAXED
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_what_a_csv_writer_writes_is_read_back(path: Path, rows: list[tuple[str, str]]) -> None:
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows([("user", "item"), *rows])
    path.write_text(target.getvalue())
    try:
        found, problem = read(path).rows(), ""
    except DataError as error:
        found, problem = rows, str(error)
    # a line break beside a separator: two rows with stray quotes would look the same
    assert not problem or "each of these lines looks like a row" in problem
    assert found == rows


@RELAXED
@given(rows=st.lists(st.tuples(*2 * [st.text(st.sampled_from('ab "'), min_size=1, max_size=5)]), min_size=1))
def test_plain_lines_keep_their_quotes(rows: list[tuple[str, str]]) -> None:
    """Fields that do not start with a quote are read as they are, whatever the quotes in them."""
    lines = [[f"x{field}" for field in row] for row in rows]
    text = "\n".join(map(",".join, lines))
    settled, inner = settle_quotes(Path("data"), text.encode(), ",")
    assert list(csv.reader(io.StringIO(settled.decode()))) == lines
    assert inner == 0
