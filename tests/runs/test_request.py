"""Where the data of a run come from, as its folder records it, and opening the run again."""

from pathlib import Path

import polars as pl
import pytest

from perfedrec import Interactions, load, open_run, split, synthetic, train
from perfedrec.core.errors import CheckpointError, DataError
from perfedrec.runs.config import MEMORY
from perfedrec.runs.folder import RunFolder

ROWS = [(user, item, 3 + item % 3, 100 * user + item % 4) for user in range(30) for item in range(user % 3, 20, 2)]
FRAME = pl.DataFrame(ROWS, schema=["user", "item", "rating", "timestamp"], orient="row")


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    FRAME.write_csv(tmp_path / "ratings.csv")
    return tmp_path / "ratings.csv"


def test_a_run_on_loaded_data_is_opened_again(ratings: Path, tmp_path: Path) -> None:
    data = load(
        ratings,
        columns={"user": "user", "item": 2},
        min_rating=4,
        k_core=2,
        ratio=(0.6, 0.2, 0.2),
        ties="together",
        seed=3,
    )
    made = train("item_knn", data, output=tmp_path / "run")
    recorded = RunFolder(tmp_path / "run").config().data
    assert (recorded.path, recorded.columns, recorded.min_rating) == (str(ratings), "user=user,item=2", 4)
    assert (recorded.split, recorded.ratio, recorded.ties, recorded.seed) == ("ratio", (0.6, 0.2, 0.2), "together", 3)
    opened, _ = open_run(tmp_path / "run")
    assert opened.dataset.fingerprint == data.fingerprint
    assert opened.evaluate() == made.evaluate()
    train("popularity", "synthetic:users=40,items=30,clusters=2,interactions_per_user=5", output=tmp_path / "named")
    assert open_run(tmp_path / "named")[0].dataset.n_users == 40


def test_a_run_on_files_of_a_split_is_opened_again(tmp_path: Path) -> None:
    for name, rows in (("a", FRAME), ("b", FRAME.tail(9))):
        rows.write_csv(tmp_path / f"{name}.csv")
    data = load(train=tmp_path / "a.csv", test=tmp_path / "b.csv")
    train("popularity", data, output=tmp_path / "run")
    assert open_run(tmp_path / "run")[0].dataset.fingerprint == data.fingerprint


@pytest.mark.parametrize("kind", ["data set", "frame", "interactions"])
def test_a_run_on_data_in_memory_says_so_and_is_opened_with_the_data(tmp_path: Path, kind: str) -> None:
    interactions = Interactions.from_frame(FRAME)
    data = {"data set": split(interactions, seed=4), "frame": FRAME, "interactions": interactions}[kind]
    made = train("item_knn", data, output=tmp_path / "run")
    assert RunFolder(tmp_path / "run").config().data.path == MEMORY
    with pytest.raises(DataError, match=r"given in Python and are stored nowhere; expected --data .*open_run\(fol"):
        open_run(tmp_path / "run")
    assert open_run(tmp_path / "run", data=data)[0].evaluate() == made.evaluate()
    other, _ = synthetic(users=30, items=20, clusters=2, interactions_per_user=5)
    with pytest.raises(CheckpointError, match=r"with another data set than data.*; expected --data with the"):
        open_run(tmp_path / "run", data=other)


def test_data_in_memory_are_split_as_the_options_say_also_when_the_run_is_opened(ratings: Path, tmp_path: Path) -> None:
    made = train("popularity", FRAME, data__ratio=(0.5, 0.25, 0.25), output=tmp_path / "run")
    assert made.dataset.notes.how == "ratio 0.5:0.25:0.25 by time"
    for data in (FRAME, str(ratings), ratings):
        assert open_run(tmp_path / "run", data=data)[0].dataset.fingerprint == made.dataset.fingerprint


def test_the_summary_of_a_run_says_how_its_data_were_split(tmp_path: Path) -> None:
    data = split(Interactions.from_frame(FRAME), seed=4)
    train("popularity", data, output=tmp_path / "run")
    said = RunFolder(tmp_path / "run").summary().data
    assert said == data.notes.lines()
    assert said[0] == "split: leave-one-out by time"
    assert any("data.seed=4 chooses" in line for line in said)
