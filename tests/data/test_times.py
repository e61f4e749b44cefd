from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import load, read, read_with_report
from perfedrec.data.times import time_unit, utc


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


def times(path: Path, *values: str) -> list[int]:
    path.write_text("user|item|time\n" + "".join(f"1|{i}|{value}\n" for i, value in enumerate(values)))
    return read(path)["timestamp"].to_list()


def seconds(*fields: int) -> int:
    return int(datetime(*fields, tzinfo=UTC).timestamp())  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Tue Apr 03 18:00:09 +0000 2012", seconds(2012, 4, 3, 18, 0, 9)),
        ("Mon Aug 01 13:41:46 -0700 2011", seconds(2011, 8, 1, 20, 41, 46)),
        ("2019-10-01 00:00:00 UTC", seconds(2019, 10, 1)),
        ("2019-10-01T05:06:07Z", seconds(2019, 10, 1, 5, 6, 7)),
        ("2019-10-01T05:06:07+02:00", seconds(2019, 10, 1, 3, 6, 7)),
        ("2019-10-01 05:06:07-0130", seconds(2019, 10, 1, 6, 36, 7)),
        ("2019-10-01T05:06:07+02", seconds(2019, 10, 1, 3, 6, 7)),
        ("2019-10-01 05:06", seconds(2019, 10, 1, 5, 6)),
        ("2019-10-01T05:06:07.000", seconds(2019, 10, 1, 5, 6, 7)),
        ("2019/10/01", seconds(2019, 10, 1)),
        ("2019.10.01", seconds(2019, 10, 1)),
        ("2019-1-2", seconds(2019, 1, 2)),
        ("20191001", seconds(2019, 10, 1)),
        ("20191001050607", seconds(2019, 10, 1, 5, 6, 7)),
        ("01/31/2019", seconds(2019, 1, 31)),
        ("31/01/2019 05:06", seconds(2019, 1, 31, 5, 6)),
        ("3.1.2019", seconds(2019, 1, 3)),
        ("November 5, 2011", seconds(2011, 11, 5)),
        ("09 13, 2009", seconds(2009, 9, 13)),
        ("01-Jan-1995", seconds(1995, 1, 1)),
        ("Sat, 01 Jan 2011 10:00:00 GMT", seconds(2011, 1, 1, 10)),
        ("1425941529.0", 1425941529),
        (" 9e8 ", 900_000_000),
    ],
)
def test_common_forms_of_a_time(path: Path, written: str, expected: int) -> None:
    assert times(path, written) == [expected]


def test_fractions_of_a_second_keep_their_order(path: Path) -> None:
    assert times(path, "1500000000.5", "1500000000.25") == [1500000000500000, 1500000000250000]
    assert times(path, "2019-10-01 00:00:00.5", "2019-10-01 00:00:00") == [1569888000500000, 1569888000000000]
    assert times(path, "2019-10-01T00:00:00.001Z", "2019-10-01T00:00:01Z")[0] % 10**6 == 1000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1700000000", "1700000001123"], "line 3: timestamp is 1700000001123 and seems to be in milliseconds, but"),
        (["01/02/2019", "03/04/2019"], "'01/02/2019', which may be day/month or month/day; write the dates as year-"),
        (["31/01/2019", "01/31/2019"], "both day/month and month/day occur"),
        (["2019-10-01", "soon"], "line 3: timestamp is 'soon'; expected a date such as '2019-10-01', as in other"),
        (["1960-01-01"], "line 2: timestamp is '1960-01-01'; expected seconds since 1970 or a date"),
        (["2019-13-01"], "line 2: timestamp is '2019-13-01'"),
    ],
)  # fmt: skip
def test_times_that_are_refused(path: Path, values: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        times(path, *values)


def test_the_unit_is_told(path: Path) -> None:
    for factor, unit in ((1, "seconds"), (1000, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")):
        times(path, str(1_500_000_000 * factor))
        report = read_with_report(path)[1]
        assert report.unit == unit
        assert f'time = column 3 "time" in {unit}' in report.lines()[0]
    times(path, "20191001")
    assert 'time = column 3 "time" as YYYYMMDD' in read_with_report(path)[1].lines()[0]


@settings(max_examples=50)
@given(moment=st.datetimes(datetime(1974, 1, 1), datetime(2100, 1, 1)), unit=st.sampled_from([0, 3, 6, 9]))
def test_the_size_of_a_time_tells_its_unit(moment: datetime, unit: int) -> None:
    value = int(moment.replace(microsecond=0, tzinfo=UTC).timestamp()) * 10**unit
    assert time_unit(value) == {0: "seconds", 3: "milliseconds", 6: "microseconds", 9: "nanoseconds"}[unit]
    assert utc(value) == moment.replace(microsecond=0, tzinfo=UTC)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=st.lists(st.datetimes(datetime(1974, 1, 1), datetime(2100, 1, 1)), min_size=2, max_size=9, unique=True))
def test_iso_times_keep_their_order(path: Path, moments: list[datetime]) -> None:
    """Also where some have a fraction of a second and others have none."""
    found = times(path, *(moment.isoformat() for moment in moments))
    assert sorted(range(len(moments)), key=found.__getitem__) == sorted(range(len(moments)), key=moments.__getitem__)


def test_many_in_a_second_are_split_by_their_full_time(path: Path) -> None:
    rows = [(f"u{u}", f"i{(3 * u + i) % 9}", 1685336204000 + 100 * i) for u in range(9) for i in range(6)]
    pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").write_csv(path)
    data = load(path)
    assert set(data.test.frame()["timestamp"]) == {1685336204500}
    assert set(data.valid.frame()["timestamp"]) == {1685336204400}


def test_global_time_takes_dates_for_any_unit(path: Path) -> None:
    rows = [(u, i, (1_500_000_000 + 100 * i) * 1000 + u) for u in range(5) for i in range(8)]
    pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").write_csv(path)
    data = load(path, split_how="global-time", valid_from=1_500_000_600, test_from="2017-07-14T02:51:40")
    assert "validation from 2017-07-14 02:50:00, test from 2017-07-14 02:51:40" in data.notes.how
    assert data.train.n_interactions == 5 * 6
