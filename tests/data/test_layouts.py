from pathlib import Path

import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import load
from perfedrec.data.layouts import find


def made(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("1\t1\t5\t10\n1\t2\t4\t20\n1\t3\t3\t30\n2\t1\t1\t5\n2\t2\t1\t6\n")
    return folder


@pytest.mark.parametrize(
    ("names", "valid"),
    [
        (["train.txt", "test.txt"], None),
        (["train.tsv", "valid.tsv", "test.tsv"], "valid.tsv"),
        (["training.csv", "validation.csv", "testing.csv"], "validation.csv"),
        (["trn.csv", "val.csv", "tst.csv"], "val.csv"),
        (["train.csv.gz", "dev.csv.gz", "test.csv.gz"], "dev.csv.gz"),
        (["Train.csv", "Test.csv"], None),
        (["ml-1m.train.rating", "ml-1m.test.rating", "ml-1m.test.negative"], None),
        (["ml-100k.train.inter", "ml-100k.valid.inter", "ml-100k.test.inter", "ml-100k.user"], "ml-100k.valid.inter"),
        (["yelp_train.txt", "yelp_test.txt", "readme.txt", "train_old.txt"], None),
        (["train_data.csv", "test_data.csv"], None),
        (["u1.base", "u1.test"], None),
        (["train.txt", "test.txt", "train_small.txt", "ratings.csv", "u.data"], None),
    ],
)
def test_the_usual_names_of_a_split(tmp_path: Path, names: list[str], valid: str | None) -> None:
    found = find(made(tmp_path / "set", *names))
    assert found.whole is None
    assert found.parts["train"].name == names[0]
    assert {found.parts[part].name for part in ("train", "test")} <= set(names)
    assert (found.parts["valid"].name if "valid" in found.parts else None) == valid
    assert found.name == "set"


def test_one_of_several_splits_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "ml", "u1.base", "u1.test", "ua.base", "ua.test")
    with pytest.raises(DataError, match=r"ml: holds the splits u1, ua; expected one of them: .*ml/u1"):
        find(folder)
    assert {part: path.name for part, path in find(folder / "ua").parts.items()} == {
        "train": "ua.base",
        "test": "ua.test",
    }
    data = load(folder / "u1")
    assert data.name == "u1"
    assert data.notes.how.startswith("training and test as given in files; validation: one random")
    alone = load(folder / "u1.base")
    assert "only u1.base is read, and split; name the folder to use u1.test too" in alone.notes.remarks
    made(folder, "u.data")
    whole = find(folder)
    assert whole.whole == folder / "u.data"
    assert whole.remarks == (f"not used: the given splits u1, ua; name one as {folder}/u1",)
    with pytest.raises(DataError, match=r"u9: no such file"):
        load(folder / "u9")


def test_negatives_that_come_with_a_split_are_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "ncf", "ml-1m.train.rating", "ml-1m.test.rating")
    (folder / "ml-1m.test.negative").write_text("(1,2)\t3\t4\n")
    expected = "ml-1m.test.negative is not used: all items are ranked"
    assert any(line.startswith(expected) for line in load(folder).notes.lines())
    assert any(line.startswith(expected) for line in load(folder / "ml-1m").notes.lines())


def test_a_training_part_alone_is_split(tmp_path: Path) -> None:
    data = load(made(tmp_path / "set", "train.tsv"))
    assert data.notes.how == "leave-one-out by time"
    assert "there is no test file: train.tsv is split" in data.notes.lines()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.txt"], "there is test.txt, missing: train"),
        (["train.txt", "valid.txt"], "there is train.txt, valid.txt, missing: test"),
        (["train.txt", "training.csv", "test.txt"], "holds train.txt and training.csv; expected only one of them"),
        (
            ["a_test.txt", "notes.txt"],
            "expected train and test files.*found a_test.txt, notes.txt; rename the files, or",
        ),
        (["u.data", "ratings.csv"], "expected train and test files by names such as train.txt and test.txt, one of u"),
        (
            ["trainData.txt", "testData.txt"],
            r"; rename trainData.txt and testData.txt, or give them with --train \S+/set",
        ),
        (["trainData.csv", "testData.csv", "a.csv"], r"with --train \S+/trainData.csv --test \S+/testData.csv$"),
        (
            ["learn.txt", "check.txt"],
            "found check.txt, learn.txt; rename the files, or give them with --train and --te",
        ),
        (
            ["stars.csv", "README"],
            "found README, stars.csv; if this is the data, name the file itself: .*/set/stars.csv$",
        ),
        (["README"], "or one .inter file; found README$"),
    ],
)
def test_folders_that_do_not_decide(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(made(tmp_path / "set", *names))


def test_attributes_are_errors_only_where_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{i}::4::{i}\n" for u in range(1, 4) for i in range(1, 6)))
    (tmp_path / "users.dat").write_text("this is something else\n")
    data = load(tmp_path)
    assert data.user_attributes is None
    assert any(
        "the user attributes are left out, because they cannot be read" in line and "users.dat" in line
        for line in data.notes.lines()
    )
    assert load(tmp_path, attributes=False).notes.lines()[-1].startswith("each pair of user and item once")
    with pytest.raises(DataError, match=r"users\.dat"):
        load(tmp_path, attributes=True)
