"""Relations between users: how they are read, what is left out, and what a method without them says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from perfedrec import DataError, configure, load, open_run, train
from perfedrec.cli import app
from perfedrec.data import Relations, read_relations

IDS = np.array([1, 2, 3, 7])
TRUST = "1 2 1\n2 1 1\n1 7 0.5\n3 3 1\n9 1 1\n1 2 1\n2 7 0\n"
INTERACTIONS = "\n".join(f"{user} {item} 1" for user in (1, 2, 3, 7) for item in range(user, user + 5))


def pairs(relations: Relations) -> list[tuple[int, int]]:
    return list(zip(relations.sources.tolist(), relations.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trust.txt", TRUST),
        ("trust.tsv", TRUST.replace(" ", "\t")),
        ("trust.csv", "follower,followee,weight\n" + TRUST.replace(" ", ",")),
    ],
)
def test_a_file_of_relations(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    relations, lines = read_relations(tmp_path / name, IDS)
    assert pairs(relations) == [(0, 1), (0, 3), (1, 0)]  # places among the users of training, each pair once
    assert relations.facts() == {"relations": 3, "mutual": 2, "users": 3}
    assert lines[0].endswith("3 relations, 2 of them mutual, between 3 of 4 users")
    left = (
        "1 with a weight that is not above 0; 1 with a user who is not in training; 1 of a user with itself; 1 repeated"
    )
    assert lines[1].endswith(f"left out of 7 relations: {left}")


def test_two_columns_are_enough_and_ids_may_be_names(tmp_path: Path) -> None:
    (tmp_path / "friends.csv").write_text("ann;bob\nbob;carl\n")
    relations, lines = read_relations(tmp_path / "friends.csv", np.array(["ann", "bob", "carl"], dtype=object))
    assert pairs(relations) == [(0, 1), (1, 2)]
    assert len(lines) == 1


def test_a_data_frame_of_relations() -> None:
    frame = pl.DataFrame({"from": [1, 2], "to": [7, 3], "trust": [1.0, 0.0], "since": ["a", "b"]})
    assert pairs(read_relations(frame, IDS)[0]) == [(0, 3)]
    with pytest.raises(DataError, match="has 1 column; expected two users"):
        read_relations(frame.select("from"), IDS)
    with pytest.raises(DataError, match="relations, row 1: weight is 'a'; expected a number"):
        read_relations(frame.select("from", "to", "since"), IDS)


def test_names_in_one_column_and_numbers_in_the_other(tmp_path: Path) -> None:
    (tmp_path / "trust.txt").write_text("ann 2\n1 3\n")
    assert pairs(read_relations(tmp_path / "trust.txt", IDS)[0]) == [(0, 2)]


@pytest.mark.parametrize("source", [[(1, 2)], {1: 2}])
def test_relations_of_another_type_are_refused(source: Any, folder: Path) -> None:
    with pytest.raises(DataError, match=f"relations: got {type(source).__name__}; expected a file, or a data frame"):
        load(folder / "ratings.txt", relations=source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3\n", "line 2: has 1 column; expected 2 as in the first line; a line is `user user` or"),
        ("1\n2\n", "trust.txt: has one column; expected two users a line, `user user` or `user user weight`$"),
        ("1,\n2,3\n", "line 1: second user is missing; expected an id; a line is"),
        ("ann bob\n", r"no relation between users of training is left of 1 \(1 with a user who is not in training\)"),
        ("1 2 trusts\n2 1 trusts\n", "weight is 'trusts'; expected a number; a line is `user user` or"),
    ],
)
def test_a_broken_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trust.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_relations(tmp_path / "trust.txt", IDS)


@pytest.mark.parametrize("bad", [([0, 1], [1, 4]), ([1, 0], [2, 1]), ([0, 0], [1, 1]), ([2], [2]), ([-1], [2])])
def test_relations_are_ascending_pairs_of_different_users(bad: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError, match="ascending pairs of different users below 4"):
        Relations(4, *(np.array(each) for each in bad))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ratings.txt").write_text(INTERACTIONS)
    (tmp_path / "trust.txt").write_text(TRUST)
    return tmp_path


def test_a_data_set_with_relations(folder: Path) -> None:
    plain, social = load(folder / "ratings.txt"), load(folder / "ratings.txt", relations=folder / "trust.txt")
    assert plain.relations is None
    assert social.relations is not None
    assert pairs(social.relations) == [(0, 1), (0, 3), (1, 0)]
    assert social.fingerprint != plain.fingerprint
    forgotten = social.without_users([2]).relations  # as if the user had never been there
    assert forgotten is not None
    assert pairs(forgotten) == [(0, 3)]
    assert any("3 relations" in line for line in social.notes.lines())
    config = configure("sept", overrides=[f"data.path={folder / 'ratings.txt'}", f"data.relations={folder}/trust.txt"])
    assert social.origin is not None
    assert social.origin["relations"] == config.data.relations == str(folder / "trust.txt")


@pytest.mark.parametrize("name", ["sept", "mhcn"])
def test_a_social_method_without_relations_is_refused_before_anything_is_written(name: str, folder: Path) -> None:
    config = configure(name, overrides=["run.rounds=1"])
    with pytest.raises(DataError, match=r"needs relations between users, .* expected data.relations=FILE"):
        train(config.build(), load(folder / "ratings.txt"), config.run, config=config, output=folder / "run")
    assert not (folder / "run").exists()


def test_a_run_finds_the_relations_beside_data_that_have_moved(folder: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name in ("ratings.txt", "trust.txt"):
        (folder / name).rename(old / name)
    config = configure("sept", overrides=["run.rounds=1", "method.embedding_dim=4"])
    data = load(old / "ratings.txt", relations=old / "trust.txt")
    train(config.build(), data, config.run, config=config, output=tmp_path / "run")
    old.rename(new)
    result, opened = open_run(tmp_path / "run", data=new / "ratings.txt")
    assert result.dataset.fingerprint == data.fingerprint
    assert opened.data.relations == str(new / "trust.txt")
    (new / "trust.txt").unlink()
    with pytest.raises(DataError, match=r"old/trust.txt: no such file, and no .*new/trust.txt either"):
        open_run(tmp_path / "run", data=new / "ratings.txt")


def test_data_info_describes_relations(folder: Path) -> None:
    command = ["data", "info", str(folder / "ratings.txt"), "--relations", str(folder / "trust.txt"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["relations"] == {"relations": 3, "mutual": 2, "users": 3}


def test_synthetic_relations_are_mostly_of_the_own_taste() -> None:
    """Of 400 users with 8 relations each, 80 % and a quarter of the others are of the own one of four tastes."""
    spec = "synthetic:users=400,items=200,clusters=4,interactions_per_user=10,seed=3"
    data = load(f"{spec},relations=8")
    assert data.relations is not None
    assert data.truth is not None
    assert np.array_equal(data.train.items, load(spec).train.items)
    sources, targets = data.relations.sources, data.relations.targets
    own = data.truth.user_clusters[sources] == data.truth.user_clusters[targets]
    assert own.mean() == pytest.approx(0.85, abs=0.04)
    assert sources.size == pytest.approx(400 * 8 * 0.97, rel=0.06)  # repeated ones count once
    with pytest.raises(DataError, match="relations is the mean number of each user, above 0, got 0"):
        load(f"{spec},relations=0")
