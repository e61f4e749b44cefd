"""The lists of all users at once, and their vectors, against the lists of one user after another."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from perfedrec import ConfigError, DataError, Node, configure, load
from perfedrec.cli import app
from perfedrec.federation import bulk
from perfedrec.federation.agreement import method_of
from perfedrec.federation.bulk import write_lists, write_vectors
from perfedrec.runtimes.node import Store, StoreError, serving_broadcast
from perfedrec.runtimes.simulator import Simulator

N = 12
SMALL = ["model.embedding_dim=8", "selection.n_clients_per_round=40"]
METHODS = {
    "recommended": [*SMALL, "clusters.n_clusters=3", "clusters.start=1", "clusters.every=2"],
    "fedmf": SMALL,
    "fedncf": SMALL,  # which needs torch
}


def made(method: str, path: Path) -> Path:
    """A node's file with some users after training: half of them with client states, one new, one who has nothing."""
    dataset = load("synthetic:users=60,items=80,clusters=3,interactions_per_user=8,seed=4")
    config = configure(method, overrides=METHODS[method])
    algorithm: Any = config.build()
    simulator = Simulator(algorithm, dataset, seed=5, device="cpu")
    for _ in range(simulator.n_phases + 3):
        simulator.play()
    some = torch.arange(N)
    ids = dataset.train.user_ids[some.numpy()]
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids.tolist()))
    with Store.create(path, dataset.train.item_ids, secret=b"s" * 32) as store:
        store.import_interactions(frame, identities={str(name): place for place, name in enumerate(ids)})
        store.join_run(algorithm, "simulated")
        known = some[: N // 2]
        _, positions = simulator.population.rows(known)
        store.save_client_states(known, positions, simulator.population.load_client_states(known, positions))
        broadcast = serving_broadcast(algorithm, simulator.state, some)
        store.receive(broadcast, some, "simulated", 3, method_of(config), algorithm.inference)
    with Node.open(path) as node:
        first, second = node.users()[:2]
        node.add("new", *(row["item"] for row in node.items_of(first)[:2]))
        node.add("empty", 1)
        node.remove("empty", 1)
        node.dismiss(second, *(row["item"] for row in node.recommend(second, 3)))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("recommended", tmp_path_factory.mktemp("node") / "a.node")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the users do not fill evenly."""
    monkeypatch.setattr(bulk, "BLOCK", 5)


def assert_same_lists(path: Path, found: pl.DataFrame, k: int) -> None:
    with Node.open(path) as node:
        assert found["user"].unique(maintain_order=True).to_list() == node.users()
        for user in node.users():
            rows, mine = node.recommend(user, k), found.filter(pl.col("user") == user)
            assert mine["item"].to_list() == [row["item"] for row in rows], user
            assert mine["rank"].to_list() == [row["rank"] for row in rows]
            expected = np.array([row["score"] for row in rows], dtype=np.float32)
            np.testing.assert_allclose(mine["score"].to_numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_lists_are_those_of_one_user_after_another(
    method: str, template: Path, tmp_path: Path, small_blocks: None
) -> None:
    path = template if method == "recommended" else made(method, tmp_path / "a.node")
    told = list[tuple[int, int]]()
    done = write_lists(path, tmp_path / "lists.parquet", 7, lambda *each: told.append(each))
    found = pl.read_parquet(tmp_path / "lists.parquet")
    assert found.columns == ["user", "item", "rank", "score"]
    assert (done.users, done.rows) == (N + 2, found.height)
    assert told == [(5, 14), (10, 14), (14, 14)]
    assert_same_lists(path, found, 7)
    write_lists(path, tmp_path / "lists.csv", 100)  # more than there are
    assert_same_lists(path, pl.read_csv(tmp_path / "lists.csv", schema_overrides={"user": pl.String}), 100)
    assert (tmp_path / "lists.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("method", ["recommended", "fedmf"])
def test_products_of_vectors_make_the_lists(method: str, template: Path, tmp_path: Path, small_blocks: None) -> None:
    path = template if method == "recommended" else made(method, tmp_path / "a.node")
    done = write_vectors(path, tmp_path / "vectors")
    items, users = (pl.read_parquet(tmp_path / "vectors" / f"{name}.parquet") for name in ("items", "users"))
    assert (done.users, done.groups) == (N + 2, items["group"].n_unique())
    # Those who took part have lists of the neighbourhood service, the new one has none, and one has nothing at all.
    assert (done.groups, done.listed, done.unknown) == ((3, N, 1) if method == "recommended" else (1, 0, 0))
    with Node.open(path) as node:
        for row in users.iter_rows(named=True):
            if done.unknown and row["user"] == "empty":
                assert not any(row["vector"])
                continue
            mine = items.filter(pl.col("group") == row["group"])
            scores = mine["vector"].to_numpy() @ np.array(row["vector"], dtype=np.float32)
            places = {item: place for place, item in enumerate(mine["item"])}
            for each in row["listed"]:
                scores[places[each["item"]]] += each["score"]
            scores[[places[each] for each in row["hidden"]]] = -np.inf
            order = np.argsort(-scores, kind="stable")[:10]
            expected = node.recommend(row["user"], 10)
            assert mine["item"].to_numpy()[order].tolist() == [each["item"] for each in expected]
            np.testing.assert_allclose(scores[order], [each["score"] for each in expected], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_written_leaves_nothing_behind(template: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "lists.parquet").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_lists(template, tmp_path / "lists.parquet", 5, stop)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(template, tmp_path / "vectors", stop)
    with pytest.raises(ConfigError, match=r"expected a name that ends in .parquet or .csv"):
        write_lists(template, tmp_path / "lists.txt", 5)
    with pytest.raises(ConfigError, match="length"):
        write_lists(template, tmp_path / "lists.csv", 0)
    for write, name in (
        (lambda path: write_lists(template, path, 5), "lists.csv"),
        (partial(write_vectors, template), "v"),
    ):
        nowhere = tmp_path / "nowhere" / name
        with pytest.raises(ConfigError) as failed:
            write(nowhere)
        assert str(failed.value).startswith(
            f"{nowhere}: cannot be written (there is no such file or folder); expected a name"
        )
    with pytest.raises(ConfigError, match="exists already"):
        write_vectors(template, tmp_path)
    with Store.create(tmp_path / "b.node", np.arange(3)) as empty:
        path = empty.path
    with pytest.raises(DataError, match="holds no users yet"):
        write_lists(path, tmp_path / "lists.parquet", 5)
    with Node.open(path) as node:
        node.add("ann", 1)
    for write in (
        lambda: write_lists(path, tmp_path / "lists.parquet", 5),
        lambda: write_vectors(path, tmp_path / "v"),
    ):
        with pytest.raises(StoreError, match="has received no model yet"):
            write()
    assert sorted(each.name for each in tmp_path.iterdir() if "node" not in each.name) == ["lists.parquet"]
    assert (tmp_path / "lists.parquet").read_text() == "before"


def test_a_user_who_has_no_vector_is_named(template: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    shutil.copy(template, path)
    with Node.open(path) as node:
        node.add("collector", *(row["item"] for row in node.popular(37)))
    with pytest.raises(ConfigError, match=r"user 'collector' has 37 of 73 items: .* more than half .* node lists"):
        write_vectors(path, tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()


def test_the_commands(template: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    output, folder = tmp_path / "lists.parquet", tmp_path / "vectors"
    done = run(app, ["node", "lists", "--store", str(template), "--output", str(output), "--k", "3"])
    assert (done.exit_code, done.output) == (0, f"{output}: 42 rows for 14 users\n")
    done = run(app, ["node", "vectors", "--store", str(template), "--output", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        f"{folder}: vectors of 14 users, and of all items for 3 groups of users",
        "12 of the users have scores beside their vectors: add those in the column listed",
        "1 of the users are unknown to the model: their vectors are 0, and the node lists what is popular",
    ]


def test_a_signal_ends_a_command_without_an_output(template: Path, tmp_path: Path, small_blocks: None) -> None:
    calls = list[int]()
    before = bulk.rank_block

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "rank_block", interrupted)
        output = tmp_path / "lists.parquet"
        done = CliRunner().invoke(app, ["node", "lists", "--store", str(template), "--output", str(output)])
    assert done.exit_code == 128 + signal.SIGTERM
    assert done.stderr == f"error: stopped by SIGTERM after 5 of 14 users; {output} was not written\n"
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []
