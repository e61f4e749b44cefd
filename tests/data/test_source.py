from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perfedrec.core.errors import ConfigError, DataError
from perfedrec.data import Attributes, Dataset, load, synthetic

RATINGS = (
    "user,item,rating,timestamp\n"
    + "".join(
        f"{user},{item},{(user + item) % 5 + 1},{1_700_000_000 + 10 * item}\n"
        for user in range(1, 9)
        for item in range(20)
    )
    + "9,0,5,1700000000\n"
)


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.csv"
    path.write_text(RATINGS)
    return path


@pytest.mark.real_data
def test_yelp_as_given(real_data: Callable[[str], Path]) -> None:
    data = load(real_data("yelp"))
    assert (data.n_users, data.n_items, data.train.n_interactions) == (5224, 7597, 112576)
    assert (data.notes.test.unknown_items, data.notes.test.left_out, data.notes.test.interactions) == (62, 80, 5224)
    assert (data.notes.valid.unknown_items, data.notes.valid.left_out) == (49, 55)
    assert int((data.test.degrees > 0).sum()) == 5144
    assert any("62 items never occur in training" in line for line in data.notes.lines())
    first = data.train.item_ids[data.train.items[: data.train.degrees[0]]]
    assert {842, 2003, 2219} <= set(first.tolist())  # the first lines of train.txt


@pytest.mark.real_data
def test_movielens_100k(real_data: Callable[[str], Path]) -> None:
    data = load(real_data("ml-100k"))
    assert (data.n_users, data.n_items) == (943, 1679)
    assert data.train.n_interactions == 100_000 - 2 * 943
    assert data.user_attributes is not None
    assert data.user_attributes.values.shape == (943, 30)
    assert data.item_attributes is not None
    assert data.item_attributes.values.shape == (1679, 19)
    liked = load(real_data("ml-100k"), min_rating=4, k_core=10)
    assert "rated 4 or more: 942 users, 1,447 items, 55,375 interactions" in liked.notes.lines()
    # the test interaction of a user is never earlier than the training interactions
    times = data.train.timestamps
    assert times is not None
    assert data.test.timestamps is not None
    latest = np.maximum.reduceat(times, data.train.offsets[:-1])
    assert (data.test.timestamps >= latest[data.test.users_of_rows()]).all()


def test_a_single_file_is_split_by_time_where_it_has_timestamps(ratings: Path) -> None:
    data = load(ratings)
    assert data.name == "ratings"
    assert data.notes.lines()[0].startswith('read as csv: user = column 1 "user", item = column 2 "item", rating')
    assert "split: leave-one-out by time" in data.notes.lines()
    assert data.notes.looks_ahead is False  # all users took items at the same times
    assert data.train.item_ids.tolist() == list(range(18))  # all users took items in the order 0 .. 19
    assert data.notes.test.unknown_items == 1
    without = ratings.with_name("pairs.csv")
    without.write_text("\n".join(",".join(line.split(",")[:2]) for line in RATINGS.splitlines()))
    assert "split: leave-one-out in random order (seed 4)" in load(without, seed=4).notes.lines()
    with pytest.raises(DataError, match="expected order random"):
        load(without, order="time")


def test_every_option_matters(ratings: Path) -> None:
    prints = {
        "as it is": load(ratings).fingerprint,
        "min_rating": load(ratings, min_rating=3).fingerprint,
        "random": load(ratings, order="random").fingerprint,
        "seed": load(ratings, order="random", seed=1).fingerprint,
        "how": load(ratings, split_how="ratio").fingerprint,
        "k_core": load(ratings, k_core=2).fingerprint,
        "columns": load(ratings, columns={"user": "item", "item": "user"}).fingerprint,
    }
    assert len(set(prints.values())) == len(prints)
    assert load(ratings, format="csv").fingerprint == prints["as it is"]


def test_an_unknown_option_is_an_error_that_names_the_nearest_one(ratings: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"load\(\) has no option 'k_cor': expected format, .*; did you mean k_core\?"
    ):
        load(ratings, k_cor=2)  # type: ignore[call-arg]


def test_columns_may_be_a_text_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("who,what\n" + "".join(f"a{n % 5},b{n % 7}\n" for n in range(35)))
    named, text = {"user": "who", "item": "what"}, "user=who, item=what"
    for data in (tmp_path / "odd.csv", {"who": ["a", "b", "a"] * 5, "what": [*range(15)]}):
        assert load(data, columns=text).fingerprint == load(data, columns=named).fingerprint
    assert load(tmp_path / "odd.csv", columns=text).origin == load(tmp_path / "odd.csv", columns=named).origin
    with pytest.raises(DataError, match="columns: 'userId' names no column; expected role=column"):
        load(tmp_path / "odd.csv", columns="userId")


def test_a_folder_of_one_file_with_attributes(ratings: Path) -> None:
    (ratings.parent / "item_attributes.csv").write_text("item,kind\n0,a\n1,b\n99,b\n")
    data = load(ratings.parent)
    assert data.name == ratings.parent.name
    assert data.item_attributes is not None
    assert data.item_attributes.values[:3].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert data.user_attributes is None
    assert data.notes.lines()[-2:] == [
        "item_attributes.csv: 16 of 18 items have no attributes and get zeros",
        "item_attributes.csv: 1 item is ignored that is not in the training data",
    ]


