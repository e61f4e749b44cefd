from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import Interactions, Ties, from_files, load
from perfedrec.data.split import validation_rows


def external(part: Interactions) -> list[tuple[int, int]]:
    return part.frame().select("user", "item").rows()


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


def files(folder: Path, train: str, test: str, header: str = "user,item,timestamp\n") -> dict[str, Path]:
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.csv").write_text(header + rows)
    return {name: folder / f"{name}.csv" for name in ("train", "test")}


TRAIN = "1,1,10\n1,2,20\n1,3,30\n2,1,5\n2,2,6\n2,3,7\n3,1,1\n4,3,9\n4,9,9\n"


def test_validation_is_the_last_by_time_where_the_test_is(tmp_path: Path) -> None:
    paths = files(tmp_path, TRAIN, "1,9,40\n2,9,7\n")
    data = load(tmp_path)
    # The first interaction of each item stays in training: (3, 1), (2, 2), (2, 3), (4, 9). User 3 has no other one.
    assert external(data.valid) == [(1, 3), (2, 1), (4, 3)]
    assert external(data.test) == [(1, 9), (2, 9)]
    assert data.notes.how == (
        "training and test as given in files; validation: the last interaction by time of each user who has two or "
        "more in training"
    )
    assert data.fingerprint == load(**paths).fingerprint == load(tmp_path, seed=3).fingerprint  # type: ignore[arg-type]


def test_validation_is_random_where_the_test_is(tmp_path: Path) -> None:
    files(tmp_path, TRAIN, "1,9,25\n2,9,8\n")  # user 1 has a later interaction in training
    seeds = [load(tmp_path, seed=seed) for seed in range(20)]
    assert "one random interaction (seed 0) of each user" in seeds[0].notes.how
    taken = {tuple(external(data.valid)) for data in seeds}
    assert len(taken) > 3
    assert all(sum(user == 1 for user, _ in rows) <= 1 for rows in taken)
    assert external(load(tmp_path, order="time").valid) == [(1, 3), (2, 1), (4, 3)]
    with pytest.raises(DataError, match="expected order time, or no ties together"):
        load(tmp_path, ties="together")
    paths = files(tmp_path, "1,1\n1,2\n2,1\n2,2\n", "1,1\n", "user,item\n")
    untimed = {load(**paths, seed=seed).fingerprint for seed in range(8)}  # type: ignore[arg-type]
    assert len(untimed) > 1


def test_ties_in_validation(tmp_path: Path) -> None:
    files(tmp_path, "1,1,1\n1,2,2\n1,3,2\n2,1,0\n2,2,0\n2,3,0\n", "1,2,3\n2,1,0\n")
    data = load(tmp_path)
    assert data.notes.ties == Ties(users=1, test=0, any=1, seed=0)  # all of user 2 are the first of their items
    assert "chance decides which interactions are held out for 1 of 1 user" in "\n".join(data.notes.lines())
    together = load(tmp_path, ties="together")
    assert external(together.valid) == [(1, 2), (1, 3)]
    assert together.notes.ties is None


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 4)), min_size=1, unique_by=lambda row: row[:2]
    ),
    timed=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_what_holds_of_validation_that_is_taken_from_training(
    rows: list[tuple[int, int, int]], timed: bool, together: bool, seed: int
) -> None:
    users, items, times = (np.array(column) for column in zip(*sorted(rows), strict=True))
    chosen, ties = validation_rows(users, items, times if timed else None, seed, timed and together)
    assert set(users[~chosen]) == set(users)
    assert set(items[~chosen]) == set(items)
    assert (ties is not None) == (timed and not together and chosen.any())
    for user in set(users):
        mine = users == user
        if not (timed and together):
            assert chosen[mine].sum() <= 1
        if timed and chosen[mine].any():
            assert len(set(times[mine & chosen])) == 1


@pytest.mark.real_data
def test_the_test_part_of_yelp_is_the_same_without_its_validation_file(real_data: Callable[[str], Path]) -> None:
    folder = real_data("yelp")
    data, given_files = (
        from_files(folder / "train.txt", valid, folder / "test.txt") for valid in (None, folder / "valid.txt")
    )
    assert (data.n_users, data.n_items) == (given_files.n_users, given_files.n_items)
    assert data.notes.test.left_out == 62 + 18 - (given_files.notes.test.known_pairs - data.notes.test.known_pairs)
    assert data.valid.n_interactions == 5224
    assert data.train.n_interactions + data.valid.n_interactions == given_files.train.n_interactions
    assert "one random interaction (seed 0)" in data.notes.how


def test_validation_is_trained_on_where_that_is_asked_for(tmp_path: Path) -> None:
    paths = files(tmp_path, "1,1,10\n1,2,20\n2,1,5\n", "1,3,40\n2,2,7\n")
    (tmp_path / "valid.csv").write_text("user,item,timestamp\n1,3,30\n2,4,6\n2,1,6\n")
    data = load(tmp_path, train_on_valid=True)
    assert external(data.train) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 4)]  # item 3 is in training now
    assert data.train.timestamps is not None
    assert data.train.timestamps.tolist() == [10, 20, 30, 5, 6]
    assert data.valid.n_interactions == 0
    assert external(data.test) == [(2, 2)]  # (1, 3) is trained on
    assert (data.notes.trained_on_valid, data.notes.duplicates, data.notes.test.known_pairs) == (3, 1, 1)
    assert any(line.startswith("3 validation interactions are trained on") for line in data.notes.lines())
    assert load(tmp_path).notes.trained_on_valid is None
    assert data.origin is not None
    assert data.origin["train_on_valid"] is True
    (tmp_path / "valid.csv").unlink()
    whole = load(**paths, train_on_valid=True)  # type: ignore[arg-type]
    assert external(whole.train) == [(1, 1), (1, 2), (2, 1)]
    assert (whole.valid.n_interactions, whole.notes.trained_on_valid) == (0, 0)
