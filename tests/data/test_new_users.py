"""Users who are held out from training as a whole (split "users")."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.core.errors import DataError
from perfedrec.data import Catalogue, Dataset, Interactions, load, split, write

DATA = "synthetic:users=40,items=30,clusters=2,interactions_per_user=6"


def build(rows: list[tuple[int, int, int]]) -> Interactions:
    return Interactions.from_frame(pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"))


def external(part: Interactions | None) -> list[tuple[Any, int]]:
    assert part is not None
    return part.frame().select("user", "item").rows()


def held(data: Dataset) -> list[int]:
    assert data.new_users is not None
    return data.new_users.user_ids.tolist()


def with_held_out(users: list[int], **options: Any) -> Dataset:
    """The split by the first seed that holds out exactly these users."""
    made = (split(build(ROWS), test_users=0.4, seed=seed, **options) for seed in range(1000))
    return next(data for data in made if held(data) == users)


#: Users 1 to 4 have the items 5, 6, 7 in this order of time, and user 2 another one at last, which nobody else has.
#: User 5 has 5 and 9.
ROWS = [(user, item, 10 * user + item) for user in (1, 2, 3, 4) for item in (5, 6, 7)]
ROWS += [(2, 8, 100), (5, 5, 60), (5, 9, 61)]


def test_held_out_users_are_tested_by_their_last_interaction_with_an_item_of_training() -> None:
    """Validation takes the last interaction of users 3, 4 and 5, but never the earliest one of an item."""
    data = with_held_out([1, 2])
    assert external(data.train) == [(3, 5), (3, 6), (3, 7), (4, 5), (4, 6), (5, 9)]
    assert external(data.valid) == [(4, 7), (5, 5)]
    assert external(data.new_users) == [(1, 5), (1, 6), (2, 5), (2, 6)]
    assert external(data.test) == [(1, 7), (2, 7)]
    assert data.tested_users is data.new_users
    assert data.new_users.timestamps is not None
    assert data.new_users.timestamps.tolist() == [15, 16, 25, 26]
    seed = data.notes.how.partition("(seed ")[2].partition(")")[0]
    assert data.notes.lines() == [
        f"split: users: 40% of all users are held out, drawn at random (seed {seed}); tested: the last interaction by "
        "time of each of them; validation: the last interaction by time of each other user who has two or more",
        "2 users are held out from training, and tested as new users with 4 known interactions",
        "validation is on users of training: the best round is chosen by them, not by new users",
        "1 known interaction of held-out users is left out: the items never occur in training",
        "training has interactions that are later than tested ones (none with data.split=global-time)",
    ]
    assert data.notes.chance == f"the split is random: {data.notes.how}"


def test_a_held_out_user_with_one_item_of_training_is_counted_and_not_tested() -> None:
    data = with_held_out([1])  # and user 5, whose item 9 nobody else has
    assert 5 not in data.train.user_ids
    assert external(data.test) == [(1, 7)]
    assert data.notes.new_users is not None
    assert data.notes.new_users.short_users == 1
    assert (
        "1 more user was held out and cannot be tested: fewer than 2 of their interactions are with items of training"
        in data.notes.lines()
    )


def test_the_order_may_be_that_of_the_file_or_random() -> None:
    frame = build(ROWS).frame().with_columns(position=-pl.col("timestamp"))
    placed = Interactions.from_frame(frame.drop("timestamp"))
    first = next(
        made for seed in range(1000) if held(made := split(placed, order="file", test_users=0.4, seed=seed)) == [1, 2]
    )
    assert external(first.test) == [(1, 5), (2, 5)]
    assert "tested: the last interaction in the file" in first.notes.how
    drawn = [external(with_held_out([1, 2], order="random").test)]
    drawn += [
        external(made.test)
        for seed in range(300)
        if held(made := split(build(ROWS), order="random", test_users=0.4, seed=seed)) == [1, 2]
    ]
    assert {pairs[0][1] for pairs in drawn} == {5, 6, 7}


@pytest.mark.parametrize(("share", "expected"), [(None, 4), (0.1, 4), (0.25, 10), (0.001, 1), (0.999, 39)])
def test_the_share_of_users_is_rounded_and_somebody_is_on_each_side(share: float | None, expected: int) -> None:
    whole = load(DATA).train
    rows = Interactions.from_rows(
        whole.user_ids, np.arange(3), np.repeat(np.arange(whole.n_users), 3), np.tile(np.arange(3), whole.n_users)
    )
    data = split(rows, "users", order="random", test_users=share)
    assert len(held(data)) == expected
    assert data.n_users == 40 - expected


pairs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(0, 4)), min_size=8, max_size=50)


@settings(max_examples=60, deadline=None)
@given(pairs, st.integers(0, 5), st.floats(0.05, 0.9), st.sampled_from(["time", "random"]))
def test_held_out_users_share_nothing_with_training(
    rows: list[tuple[int, int, int]], seed: int, share: float, order: str
) -> None:
    interactions = build(rows)
    try:
        data = split(interactions, order=order, seed=seed, test_users=share)
    except DataError:
        return
    assert data.new_users is not None
    assert data.notes.new_users is not None
    known, tested = external(data.new_users), external(data.test)
    trained = external(data.train) + external(data.valid)
    assert not {user for user, _ in trained} & {user for user, _ in known + tested}
    assert not set(known) & set(tested)
    assert {user for user, _ in known} == {user for user, _ in tested} == set(held(data))
    assert data.test.degrees.tolist() == [1] * len(held(data))
    assert set(trained) | set(known) | set(tested) <= set(external(interactions))
    assert {item for _, item in known + tested} <= {item for _, item in external(data.train)}
    assert data.n_users + len(held(data)) + data.notes.new_users.short_users == interactions.n_users
    whole, sizes = dict(zip(interactions.user_ids, interactions.degrees, strict=True)), data.train.degrees
    for user, size, valid in zip(data.train.user_ids, sizes, data.valid.degrees, strict=True):
        assert size + valid == whole[user]
    if order == "time":
        when = {(user, item): at for user, item, at in interactions.frame().rows()}
        for user, item in tested:
            assert when[user, item] >= max(when[pair] for pair in known if pair[0] == user)


@settings(max_examples=30, deadline=None)
@given(pairs, st.permutations(range(50)))
def test_neither_the_order_of_rows_nor_the_numbers_of_ids_change_the_split(
    rows: list[tuple[int, int, int]], order: list[int]
) -> None:
    """Ids keep their order; times differ, so that chance decides nothing but who is held out."""
    rows = [(user, item, place) for place, (user, item, _) in enumerate(dict.fromkeys((u, i, 0) for u, i, _ in rows))]
    moved = [(3 * user + 7, 2 * item + 1, at) for user, item, at in rows]
    shuffled = [moved[place] for place in order if place < len(moved)]
    try:
        first = split(build(rows), test_users=0.3, seed=1)
    except DataError:
        with pytest.raises(DataError):
            split(build(shuffled), test_users=0.3, seed=1)
        return
    again = split(build(shuffled), test_users=0.3, seed=1)
    for part in ("train", "valid", "test", "new_users"):
        expected = [(3 * user + 7, 2 * item + 1) for user, item in external(getattr(first, part))]
        assert external(getattr(again, part)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_users": 0.0}, "test_users must be a share of users between 0 and 1, such as 0.1, got 0.0"),
        ({"test_users": 1.0}, "test_users must be a share of users between 0 and 1"),
        ({"how": "ratio", "test_users": 0.1}, "test_users changes nothing with split ratio; it belongs to users"),
        ({"how": "users", "ratio": (0.8, 0.1, 0.1)}, "ratio changes nothing with split users"),
        ({"how": "users", "ties": "together"}, "ties together changes nothing here"),
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(build(ROWS), **options)


def test_data_in_which_nobody_can_be_held_out_are_refused() -> None:
    with pytest.raises(DataError, match=r"split users needs at least 2 users: some for training.*; there is 1"):
        split(build([(1, 1, 1), (1, 2, 2)]), "users")
    with pytest.raises(DataError, match=r"no held-out user has 2 interactions with items of training \(1 user tried\)"):
        split(build([(1, 1, 1), (1, 2, 2), (2, 3, 1), (2, 4, 2)]), "users")


# --- files ---


@pytest.mark.parametrize("format", ["csv", "parquet"])
@pytest.mark.parametrize("order", ["time", "random"])
def test_held_out_users_are_written_and_read_back(tmp_path: Path, format: str, order: str) -> None:
    made = load(DATA, test_users=0.2, order=order, seed=3)
    folder = write(made, tmp_path / "set", format)
    assert (folder / f"new_users.{format}").is_file()
    again = load(folder)
    assert again.fingerprint == made.fingerprint != load(DATA).fingerprint
    assert again.notes == made.notes
    for part in ("train", "valid", "test", "new_users"):
        assert external(getattr(again, part)) == external(getattr(made, part))
    (folder / "split.json").unlink()
    lines = load(folder).notes.lines()
    counts = made.notes.new_users
    assert counts is not None
    assert f"{counts.users} users are held out from training, and tested as new users with" in " ".join(lines)


def given_files(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.csv").write_text("user,item\n" + "".join(f"{pair}\n" for pair in text.split()))
    return folder


def test_files_of_new_users_that_others_wrote_are_checked(tmp_path: Path) -> None:
    """User d has no known interactions, user c an item that nobody has in training."""
    folder = given_files(tmp_path, train="a,1 a,2 b,1 b,3", test="c,1 d,1", new_users="c,2 c,9")
    data = load(folder)
    assert (external(data.new_users), external(data.test)) == ([("c", 2)], [("c", 1)])
    lines = data.notes.lines()
    assert "1 user is held out from training, and tested as a new user with 1 known interaction" in lines
    assert "1 known interaction of held-out users is left out: the items never occur in training" in lines
    assert (
        "test: 1 of 2 interactions are left out of evaluation (1 user without known interactions and 0 items never "
        "occur in training, 0 interactions occur in an earlier part too)" in lines
    )
    given_files(tmp_path, new_users="a,2 c,2")
    with pytest.raises(DataError, match="new_users and training have 1 user in common"):
        load(folder)
    given_files(tmp_path, new_users="c,9")
    with pytest.raises(DataError, match="no held-out user has known interactions with items of training"):
        load(folder)
    (tmp_path / "new_users.tsv").write_text("c\t2\n")
    with pytest.raises(DataError, match=r"holds new_users.csv and new_users.tsv; expected only one"):
        load(folder)


# --- data sets ---


def test_a_data_set_says_that_users_are_held_out(tmp_path: Path) -> None:
    data = load(DATA, split_how="users")
    assert repr(data).endswith("; 4 held-out users>")
    without = data.without_test()
    assert without.new_users is None
    assert without.test.n_interactions == 0
    with pytest.raises(DataError, match="new users must not occur in training; "):
        Dataset("x", data.train, data.valid, data.valid, data.notes, new_users=data.train)


def test_a_federation_refuses_held_out_users() -> None:
    data = load(DATA, split_how="users")
    with pytest.raises(DataError, match=r"users are held out from training .*which a federation cannot do"):
        Catalogue.of(data)
    with pytest.raises(DataError, match="users are held out from training"):
        Catalogue.of(load(DATA)).number(data)
