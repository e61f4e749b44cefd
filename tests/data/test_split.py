from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.core import mapped
from perfedrec.core.errors import DataError
from perfedrec.data import Dataset, Interactions, Ties, interactions, last_ties, read, split, synthetic
from perfedrec.data.dataset import Rows, assemble
from perfedrec.data.parts import parted


def build(rows: list[tuple[int, int, int]]) -> Interactions:
    return Interactions.from_frame(pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"))


def external(part: Interactions) -> list[tuple[int, int]]:
    return part.frame().select("user", "item").rows()


#: User 1 took items 9, 8, 7, 6 in this order; users 2 and 3 in ascending order; user 4 has two interactions.
ROWS = [
    *[(1, 9, 10), (1, 8, 20), (1, 7, 30), (1, 6, 40)],
    *[(2, 6, 1), (2, 7, 2), (2, 8, 3)],
    *[(3, 6, 5), (3, 8, 6), (3, 5, 7)],
    *[(4, 7, 1), (4, 9, 2)],
]


def test_leave_one_out_by_time() -> None:
    data = split(build(ROWS))
    assert external(data.train) == [(1, 8), (1, 9), (2, 6), (3, 6), (4, 7), (4, 9)]
    assert external(data.valid) == [(1, 7), (2, 7), (3, 8)]
    assert external(data.test) == [(1, 6), (2, 8)]  # item 5 occurs nowhere else
    assert data.train.item_ids.tolist() == [6, 7, 8, 9]
    assert data.notes.short_users == 1
    assert (data.notes.test.unknown_items, data.notes.test.left_out, data.notes.test.interactions) == (1, 1, 3)
    assert data.notes.valid.left_out == 0
    assert data.notes.lines() == [
        "split: leave-one-out by time",
        "training has interactions that are later than tested ones (none with data.split=global-time)",
        "1 user with fewer than 3 interactions is in training only",
        "test: 1 of 3 interactions are left out of evaluation (0 users and 1 item never occur in training, "
        "0 interactions occur in an earlier part too)",
    ]
    assert data.train.timestamps is not None
    assert data.train.timestamps.tolist() == [20, 10, 1, 5, 1, 2]


def parts(data: Dataset) -> list[int]:
    return [data.train.n_interactions, data.notes.valid.interactions, data.notes.test.interactions]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(2, [2, 0, 0]), (3, [2, 1, 0]), (5, [4, 0, 1]), (10, [8, 1, 1]), (14, [11, 2, 1]), (100, [80, 10, 10])],
)
def test_ratio_of_one_user(n: int, expected: list[int]) -> None:
    data = split(build([(1, i, i) for i in range(n)]), "ratio")
    assert parts(data) == expected
    assert data.train.item_ids.tolist() == list(range(expected[0]))  # the earliest ones


def test_ratio_is_taken_per_user() -> None:
    data = split(build([(u, i, -i) for u in range(3) for i in range(20)]), "ratio", ratio=(0.5, 0.2, 0.3))
    assert parts(data) == [30, 12, 18]
    assert data.train.degrees.tolist() == [10, 10, 10]
    assert data.train.item_ids.tolist() == list(range(10, 20))


