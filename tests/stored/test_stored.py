"""Files of perfedrec 0.1.0 are read, give what they gave then, and are continued.

``0.1.0/make.sh`` shows how they were made, and ``0.1.0/expected.json`` has what version 0.1.0 answered to
``questions.py``. Most answers are the same bit for bit on the machine where they were made; other processors round
differently, so that scores are compared with a tolerance.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.torch import load_file
from tests.stored import questions
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError
from perfedrec.core.keys import Key
from perfedrec.core.records import flatten
from perfedrec.core.types import Spec
from perfedrec.data.catalogue import read_catalogue
from perfedrec.federation.agreement import build, federated
from perfedrec.federation.bundles import KEYS, read_keys
from perfedrec.federation.model_file import export, read_model
from perfedrec.federation.run import FederatedRun
from perfedrec.federation.service import StateStore
from perfedrec.report.run import run_page
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.result import open_run
from perfedrec.runtimes.node import RoundError, Store
from perfedrec.runtimes.node.database import MIGRATIONS

HERE = Path(__file__).parent / "0.1.0"
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
RUNS = sorted(EXPECTED["runs"])
SECURE = ["fedmf-secure", "perfedrec-given-up", "pp-secure", "pp-secure-spectral"]
KEEPS_CLUSTERS = "pp-recommended"  # since 0.5.0 users keep the clusters that a pass before training has found
RESUMED = [
    name for name in RUNS if "resumed" in EXPECTED["runs"][name] and name not in SECURE and name != KEEPS_CLUSTERS
]
NODES = sorted(EXPECTED["node"])

READ, TRAINED = 1e-6, 1e-4
"""Relative tolerances of scores: of what is read, and after training."""

ANEW = "made by a version before 0.3.0, which opened secure sums by item; expected it to be trained anew"

Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """Copies a file or folder of 0.1.0 with the modes that its owner gave it. The working directory has the data."""
    shutil.copytree(HERE / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def copied(name: str) -> Path:
        target = tmp_path / Path(name).name
        (shutil.copytree if (HERE / name).is_dir() else shutil.copy)(HERE / name, target)
        for path in (target, *target.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)  # git keeps no modes
        return target

    return copied


def check_lists(found: Mapping[str, Any], expected: Mapping[str, Any], rel: float) -> None:
    """The same items in the same order, with the same scores and parts of scores."""
    assert found.keys() == expected.keys()
    for user, columns in expected.items():
        scale = max(map(abs, columns["score"]))
        for name, values in columns.items():
            if name not in found[user]:  # FedMF named parts of scores that it does not have
                assert values == pytest.approx([0.0] * len(values), abs=rel * scale), (user, name)
            elif name in ("item", "rank", "moved"):
                assert found[user][name] == values, (user, name)
            else:
                assert found[user][name] == pytest.approx(values, rel=rel, abs=rel * scale), (user, name)


def check_run(found: Mapping[str, Any], expected: Mapping[str, Any], rel: float) -> None:
    """The same lists and metrics."""
    check_lists(found["lists"], expected["lists"], rel)
    for part, metrics in expected["metrics"].items():
        assert found["metrics"][part] == pytest.approx(metrics, rel=rel), part


def contents(tensors: Iterable[torch.Tensor]) -> Counter[bytes]:
    """The tensors without their names."""
    return Counter(tensor.contiguous().numpy().tobytes() for tensor in tensors)


# --- runs ---


@pytest.mark.parametrize("name", RUNS)
def test_a_run_recommends_and_is_evaluated_as_before(name: str, copy: Copy) -> None:
    check_run(questions.of_run(copy(f"runs/{name}")), EXPECTED["runs"][name], READ)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_for_more_rounds(name: str, copy: Copy) -> None:
    expected, rel = EXPECTED["runs"][name]["resumed"], 1e-3 if name == "fedncf" else TRAINED
    found = questions.resumed(copy(f"runs/{name}"))
    assert (found["rounds"], found["best_round"]) == (expected["rounds"], expected["best_round"])
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert ours == (None if theirs is None else pytest.approx(theirs, rel=rel, abs=1e-7))
    check_run(found, expected, rel)


def test_a_resumed_run_with_a_pass_for_clusters_keeps_its_clusters(copy: Copy) -> None:
    run = copy(f"runs/{KEEPS_CLUSTERS}")
    (before,) = (load_file(path / "state.safetensors") for path in run.glob("checkpoints/*"))
    found = questions.resumed(run)
    assert found["rounds"] == EXPECTED["runs"][KEEPS_CLUSTERS]["resumed"]["rounds"]
    after = load_file(max(run.glob("checkpoints/*")) / "state.safetensors")
    assert torch.equal(before["labels"], after["clusters.labels"])


@pytest.mark.parametrize("name", RUNS)
def test_a_report_of_a_run_is_written(name: str, copy: Copy) -> None:
    run = copy(f"runs/{name}")
    page = run_page(run)
    assert page.title
    assert len(page.sections) == 8


def test_rounds_without_an_opened_sum_are_read(copy: Copy) -> None:
    history = RunFolder(copy("runs/perfedrec-given-up")).history()
    lines = [json.loads(line) for line in (HERE / "runs/perfedrec-given-up/metrics.jsonl").read_text().splitlines()]
    assert [entry.report.aborted for entry in history] == [line["given_up"] for line in lines]
    assert history[0].report.aborted == "1 clients are too few for a sum"
    assert history[1].report.aborted is None


@pytest.mark.parametrize("name", SECURE)
def test_a_run_under_secure_sums_is_trained_anew(name: str, copy: Copy) -> None:
    """Its next round would be opened by item, as its last one was."""
    run = copy(f"runs/{name}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["train", "--resume", "--output", str(run), "--rounds", "90", "--quiet"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {run / 'checkpoints' / 'round-0000'}")
    assert result.stderr.endswith(f": {ANEW}\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# --- nodes ---


@pytest.mark.parametrize("name", NODES)
def test_a_node_recommends_as_before(name: str, copy: Copy) -> None:
    store = copy(f"node/{name}")
    found = questions.of_store(store)
    assert found["status"] == EXPECTED["node"][name]["status"]
    check_lists(found["lists"], EXPECTED["node"][name]["lists"], TRAINED)
    assert store.stat().st_mode & 0o777 == 0o600
    db = sqlite3.connect(store)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.close()


@pytest.mark.parametrize("name", NODES)
def test_a_node_file_was_written_with_older_names(name: str, copy: Copy) -> None:
    """Otherwise the other tests would show nothing."""
    db = sqlite3.connect(copy(f"node/{name}"))
    assert db.execute("PRAGMA user_version").fetchone() == (5,)
    assert all("taken" in load_arrays(content) for (content,) in db.execute("SELECT content FROM memories"))
    db.close()


@pytest.mark.parametrize("name", sorted(EXPECTED["models"]))
def test_a_model_file_serves_a_new_user_as_before(name: str, copy: Copy, tmp_path: Path) -> None:
    found = questions.of_model(copy(f"models/{name}"), tmp_path / "new.node")
    check_lists(found, EXPECTED["models"][name], TRAINED)


# --- federations ---


def resume(folder: Path) -> FederatedRun:
    """A coordinator's run, continued as ``perfedrec serve --resume`` does, with the state of its checkpoint."""
    stored, catalogue = RunFolder(folder / "run"), read_catalogue(folder / "items.txt")
    config = stored.config()
    algorithm = federated(config)
    run = FederatedRun(config, algorithm, catalogue, stored, "", True)
    users, n_items = run.users, len(catalogue.item_ids)
    assert users is not None
    blank = algorithm.init(Spec(users.numel(), n_items, torch.ones(n_items)), Key(0))
    coordinator: Any = SimpleNamespace(blank=lambda: blank)
    run.begin(coordinator, users)
    return run