def given_split(folder: Path) -> dict[str, Path]:
    paths = {part: folder / f"{part}.csv" for part in ("train", "valid", "test")}
    for path, text in zip(paths.values(), ("1,1\n1,2\n2,1\n", "2,2\n", "1,3\n"), strict=True):
        path.write_text("user,item\n" + text)
    return paths


def test_given_parts_as_a_folder_and_as_files(tmp_path: Path) -> None:
    paths = given_split(tmp_path)
    data = load(tmp_path)
    assert data.fingerprint == load(**paths).fingerprint  # type: ignore[arg-type]
    assert (data.train.n_interactions, data.valid.n_interactions, data.test.n_interactions) == (3, 1, 0)
    assert data.notes.test.unknown_items == 1
    with pytest.raises(DataError, match=r"given are not removed; expected k_core with a single file"):
        load(tmp_path, k_core=2)
    with pytest.raises(DataError, match=r"train.csv: the data have no ratings to compare with min_rating"):
        load(tmp_path, min_rating=3)
    for wrong in ({"train": paths["train"]}, {"test": paths["test"], "valid": paths["valid"]}):
        with pytest.raises(DataError, match=r"either a file, a folder .* or train and test, and valid if there is one"):
            load(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"either a file, a folder .* or train and test"):
        load(tmp_path, **paths)  # type: ignore[arg-type]
    for split in ({"split_how": "ratio"}, {"ratio": (0.8, 0.1, 0.1)}):
        for given in (lambda **options: load(tmp_path, **options), lambda **options: load(**paths, **options)):
            with pytest.raises(DataError, match=r"is split already; expected split ratio with a single file only"):
                given(**split)
    (tmp_path / "valid.txt").write_text("1 2\n")
    with pytest.raises(DataError, match=r"holds valid.csv and valid.txt; expected only one of them"):
        load(tmp_path)
    (tmp_path / "valid.txt").unlink()
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match=r"there is test.csv, valid.csv, missing: train"):
        load(tmp_path)


def test_ratings_below_a_threshold_are_removed_from_all_parts_of_a_given_split(tmp_path: Path) -> None:
    for part, rows in (
        ("train", "1,1,5\n1,2,2\n1,3,4\n2,1,4\n"),
        ("valid", "2,3,4\n2,2,1\n"),
        ("test", "1,2,9\n2,3,3\n"),
    ):
        (tmp_path / f"{part}.csv").write_text("user,item,rating\n" + rows)
    data = load(tmp_path, min_rating=4)
    assert [part.frame().rows() for part in (data.train, data.valid, data.test)] == [
        [(1, 1), (1, 3), (2, 1)],
        [(2, 3)],
        [],  # item 2 is in no training interaction
    ]
    assert "interactions rated below 4 were removed from all parts" in data.notes.lines()


def test_folders_without_a_known_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train and test files by names.*, one of u.data.*; found nothing"):
        load(tmp_path)
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\n" + "".join(f"u\ti{i}\n" for i in range(5)))
    assert load(tmp_path).n_items == 3
    (tmp_path / "b.inter").write_text("")
    with pytest.raises(DataError, match=r"or one .inter file; found a.inter, b.inter"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no data are named; expected a file"):
        load()


def test_synthetic_settings() -> None:
    data = load("synthetic:users=60, items=80,clusters=2,interactions_per_user=8,seed=3,strength=1")
    interactions, truth = synthetic(60, 80, 2, 8, 3, 1.0)
    assert data.train.n_interactions == interactions.n_interactions - 120
    assert data.truth is not None
    rows, items = data.train.users_of_rows(), data.train.items
    assert np.array_equal(data.truth.user_clusters[rows], data.truth.item_clusters[items])
    assert np.array_equal(data.truth.popularity, truth.popularity[data.train.item_ids])
    assert load("synthetic").n_users == 2000
    with pytest.raises(DataError, match=r"unknown setting of synthetic data 'user': .*; did you mean users\?"):
        load("synthetic:user=5")
    with pytest.raises(DataError, match=r"users must be an integer, got '5.5'"):
        load("synthetic:users=5.5")


def test_the_fingerprint_depends_on_the_data_and_nothing_else(tmp_path: Path) -> None:
    given_split(tmp_path)
    first = load(tmp_path)

    def changed(**changes: object) -> str:
        return replace(first, **changes).fingerprint  # type: ignore[arg-type]

    assert changed(name="other") == first.fingerprint
    assert len(first.fingerprint) == 16
    one = Attributes(("a",), np.ones((2, 1), dtype=np.float32))
    others = [
        changed(test=first.valid),
        changed(valid=first.test),
        changed(user_attributes=one),
        changed(item_attributes=one),
        changed(user_attributes=Attributes(("b",), one.values)),
    ]
    (tmp_path / "train.csv").write_text("user,item\n1,1\n1,2\n3,1\n")
    others.append(load(tmp_path).fingerprint)
    assert len({first.fingerprint, *others}) == 7


def test_a_dataset_must_fit_together(tmp_path: Path) -> None:
    given_split(tmp_path)
    first = load(tmp_path)
    second = load("synthetic:users=20,items=40,clusters=2,interactions_per_user=5")
    with pytest.raises(DataError, match=r"must share their user and item ids"):
        Dataset("x", first.train, first.valid, second.test, first.notes)
    with pytest.raises(DataError, match=r"attributes must have 2 rows, got 3"):
        replace(first, user_attributes=Attributes(("a",), np.ones((3, 1), dtype=np.float32)))