def test_random_order_depends_on_the_seed_alone_and_needs_no_times() -> None:
    interactions, _ = synthetic(users=50, items=60, clusters=2, interactions_per_user=10)
    untimed = Interactions(interactions.user_ids, interactions.item_ids, interactions.offsets, interactions.items)
    first, again, other = (split(untimed, order="random", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    timed = split(interactions, order="random", seed=0)
    assert external(timed.test) == external(first.test)
    name = "or name the column of times with --columns timestamp=NAME"
    with pytest.raises(DataError, match=f"no timestamps to split by; expected order random, {name}"):
        split(untimed)
    with pytest.raises(DataError, match=f"no timestamps; expected another split than global-time, {name}"):
        split(untimed, "global-time", ratio=(0.8, 0.1, 0.1))
    with pytest.raises(DataError, match=f"no timestamps; expected no ties together, {name}"):
        split(untimed, order="auto", ties="together")


def test_nothing_is_lost_and_nothing_is_in_two_parts() -> None:
    interactions, _ = synthetic(users=200, items=300, interactions_per_user=8)
    for how in ("leave-one-out", "ratio"):
        data = split(interactions, how, order="random", seed=3)
        sets = [set(external(part)) for part in (data.train, data.valid, data.test)]
        union = sets[0] | sets[1] | sets[2]
        assert len(union) == sum(map(len, sets))
        assert union <= set(external(interactions))
        left_out = data.notes.valid.left_out + data.notes.test.left_out
        assert sum(map(len, sets)) + left_out == interactions.n_interactions


def test_simultaneous_interactions_are_not_ordered_by_id() -> None:
    data = split(build([(u, i, 0) for u in range(300) for i in range(3)]))
    counts = np.bincount(data.test.items, minlength=3)
    assert counts.min() > 70  # 100 each, standard deviation 8


@pytest.mark.parametrize("ratio", [(0.8, 0.1, 0.2), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_impossible_ratios(ratio: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="three shares that add up to 1"):
        split(build(ROWS), "ratio", ratio=ratio)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"unknown split 'leave-one'.*did you mean leave-one-out"):
        split(build(ROWS), "leave-one")
    with pytest.raises(DataError, match=r"unknown order 'tme'.*did you mean time"):
        split(build(ROWS), order="tme")


def built(rows: list[tuple[int, int, int]], **options: object) -> list[list[tuple[int, int]]]:
    """The parts of a split, before anything is left out: all items and users also occur in training."""
    anchors = [(99, item, -1) for item in {item for _, item, _ in rows}]
    data = split(build([*rows, *anchors]), **options)  # type: ignore[arg-type]
    return [[row for row in external(part) if row[0] != 99] for part in (data.train, data.valid, data.test)]


#: User 1 has two interactions at the last time and two at the time before; user 2 has only two different times.
TIED = [
    *[(1, 1, 10), (1, 2, 20), (1, 3, 20), (1, 4, 30), (1, 5, 30)],
    *[(2, 1, 10), (2, 2, 10), (2, 3, 20), (2, 4, 20)],
    *[(3, 1, 1), (3, 2, 2), (3, 3, 3)],
]


def test_the_same_time_stays_together_in_leave_one_out() -> None:
    seeds = [split(build(TIED), ties="together", seed=seed) for seed in range(5)]
    assert len({data.fingerprint for data in seeds}) == 1
    data = seeds[0]
    assert external(data.train) == [(1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1)]
    assert external(data.valid) == [(1, 2), (1, 3), (3, 2)]
    assert external(data.test) == [(1, 4), (3, 3)]  # item 5 occurs nowhere else
    assert "1 user with fewer than 3 different times is in training only" in data.notes.lines()
    assert data.notes.ties is None


def test_chance_is_counted_where_times_are_equal() -> None:
    data = split(build(TIED), seed=7)
    assert data.notes.ties == Ties(users=3, test=2, any=2, seed=7)
    counted = last_ties(build(TIED))
    assert counted is not None
    assert (counted.users, counted.last, counted.last_two) == (3, 2, 2)
    before = [(1, 1, 1), (1, 2, 2), (1, 3, 2), (1, 4, 3)]  # the two before the last one are not determined
    assert split(build(before)).notes.ties == Ties(users=1, test=0, any=1, seed=0)
    assert data.notes.lines()[2] == (
        "chance decides which interaction is tested for 2 of 3 users (67%): they have several at the same time, and "
        "data.seed=7 chooses (data.ties=together keeps them together)"
    )
    assert split(build(ROWS)).notes.ties == Ties(3, 0, 0, 0)
    assert not any("chance" in line for line in split(build(ROWS)).notes.lines())


@pytest.mark.parametrize(
    ("times", "expected"),  # of ten interactions, 8 train and 1 validates without ties
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [8, 1, 1]),
        ([0, 1, 2, 3, 4, 5, 6, 7, 7, 9], [7, 2, 1]),  # the limit at 8 is as near to 7 as to 9
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], [8, 0, 2]),
        ([0, 1, 2, 3, 4, 4, 4, 4, 4, 9], [9, 0, 1]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [10, 0, 0]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 9], [10, 0, 0]),  # fewer than 3 different times
        ([0, 0, 0, 0, 0, 0, 0, 0, 8, 9], [8, 1, 1]),
    ],
)
def test_a_ratio_with_the_same_time_together(times: list[int], expected: list[int]) -> None:
    rows = [(1, i, t) for i, t in enumerate(times)]
    assert [len(part) for part in built(rows, how="ratio", ties="together")] == expected