def test_a_coordinator_resumes(copy: Copy) -> None:
    name = "paper"
    folder = copy(f"coordinator/{name}")
    run = resume(folder)
    (checkpoint,) = (HERE / "coordinator" / name / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"round-{run.progress.done:06d}"
    assert run.progress.done == len(RunFolder(folder / "run").history()) == run.state.round
    assert run.state.n_users == 24
    assert run.algorithm.phase(run.state) == "train"
    assert run.setup.run == (HERE / "coordinator" / name / "run" / "name").read_text()
    # Nothing of what was stored is lost, and what is served follows from it.
    assert contents(flatten(run.state)[0].values()) == contents(load_file(checkpoint / "state.safetensors").values())
    served = load_file(HERE / "coordinator" / name / "run" / "model" / "state.safetensors")
    assert contents(flatten(run.algorithm.serving(run.state))[0].values()) == contents(served.values())


def test_a_coordinator_knows_what_its_service_gave_out(copy: Copy) -> None:
    run = resume(copy("coordinator/paper"))
    run.use_service(7, {7: "service", 8: "n0"})
    assert run.service_client is not None
    (checkpoint,) = (HERE / "coordinator/paper/run/checkpoints").iterdir()
    stored = load_file(checkpoint / "mediator.safetensors")
    assert {name: tensor.tolist() for name, tensor in run.service_client.tensors().items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }


@pytest.mark.parametrize("name", ["fedmf", "secure"])
def test_a_coordinator_of_secure_sums_is_trained_anew(name: str, copy: Copy) -> None:
    with pytest.raises(CheckpointError, match=f"round-00000[0-9]: {ANEW}$"):
        resume(copy(f"coordinator/{name}"))


DATA = "synthetic:users=24,items=20,clusters=2,interactions_per_user=5,seed=2"


@pytest.mark.parametrize("name", ["fedmf", "paper", "secure"])
def test_the_model_of_a_federation_is_evaluated_and_exported(name: str, copy: Copy, tmp_path: Path) -> None:
    """Its coordinator kept no catalogue: it is beside the run, where federation up put it."""
    folder = copy(f"coordinator/{name}") / "run"
    result, _ = open_run(folder, DATA)
    assert ("neighbour sums that the service gave to nodes" in result.basis) == (name == "paper")
    assert result.evaluate()["users"] > 20
    assert len(result.recommend([result.dataset.train.user_ids[0]], 5)) == 5
    export(folder, tmp_path / "a.model")
    assert read_model(tmp_path / "a.model").catalogue.fingerprint == result_catalogue(folder)
    (folder.parent / "items.txt").rename(folder / "items.txt")
    assert open_run(folder, DATA)[0].evaluate() == result.evaluate()
    (folder / "items.txt").unlink()
    with pytest.raises(CheckpointError, match="has no catalogue of this federation's items"):
        open_run(folder, DATA)


def result_catalogue(folder: Path) -> str:
    """The fingerprint of the catalogue to which a coordinator's model belongs."""
    manifest = json.loads((folder / "model" / "checkpoint.json").read_text())
    return str(manifest["belongs"]["catalogue"])


@pytest.mark.parametrize(("name", "federation"), [("paper", "paper")])
def test_a_node_continues_in_its_run(name: str, federation: str, copy: Copy) -> None:
    path, run = copy(f"node/{name}.node"), resume(copy(f"coordinator/{federation}"))
    status = EXPECTED["node"][f"{name}.node"]["status"]
    with Store.open(path) as store:
        store.join_run(run.algorithm, run.setup.run, configuration=run.setup.configuration)
        users = store.everyone()
        found = store.find_client_states(users)
        participations = found.client_state.participations
        assert int(participations.sum()) == status["participations"]["total"]
        assert int((participations > 0).sum()) == status["participations"]["users"]
        trained = participations > 0
        assert bool(found.stored[trained].all())
        assert not bool(found.outdated[found.stored].any())
        assert bool(found.client_state.private[trained].any(dim=1).all())
        # The rounds that it has answered stay answered.
        for number in (status["last_round"] - 1, status["last_round"]):
            with pytest.raises(RoundError):
                store.answer_round(number, b"another request", lambda: b"another answer")


def test_a_node_plays_the_next_round_of_its_run(copy: Copy) -> None:
    path, run = copy("node/paper.node"), resume(copy("coordinator/paper"))
    before = EXPECTED["node"]["paper.node"]["status"]
    with Store.open(path) as store:
        store.join_run(run.algorithm, run.setup.run, configuration=run.setup.configuration)
        users = store.everyone()

        def work() -> bytes:
            rows, positions = store.rows(users)
            states = store.load_client_states(users, positions)
            broadcast = run.algorithm.broadcast(run.state, users)
            update, states = run.algorithm.client(
                "train", broadcast, rows, states, Key(store.seed).fold(run.state.round)
            )
            assert bool(update.deltas.isfinite().all())
            store.save_client_states(users, positions, states)
            return b"an answer"

        assert store.answer_round(run.state.round, b"a request", work) == b"an answer"
        status = store.status()
    assert status["last_round"] == run.state.round
    assert status["participations"]["total"] == before["participations"]["total"] + users.numel()
    assert status["participations"]["users"] == users.numel()


def test_the_neighbourhood_service_continues(copy: Copy) -> None:
    folder, run = copy("service"), resume(copy("coordinator/paper"))
    algorithm = build(run.setup.configuration)
    state = StateStore(folder).get(run.setup.run, run.progress.done, algorithm.open_service(24))
    (stored,) = folder.glob("run-*/round-*/service.safetensors")
    assert contents(flatten(state)[0].values()) == contents(load_file(stored).values())
    assert state.reports.shape[0] == 24
    assert state.graph is not None
    keys = read_keys(folder / KEYS)
    assert (len(keys.private), len(keys.nodes)) == (32, 32)


# --- studies ---


def test_a_comparison_is_read_and_not_played_again(copy: Copy, tmp_path: Path) -> None:
    folder = copy("bench")
    result = CliRunner().invoke(app, ["bench", str(copy("bench.toml")), "--output", str(folder), "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"2 runs in {folder}, 2 finished already")
    found, expected = (json.loads((each / "results.json").read_text()) for each in (folder, HERE / "bench"))
    # Popularity is ranked anew, and items with equal counts come in another order since 0.4.0.
    anew, before = (each["data"]["tiny"].pop("popularity") for each in (found, expected))
    assert anew.keys() == before.keys()
    check_alike(found, expected)


SINCE = {"vary", "splits", "chance", "seedless", "notes"}
"""Keys of results.json that newer versions have added."""


def check_alike(found: Any, expected: Any, where: str = "results") -> None:
    """The same tree, with numbers within a tolerance."""
    if isinstance(expected, dict):
        assert found.keys() - SINCE == expected.keys(), where
        for name, value in expected.items():
            check_alike(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            check_alike(found[number], value, f"{where}[{number}]")
    else:
        assert found == (pytest.approx(expected, rel=READ) if isinstance(expected, float) else expected), where


@pytest.mark.parametrize("label", ["fedmf", "lightgcn"])
def test_a_run_of_a_comparison_opens(label: str, copy: Copy) -> None:
    run = copy("bench") / "runs" / label / "tiny" / "seed-0"
    result = json.loads((run / "result.json").read_text())
    assert questions.of_run(run)["metrics"]["test"] == pytest.approx(result["test"], rel=READ)


def test_a_study_is_continued(copy: Copy) -> None:
    folder = copy("tune")
    found = questions.of_study(folder)
    assert found.pop("options") == pytest.approx(EXPECTED["tune"]["options"])
    assert found == pytest.approx({name: value for name, value in EXPECTED["tune"].items() if name != "options"})
    assert questions.of_study(folder, 3)["trials"] == 3
