from pathlib import Path

import numpy as np
import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Dataset, Interactions, from_files, split, synthetic


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
        "1 user with fewer than 3 interactions is in training only",
        "test: 1 of 3 interactions are left out of evaluation (0 users and 1 items never occur in training, "
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
    with pytest.raises(DataError, match="no timestamps to split by; expected order random"):
        split(untimed)


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
    with pytest.raises(DataError, match=r"unknown split 'leave-one'.*did you mean 'leave-one-out'"):
        split(build(ROWS), "leave-one")
    with pytest.raises(DataError, match=r"unknown order 'tme'.*did you mean 'time'"):
        split(build(ROWS), order="tme")


def test_from_files_counts_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"{u} {i} 1\n" for u, i in [(1, 1), (1, 2), (2, 1), (2, 3), (2, 3)]))
    (tmp_path / "valid.txt").write_text("1 3 1\n2 9 1\n7 1 1\n")
    (tmp_path / "test.txt").write_text("1 1 1\n1 3 1\n2 2 1\n2 9 1\n8 8 1\n")
    data = from_files(tmp_path / "train.txt", tmp_path / "valid.txt", tmp_path / "test.txt")
    assert data.name == tmp_path.name
    assert (data.train.user_ids.tolist(), data.train.item_ids.tolist()) == ([1, 2], [1, 2, 3])
    assert external(data.valid) == [(1, 3)]
    assert external(data.test) == [(2, 2)]
    valid, test = data.notes.valid, data.notes.test
    assert (valid.unknown_users, valid.unknown_items, valid.known_pairs, valid.left_out) == (1, 1, 0, 2)
    assert (test.unknown_users, test.unknown_items, test.known_pairs, test.left_out) == (1, 2, 2, 4)
    assert data.notes.duplicates == 1


def test_the_training_file_decides_how_small_files_are_read(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train.txt", "valid.txt", "test.txt")]
    files[0].write_text("0 1 2 3 4\n1 2 3\n2 1 4\n")
    files[1].write_text("0 5 6\n1 1 4\n")  # on its own it could be triples
    files[2].write_text("2 2\n")
    data = from_files(*files)
    assert external(data.valid) == [(1, 1), (1, 4)]
    assert data.notes.valid.unknown_items == 2
    assert external(data.test) == [(2, 2)]


def test_integer_ids_in_one_file_and_names_in_another(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for path, rows in zip(files, ("1,2\nx,2\n1,3\n", "x,3\n", ""), strict=True):
        path.write_text("user,item\n" + rows)
    data = from_files(*files)
    assert data.train.user_ids.tolist() == ["1", "x"]
    assert data.train.item_ids.tolist() == [2, 3]
    assert external(data.valid) == [("x", 3)]
    assert data.test.n_interactions == 0
    with pytest.raises(DataError, match="the training part holds no interactions"):
        from_files(files[2], files[1], files[0])