def test_global_time_by_dates_and_by_shares() -> None:
    rows = [(u, i, 10 * i + u) for u in range(1, 4) for i in range(10)]
    by_times = built(rows, how="global-time", valid_from=51, test_from=72)
    assert by_times == [
        [(u, i) for u, i, t in rows if t < 51],
        [(u, i) for u, i, t in rows if 51 <= t < 72],
        [(u, i) for u, i, t in rows if t >= 72],
    ]
    days = [(u, i, 86400 * i) for u in range(3) for i in range(10)]
    dated = built(days, valid_from="1970-01-06", test_from="1970-01-08T00:00:00+00:00")
    assert dated == built(days, valid_from=5 * 86400, test_from=date(1970, 1, 8))
    assert [len(part) for part in dated] == [15, 6, 9]
    data = split(build(rows), "global-time", ratio=(0.5, 0.25, 0.25))
    assert parts(data) == [15, 7, 8]  # limits at row 15 and at row 22.5, rounded to 22
    assert data.notes.how == (
        "global-time 0.5:0.25:0.25, validation from 1970-01-01 00:00:51, test from 1970-01-01 00:01:12"
    )


def test_folds_are_a_partition() -> None:
    interactions, _ = synthetic(users=40, items=30, clusters=2, interactions_per_user=7)
    folds = [split(interactions, folds=4, fold=fold, seed=5) for fold in range(4)]
    tested = [data.notes.test.interactions for data in folds]
    assert sum(tested) == interactions.n_interactions
    assert max(tested) - min(tested) < 0.1 * interactions.n_interactions
    seen = [set(external(data.test)) for data in folds]
    assert sum(map(len, seen)) == len(set.union(*seen))
    for data in folds:
        degrees = dict(zip(interactions.user_ids, interactions.degrees, strict=True))
        kept = data.train.degrees + data.valid.degrees
        fourth = np.array([degrees[user] for user in data.train.user_ids]) / 4
        assert (np.abs(kept - 3 * fourth) < 1).all()
        assert (data.valid.degrees <= 1).all()
    assert "fold 1 of 4 at random (seed 5)" in folds[1].notes.how
    assert split(interactions, folds=4, seed=6).fingerprint != split(interactions, folds=4, seed=5).fingerprint


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 12), st.integers(0, 5)), min_size=1, unique_by=lambda row: row[:2]
    ),
    options=st.sampled_from(
        [
            {},
            {"ties": "together"},
            {"how": "ratio"},
            {"how": "ratio", "ties": "together"},
            {"how": "ratio", "ratio": (0.3, 0.3, 0.4), "ties": "together"},
            {"how": "global-time"},
            {"how": "global-time", "valid_from": 2, "test_from": 4},
            {"folds": 3, "fold": 1},
            {"order": "random"},
        ]
    ),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_what_holds_of_every_split(rows: list[tuple[int, int, int]], options: dict[str, Any], seed: int) -> None:
    try:
        data = split(build(rows), seed=seed, **options)
    except DataError as error:
        assert "no interaction" in str(error) or "holds no interactions" in str(error)  # noqa: PT017
        return
    time = {(user, item): t for user, item, t in rows}
    train, valid, test = (external(part) for part in (data.train, data.valid, data.test))
    left_out = data.notes.valid.left_out + data.notes.test.left_out
    assert len({*train, *valid, *test}) == len(train) + len(valid) + len(test) == len(rows) - left_out
    times = [[time[row] for row in part] for part in (train, valid, test)]
    if options.get("how") == "global-time":
        for early, late in ((times[0], times[1]), (times[1], times[2]), (times[0], times[2])):
            assert not early or not late or max(early) < min(late)
    elif "folds" not in options and options.get("order") != "random":
        for early, late in ((train, valid), (valid, test), (train, test)):
            for user, item in early:
                later = [time[row] for row in late if row[0] == user]
                assert not later or time[user, item] <= min(later)
                if options.get("ties") == "together":
                    assert time[user, item] not in later
    joined = split(build(rows), seed=seed, train_on_valid=True, **options)
    assert joined.notes.trained_on_valid == data.notes.valid.interactions
    assert joined.valid.n_interactions == 0
    assert set(external(joined.train)) >= {*train, *valid}  # and validation interactions with items of its own
    assert set(external(joined.test)) >= set(test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "leave-one-out", "ratio": (0.8, 0.1, 0.1)}, "ratio changes nothing with split leave-one-out"),
        ({"how": "ratio", "folds": 5}, "folds changes nothing with split ratio; it belongs to folds"),
        ({"fold": 1}, "fold changes nothing with split leave-one-out"),
        ({"folds": 1}, "at least 2, got 1"),
        ({"how": "folds"}, "needs the number of folds"),
        ({"folds": 5, "fold": 5}, "fold must be from 0 to 4, got 5"),
        ({"how": "global-time", "valid_from": 5}, "either ratio, or both valid_from and test_from"),
        ({"valid_from": 5, "test_from": 6, "ratio": (0.8, 0.1, 0.1)}, "either ratio, or both"),
        ({"valid_from": 7, "test_from": 6}, "must not be later than test_from"),
        ({"valid_from": "May", "test_from": 6}, "valid_from is 'May'; expected a date such as 2015-01-31"),
        ({"valid_from": 0, "test_from": 6}, "no interaction is before 1970-01-01 00:00:00, where validation starts"),
        ({"how": "global-time", "order": "random"}, "expected no order random"),
        ({"order": "random", "ties": "together"}, "belongs to leave-one-out and ratio by time"),
        ({"folds": 3, "ties": "together"}, "belongs to leave-one-out and ratio by time"),
        ({"ties": "togethr"}, "did you mean together"),
        ({"seed": -1}, "at least 0, got -1"),
    ],
)
def test_options_that_are_wrong_or_change_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(build(ROWS), **options)


