"""Virtual nodes compute what the simulator computes: on a grid in memory, and on Flower's simulation engine itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from tests.parity.grid import MemoryGrid
from tests.ports import reserved_port

from perfedrec.core.errors import CheckpointError, ConfigError, DataError, PerfedrecError
from perfedrec.core.records import flatten
from perfedrec.data import Dataset
from perfedrec.data.attributes import Attributes
from perfedrec.federation import run, virtual
from perfedrec.federation.agreement import build
from perfedrec.federation.local import environment
from perfedrec.federation.owner import Node
from perfedrec.runs import checkpoint
from perfedrec.runs.config import open_data
from perfedrec.runs.engine import engine_of
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.result import held_out
from perfedrec.runs.rounds import Rounds
from perfedrec.runtimes.node import Store

FOLDER = Path(__file__).parents[3] / "deploy" / "flower-app"
USERS = 128
SMALL = "run.evaluate_every=1 model.embedding_dim=8 pretraining.passes=1 clusters.n_clusters=2 clusters.start=1"
GIVEN: dict[str, Any] = {
    "data": f"synthetic:users={USERS},items=60,interactions_per_user=8,clusters=2",
    "preset": "recommended",
    "privacy": "",
    "set": SMALL,
    "rounds": 2,
    "seed": 3,
}


def grid_of(given: dict[str, Any], nodes: int) -> MemoryGrid:
    grid = MemoryGrid(dict.fromkeys(range(100, 100 + nodes), virtual.client))
    for node, context in grid.contexts.items():  # partitions in another order than the nodes' ids
        context.node_config = {"partition-id": (node + 1) % nodes, "num-partitions": nodes}
        context.run_config = given
    return grid


def as_simulated(given: dict[str, Any], nodes: int, dataset: Dataset | None = None, within: float = 0.0) -> None:
    """Cohorts, the model and the client states in the nodes' stores are the simulator's, ``within`` a bound."""

    def others(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
        return [name for name in one if not torch.allclose(one[name], two[name], rtol=0, atol=within)]

    config = virtual.resolved(virtual.options(given))
    algorithm, output, data = config.build(), RunFolder(Path(given["output"])), dataset or open_data(config.data)
    rounds = Rounds(engine_of(algorithm, data, config.run), data, config.run)
    while not rounds.progress.over:
        rounds.play()
    history = output.history()
    assert [each.report.clients for each in history] == [each.report.clients for each in rounds.history]
    for ours, theirs in zip(history, rounds.history, strict=True):
        assert (ours.valid or {}) == figures(theirs.valid or {})
    best, summary = rounds.finish(), output.summary()
    held = [held_out(each, best.device) for each in (data.test, data.valid)]
    assert (summary.best_round, summary.valid) == (rounds.best_round, figures(rounds.best_valid))
    assert summary.test == figures(best.evaluate(held[0], hide=held[1]))
    assert summary.test["users"] > 0.9 * USERS
    records = best.records()
    expected = flatten(records["state"])[0]
    found, _ = checkpoint.load(output.path / "model").records["state"]
    assert found.keys() == expected.keys()
    assert others(found, expected) == []
    assert float(expected["items"].std()) > 0

    population, users = best.population, torch.arange(USERS)  # type: ignore[attr-defined]
    client_state, parts = flatten(population.client_state)[0], users.tensor_split(nodes)
    assert any(bool(each.any()) for each in client_state.values())
    for place, part in enumerate(parts):
        with Store.open(output.path / "nodes" / f"n{place}" / "store.db") as store:
            assert torch.equal(store.everyone(), part)
            served = store.served()
            store.join_run(build(served.configuration), served.run)
            rows, _ = store.rows(part)
            assert torch.equal(rows.items, population.rows(part)[0].items)
            own, _ = flatten(store.find_client_states(part, served.round).client_state)
            theirs, _ = flatten(population.load_client_states(part, population.rows(part)[1]))
            assert others(theirs, own) == []


def figures(means: dict[str, float]) -> dict[str, Any]:
    """What a federation has of a simulation's figures: sums over users, in fixed point."""
    return {name: pytest.approx(value, abs=2**-36) for name, value in means.items() if "coverage" not in name}


@pytest.mark.parametrize(("privacy", "more"), [("", ""), ("secure", ""), ("secure", " personal.chosen=false")])
def test_virtual_nodes_compute_the_tables_of_the_simulator(tmp_path: Path, privacy: str, more: str) -> None:
    given = GIVEN | {"output": str(tmp_path / "run"), "privacy": privacy, "set": SMALL + more, "rounds": 4}
    virtual.play(grid_of(given, 5), given)
    as_simulated(given, 5)
    records = checkpoint.load(tmp_path / "run" / "model").records["state"][0]
    assert ("mix" in records) == (not more)
    if not more:  # the same weights as in the simulation, and not those of the configuration
        assert float(records["mix"].sum()) == pytest.approx(1.0)
        configured = virtual.resolved(virtual.options(given)).build().weights
        assert not torch.allclose(records["mix"], configured / configured.sum(), atol=0.01)
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["nodes_with_model"] == [f"n{place}" for place in range(5)]
    with Node.open(tmp_path / "run" / "nodes" / "n0" / "store.db") as node:
        assert len(node.recommend("0", 5)) == 5


