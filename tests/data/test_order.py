"""The order of a user's interactions outlives reading, preparing, splitting and writing."""

from pathlib import Path

import numpy as np
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Dataset, Interactions, load, write

ITEMS = {u: [(u + i) % 9 + 100 for i in range(6)] for u in range(9)}


def lines(part: slice) -> str:
    """Some items of each user, as a file of sequences."""
    return "".join(f"{u}:{' '.join(map(str, items[part]))}\n" for u, items in ITEMS.items())


def in_order(part: Interactions) -> dict[int, list[int]]:
    """The items of each user, oldest first."""
    order = part.in_order()
    assert order is not None
    items, users = part.item_ids[part.items[order]], part.user_ids[part.users_of_rows()[order]]
    return {int(u): items[users == u].tolist() for u in part.user_ids}


def test_the_last_item_is_tested_and_the_one_before_validates(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text(lines(slice(None)))
    data = load(tmp_path / "all.txt", k_core=1)
    assert in_order(data.train) == {u: items[:4] for u, items in ITEMS.items()}
    assert in_order(data.valid) == {u: items[4:5] for u, items in ITEMS.items()}
    assert in_order(data.test) == {u: items[5:] for u, items in ITEMS.items()}


def test_training_and_test_files_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(lines(slice(0, 5)))
    (tmp_path / "test.txt").write_text(lines(slice(5, None)))
    data = load(tmp_path)
    assert "validation: the last interaction in the file of each user" in data.notes.how
    assert not data.notes.drawn
    assert in_order(data.train) == {u: items[:4] for u, items in ITEMS.items()}
    assert in_order(data.valid) == {u: items[4:5] for u, items in ITEMS.items()}
    assert in_order(data.test) == {u: items[5:] for u, items in ITEMS.items()}
    both = load(tmp_path, train_on_valid=True)
    assert in_order(both.train) == {u: items[:5] for u, items in ITEMS.items()}


@pytest.mark.parametrize("more", [("valid",), ()])
def test_the_lines_of_training_and_test_files_may_be_in_order(more: tuple[str, ...], tmp_path: Path) -> None:
    names = ("train", *more, "test")
    cuts = (slice(0, 4), slice(4, 5), slice(5, None)) if more else (slice(0, 5), slice(5, None))
    for name, part in zip(names, cuts, strict=True):
        rows = [f"{user},{item}" for user, items in ITEMS.items() for item in items[part]]
        (tmp_path / f"{name}.csv").write_text("\n".join(["user,item", *rows]))
    assert load(tmp_path).train.in_order() is None
    data = load(tmp_path, order="file")
    assert in_order(data.train) == {u: items[:4] for u, items in ITEMS.items()}
    assert in_order(data.valid) == {u: items[4:5] for u, items in ITEMS.items()}
    assert in_order(data.test) == {u: items[5:] for u, items in ITEMS.items()}
    both = load(tmp_path, order="file", train_on_valid=True)
    assert in_order(both.train) == {u: items[:5] for u, items in ITEMS.items()}


def test_a_validation_file_goes_on_after_the_training_file(tmp_path: Path) -> None:
    for name, part in (("train", slice(0, 4)), ("valid", slice(4, 5)), ("test", slice(5, None))):
        (tmp_path / f"{name}.txt").write_text(lines(part))
    data = load(tmp_path, train_on_valid=True)
    assert in_order(data.train) == {u: items[:5] for u, items in ITEMS.items()}


@pytest.mark.parametrize("format", ["csv", "parquet"])
@pytest.mark.parametrize("how", ["leave-one-out", "users"])
def test_a_prepared_folder_keeps_the_order(tmp_path: Path, format: str, how: str) -> None:
    (tmp_path / "all.txt").write_text(lines(slice(None)))
    data = load(tmp_path / "all.txt", split_how=how)
    again = load(write(data, tmp_path / "set", format))
    assert again.fingerprint == data.fingerprint
    assert again.notes == data.notes
    for part in ("train", "valid", "test") if data.new_users is None else ("train", "new_users"):
        assert in_order(getattr(again, part)) == in_order(getattr(data, part))


def test_another_order_is_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("1:5 6 7 8\n2:6 5 8 7\n")
    (tmp_path / "other.txt").write_text("1:6 5 7 8\n2:6 5 8 7\n")
    one, other = (load(tmp_path / f"{name}.txt") for name in ("one", "other"))
    assert np.array_equal(one.train.items, other.train.items)
    assert one.fingerprint != other.fingerprint


def named(positions: list[str]) -> Dataset:
    table = {"user": [1, 1, 1, 2, 2], "item": [5, 6, 7, 5, 6], "nth": [*positions, "1", "2"]}
    return load(table, columns={"position": "nth"})


def test_a_column_of_positions() -> None:
    assert named(["3", "20", "1"]).test.frame()["item"].to_list() == [6]
    for wrong in ("x", "-1", "1.5", ""):
        with pytest.raises(DataError, match=r"row 2: position is .*expected a whole number from 0 on"):
            named(["3", wrong, "1"])


def test_times_that_are_equal_come_in_an_order_that_is_always_the_same() -> None:
    users, items = np.repeat([0, 1], 4), np.tile(np.arange(4), 2)
    part = Interactions.from_rows(np.arange(2), np.arange(4), users, items, np.array([9, 2, 2, 1, 5, 5, 5, 5]))
    order = part.in_order()
    assert order is not None
    assert order[0] == 3
    assert order[3] == 0
    assert sorted(order[4:].tolist()) == [4, 5, 6, 7]
    assert np.array_equal(order, part.in_order())  # type: ignore[arg-type]
    assert Interactions.from_rows(np.arange(2), np.arange(4), users, items).in_order() is None


def test_places_are_counted_from_the_last() -> None:
    users, items, positions = np.array([0, 0, 0, 2]), np.array([0, 1, 2, 1]), np.array([7, 3, 9, 1])
    part = Interactions.from_rows(np.arange(3), np.arange(3), users, items, positions=positions)
    assert part.from_last().tolist() == [-1, -2, 0, 0]  # type: ignore[union-attr]


def test_an_item_that_is_only_last_stays_in_training_once(tmp_path: Path) -> None:
    """User 1 keeps it or user 2 does; the other users' last items validate."""
    (tmp_path / "train.txt").write_text("1:5 6 9\n2:6 5 9\n3:5 6\n")
    (tmp_path / "test.txt").write_text("1:7\n")
    data = load(tmp_path)
    assert sorted(in_order(data.valid).values()) in ([[5], [6], [9]], [[6], [6], [9]])
    assert data.train.item_ids.tolist() == [5, 6, 9]
