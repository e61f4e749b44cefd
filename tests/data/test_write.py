import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Attributes, Dataset, Interactions, load, split, write


@pytest.fixture
def data() -> Dataset:
    data = load("synthetic:users=30,items=60,clusters=2,interactions_per_user=5")
    values = np.random.default_rng(0).random((data.n_users, 2)).astype(np.float32)
    return replace(data, user_attributes=Attributes(("age", "job=cook"), values))


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_written_data_set_is_read_back(data: Dataset, tmp_path: Path, format: str) -> None:
    folder = write(data, tmp_path / "deep" / "set", format)
    names = {f"{part}.{format}" for part in ("train", "valid", "test")} | {"user_attributes.csv", "split.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    again = load(folder)
    assert again.fingerprint == data.fingerprint
    assert again.notes == data.notes
    assert again.user_attributes is not None
    assert again.user_attributes.names == ("age", "job=cook")
    for part in ("train", "valid", "test"):
        assert np.array_equal(getattr(again, part).timestamps, getattr(data, part).timestamps)


def test_the_report_is_forgotten_when_the_files_change(data: Dataset, tmp_path: Path) -> None:
    folder = write(data, tmp_path / "set")
    assert load(folder).notes.how.startswith("leave-one-out by time")
    lines = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join(lines[:-1]))
    assert load(folder).notes.how == "as given in files"
    for text in ("{}", "no json", '{"fingerprint": "x", "report": {"how": 3}}'):
        (folder / "split.json").write_text(text)
        assert load(folder).notes.how == "as given in files"


@pytest.mark.parametrize(
    "options",
    [
        {"ties": "together"},
        {"ratio": (0.5, 0.3, 0.2)},
        {"split_how": "global-time"},
        {"folds": 3, "fold": 2},
        {"order": "random", "seed": 5},
    ],
)
def test_every_split_is_read_back(tmp_path: Path, options: dict[str, Any]) -> None:
    made = load("synthetic:users=30,items=60,clusters=2,interactions_per_user=8", **options)
    again = load(write(made, tmp_path / "set"))
    assert again.fingerprint == made.fingerprint
    assert again.notes == made.notes
    assert again.notes.lines() == made.notes.lines()


def test_unusual_names_are_read_back(tmp_path: Path) -> None:
    users = np.array(['a,"b"', "c d", "Zoë"], dtype=object)
    rows = Interactions.from_rows(users, np.arange(4), np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3))
    data = split(rows, order="random")
    assert load(write(data, tmp_path / "set")).train.user_ids.tolist() == sorted(users)


def test_an_empty_folder_is_used_and_a_full_one_is_not(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(data, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(DataError, match=f"{name}: exists already and is not an empty folder; nothing was written"):
            write(data, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(DataError, match="unknown format to write 'xlsx': expected one of csv, parquet"):
        write(data, tmp_path / "new", "xlsx")


def test_a_write_that_fails_leaves_no_files(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"new: cannot be written \(the disk is full\)"):
        write(data, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