def test_attributes_reach_the_nodes_of_their_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "model.embedding_dim=8 model.attributes=true"
    given = GIVEN | {"output": str(tmp_path / "run"), "preset": "perfedrec", "set": options}
    with pytest.raises(DataError, match="the data set has no attributes"):
        virtual.play(grid_of(given, 5), given)
    assert not (tmp_path / "run").exists()
    plain = open_data(virtual.resolved(virtual.options(given)).data)
    draw = np.random.default_rng(0)
    users, items = (draw.integers(0, 2, (n, 3)).astype(np.float32) for n in (plain.n_users, plain.n_items))
    own, theirs = (Attributes(("a", "b", "c"), values) for values in (users, items))
    dressed = replace(plain, user_attributes=own, item_attributes=theirs)
    monkeypatch.setattr(virtual, "open_data", lambda *_: dressed)
    virtual.play(grid_of(given, 5), given)
    as_simulated(given, 5, dressed, within=1e-5)  # attribute networks' products pick kernels by shape
    with Store.open(tmp_path / "run" / "nodes" / "n1" / "store.db") as store:
        rows, _ = store.rows(store.everyone())
        assert torch.equal(rows.attributes, torch.from_numpy(users)[store.everyone()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": "many"}, "run-config: rounds: .*given: 'many'"),
        ({"sead": 1}, "run-config: there is no option sead; did you mean seed"),
        ({"set": "model.embeding_dim=8"}, "did you mean model.embedding_dim"),
        ({"preset": "mf", "set": ""}, "mf is centralised"),
        ({"data": "synthetic:users=3,items=60,interactions_per_user=5"}, "3 users for 5 nodes"),
    ],
)
def test_an_impossible_run_is_refused_with_its_reason_and_writes_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = GIVEN | {"output": str(tmp_path / "run")} | change
    with pytest.raises(ConfigError, match=message):
        virtual.play(grid_of(given, 5), given)
    assert not (tmp_path / "run").exists()


def test_a_run_refuses_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = GIVEN | {"output": str(tmp_path)}
    with pytest.raises(ConfigError, match="is not empty, and has no run with a checkpoint"):
        virtual.play(grid_of(given, 5), given)
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_a_virtual_node_that_fails_ends_the_run(tmp_path: Path) -> None:
    given = GIVEN | {"output": str(tmp_path / "run")}
    grid = grid_of(given, 5)
    grid.contexts[102].run_config = given | {"output": str(tmp_path / "elsewhere")}
    with pytest.raises(PerfedrecError, match=r"virtual node n3: .*elsewhere"):
        virtual.play(grid, given)


def test_an_interrupted_run_continues_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = GIVEN | {"output": str(tmp_path / "run"), "rounds": 1}
    virtual.play(grid_of(given, 5), given)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    longer = given | {"rounds": 3}
    with monkeypatch.context() as patched:
        patched.setattr(
            run.FederatedRun, "checkpoint", killed
        )  # the nodes have played the round, and there is no checkpoint of it
        with pytest.raises(KeyboardInterrupt):
            virtual.play(grid_of(longer, 5), longer)
    with pytest.raises(ConfigError, match="is a run with 5 nodes; expected the same number, and not 4"):
        virtual.play(grid_of(longer, 4), longer)
    for change in ({"seed": 4}, {"set": SMALL + " server.averaging=0.5"}):
        with pytest.raises(CheckpointError, match="another configuration"):
            virtual.play(grid_of(longer | change, 5), longer | change)
    virtual.play(grid_of(longer, 5), longer)
    as_simulated(longer, 5)
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["nodes_with_model"] == [f"n{place}" for place in range(5)]


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink with the simulation engine, which ends with all its children. Yields the environment that commands to
    it need."""
    port, binaries = reserved_port(), Path(sys.executable).parent
    home.mkdir()
    (home / "config.toml").write_text(
        tomli_w.dumps({"superlink": {"default": "sim", "sim": {"address": f"127.0.0.1:{port}", "insecure": True}}})
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        known = environment() | {"FLWR_HOME": str(home), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
        known["RAY_memory_monitor_refresh_ms"] = "0"  # Ray ends workers where others fill the machine's memory
        known |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        with open(home / "superlink.log", "wb") as log:
            link = psutil.Popen(command, stdout=log, stderr=log, env=known, start_new_session=True)
        try:
            yield known
        finally:
            family = [link, *link.children(recursive=True)]
            link.terminate()
            _, left = psutil.wait_procs(family, timeout=10)
            for each in left:
                each.kill()
            psutil.wait_procs(left, timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_simulation_engine_runs_the_app_folder_on_64_nodes(tmp_path: Path) -> None:
    given = GIVEN | {"output": str(tmp_path / "run")}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
    with superlink(tmp_path / "home") as known:
        command = ["flwr", "run", str(FOLDER), "sim", "--stream", "--run-config", config]
        command += ["--federation-config", "num-supernodes=64 client-resources-num-cpus=1"]
        for _ in range(600):  # until the SuperLink listens, and Ray has begun, which gives itself 30 seconds
            done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
            if done.returncode == 0 and "timed out during startup" not in done.stdout + done.stderr:
                break
            time.sleep(1)
        said = done.stdout + done.stderr + (tmp_path / "home" / "superlink.log").read_text()
        end = time.monotonic() + 900
        while not (tmp_path / "run" / "result.json").exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert (tmp_path / "run" / "result.json").exists(), said[-5000:]
    as_simulated(given, 64)
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["nodes_with_model"] == [f"n{place}" for place in range(64)]