def test_splits_by_time_need_times() -> None:
    frame = pl.DataFrame(ROWS, schema=["user", "item", "timestamp"], orient="row").drop("timestamp")
    untimed = Interactions.from_frame(frame)
    with pytest.raises(DataError, match="expected another split than global-time"):
        split(untimed, "global-time", order="auto")
    with pytest.raises(DataError, match="expected no ties together"):
        split(untimed, order="auto", ties="together")
    assert split(untimed, order="auto").notes.how == "leave-one-out in random order (seed 0)"


@pytest.mark.real_data
def test_ties_of_movielens_100k(real_data: Callable[[str], Path]) -> None:
    interactions = Interactions.from_frame(read(real_data("ml-100k") / "u.data"))
    seeds = [split(interactions, seed=seed) for seed in (0, 1)]
    assert seeds[0].notes.ties == Ties(users=943, test=415, any=599, seed=0)
    counted = last_ties(interactions)
    assert counted is not None
    assert (counted.last, counted.last_two) == (415, 599)
    first, second = (dict(zip(*data.test.frame().select("user", "item"), strict=True)) for data in seeds)
    assert sum(first.get(user) != second.get(user) for user in {*first, *second}) == 271
    together = [split(interactions, ties="together", seed=seed) for seed in (0, 1)]
    assert together[0].fingerprint == together[1].fingerprint
    assert together[0].notes.test.interactions == 2148
    data = split(interactions, "global-time")
    assert [data.notes.valid.interactions, data.notes.test.interactions] == [10001, 10000]


@pytest.mark.parametrize(
    "options",
    [{}, {"how": "ratio", "ties": "together"}, {"how": "ratio"}, {"how": "global-time"}, {"train_on_valid": True}],
)
def test_blocks_of_users_and_files_change_no_split(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    users, items, times = (rng.integers(size, size=900) for size in (80, 70, 30))
    data = Interactions.from_rows(np.arange(80), np.arange(70), users, items, times)
    whole = split(data, **options)
    monkeypatch.setattr(interactions, "ROWS_AT_ONCE", 37)
    monkeypatch.setattr(mapped, "IN_MEMORY", 0)
    again = split(data, **options)
    assert again.fingerprint == whole.fingerprint
    assert again.notes == whole.notes
    for part, other in ((again.train, whole.train), (again.valid, whole.valid), (again.test, whole.test)):
        assert np.array_equal(part.timestamps, other.timestamps)


def test_the_parts_are_those_of_rows_in_any_order() -> None:
    rng = np.random.default_rng(5)
    users, items = rng.integers(60, size=300), rng.integers(90, size=300)
    data = Interactions.from_rows(np.arange(60), np.arange(90), users, items)
    part = rng.integers(3, size=data.n_interactions).astype(np.int8)
    rows = [Rows(data.users_of_rows()[part == p], data.items[part == p], None) for p in range(3)]
    wanted, found = assemble("data", data.user_ids, data.item_ids, rows, "so"), parted("data", data, part, "so")
    assert found.fingerprint == wanted.fingerprint
    assert found.notes == wanted.notes
    assert wanted.notes.valid.unknown_items > 0
