"""A federation of real processes, under TLS and with keys, computes what the simulator computes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from perfedrec.core.records import flatten
from perfedrec.data import read_catalogue
from perfedrec.experiment import checkpoint, config, federation
from perfedrec.experiment.methods import engine
from perfedrec.experiment.progress import Quiet
from perfedrec.experiment.run import open_data, read_history
from perfedrec.experiment.serve import Terms, serve
from perfedrec.runtimes.node import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SECRET, NAME = bytes(range(32)), "a run"
SMALL = ["model.embedding_dim=8", "pretraining.passes=1", "clusters.n_clusters=2", "clusters.start=1"]


def draws(folder: Path, algorithm: Any) -> int:
    """The seed of all draws of nodes that share a secret, in a run of that name."""
    with Store.open(folder / "nodes" / "n0" / "store.db") as store:
        return store.join(algorithm, NAME)


@pytest.mark.parametrize(("users", "nodes", "rounds"), [(3, 3, 2), (24, 2, 3)], ids=["one user a node", "many"])
def test_processes_compute_the_tables_of_the_simulator(tmp_path: Path, users: int, nodes: int, rounds: int) -> None:
    size = f"data.path=synthetic:users={users},items=40,interactions_per_user=8,clusters=2"
    cohort = f"selection.n_clients_per_round={max(users - 2, 2)}"
    given = config.load("recommended", None, [size, cohort, *SMALL], run__rounds=rounds)
    dataset = open_data(given.data)
    folder = tmp_path / "federation"
    federation.lay_out(folder, dataset, nodes, secret=SECRET)
    seed = draws(folder, given.build())
    given = given.model_copy(update={"run": given.run.model_copy(update={"seed": seed})})

    port, lines = federation.free_port(), list[str]()
    with federation.nodes(folder, port):
        terms = Terms(port=port, min_nodes=nodes, wait=120, deadline=60)
        ids = read_catalogue(folder / federation.CATALOGUE)
        files, keys = folder / "certificates", folder / "keys"
        summary = serve(given, ids, tmp_path / "run", files, keys, terms, Quiet(), lines.append, name=NAME)

    as_simulated(given, dataset, tmp_path / "run")
    assert sorted(summary["nodes_with_model"]) == sorted(f"n{number}" for number in range(nodes))
    assert not (tmp_path / "run" / "rejections.jsonl").exists(), lines
    assert json.loads((tmp_path / "run" / "result.json").read_text())["users"] == users


def as_simulated(given: Any, dataset: Any, run: Path) -> None:
    """The tables and cohorts of a run are the simulator's, bit for bit."""
    simulated = engine(given.build(), dataset, seed=given.run.seed, device="cpu")
    reports = [simulated.play() for _ in range(simulated.prelude + given.run.rounds)]
    assert [each.report.clients for each in read_history(run)] == [each.clients for each in reports]
    newest = checkpoint.load(checkpoint.folders(run / "checkpoints")[0])
    expected, found = flatten(simulated.records()["state"])[0], newest.records["state"][0]
    assert found.keys() == expected.keys()
    assert max(float((found[name].double() - expected[name].double()).abs().max()) for name in found) == 0.0
    assert float(expected["offsets"].abs().max()) > 0
    assert torch.equal(newest.records["roll"][0]["users"], torch.arange(dataset.n_users))


SCRIPT = """
import sys
from pathlib import Path
from perfedrec.data import read_catalogue
from perfedrec.experiment import config, federation
from perfedrec.experiment.progress import Quiet
from perfedrec.experiment.serve import Terms, serve

folder, port, resume = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
serve(config.load(None, folder / "run.toml"), read_catalogue(folder / federation.CATALOGUE), folder / "run",
      folder / "certificates", folder / "keys", Terms(port=port, min_nodes=2, deadline=60), Quiet(), print, resume,
      "a run")
"""


def test_a_coordinator_that_was_killed_goes_on_with_the_same_run(tmp_path: Path) -> None:
    size = "data.path=synthetic:users=24,items=40,interactions_per_user=8,clusters=2"
    given = config.load("recommended", None, [size, "selection.n_clients_per_round=22", *SMALL], run__rounds=6)
    dataset, folder = open_data(given.data), tmp_path / "federation"
    federation.lay_out(folder, dataset, 2, secret=SECRET)
    seed = draws(folder, given.build())
    given = given.model_copy(update={"run": given.run.model_copy(update={"seed": seed})})
    (folder / "run.toml").write_text(given.to_toml())
    port, history = federation.free_port(), folder / "run" / "metrics.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(port)]
    with federation.nodes(folder, port):
        killed = subprocess.Popen(command)
        while killed.poll() is None and (not history.exists() or history.read_text().count("\n") < 4):
            time.sleep(0.02)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        assert subprocess.run([*command, "resume"], timeout=200, check=False).returncode == 0
    as_simulated(given, dataset, folder / "run")
