"""What a coordinator checks before it starts anything, and what it resumes from."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.conftest import Federation

from perfedrec.core.errors import ConfigError, DataError, PerfedrecError
from perfedrec.core.types import RoundReport
from perfedrec.data.catalogue import Catalogue
from perfedrec.federation.agreement import federated
from perfedrec.federation.certificates import make_certificates, make_key
from perfedrec.federation.coordinator import Deployment, Terms, serve
from perfedrec.federation.run import FederatedRun
from perfedrec.runs import checkpoint, config
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.progress import Quiet
from perfedrec.runtimes.flower import Answers

BEGINS: Any = SimpleNamespace(begin=lambda: SimpleNamespace(round=0))
"""Stands in for a coordinator that begins."""


def test_a_port_that_is_taken_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates")
    (tmp_path / "keys").mkdir()
    for name in ("a", "b", "c"):
        make_key(tmp_path / "keys" / name)
    given = Deployment(
        config.load("fedmf", None, [], privacy="secure"),
        Catalogue(np.arange(5)),
        tmp_path / "run",
        tmp_path / "certificates",
        tmp_path / "keys",
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        terms = Terms(port=taken.getsockname()[1])
        with pytest.raises(
            ConfigError, match=r"^127.0.0.1:\d+: address already in use; expected .* free port \(--port\)"
        ):
            serve(replace(given, terms=terms), Quiet(), print)
    with pytest.raises(ConfigError, match=r"^192.0.2.1:18000: cannot assign .*; expected an address of this machine"):
        serve(replace(given, terms=Terms("192.0.2.1")), Quiet(), print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("asked", "threads"), [(0, 1), (2, 2)])
def test_a_coordinator_computes_in_one_thread_unless_another_number_is_chosen(
    tmp_path: Path, asked: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    make_certificates(tmp_path / "certificates")
    (tmp_path / "keys").mkdir()
    given = config.load("recommended", None, [f"run.threads={asked}"], privacy="secure")
    try:
        places = (tmp_path / "run", tmp_path / "certificates", tmp_path / "keys")
        with pytest.raises(ConfigError, match="no public keys"):
            serve(Deployment(given, Catalogue(np.arange(5)), *places), Quiet(), lambda line: None)
        assert torch.get_num_threads() == threads
        assert not (tmp_path / "run").exists()  # the next attempt finds a new folder
    finally:
        torch.set_num_threads(before)


def test_what_was_written_about_a_round_that_is_played_again_is_removed(tmp_path: Path) -> None:
    """Here of the first round, before there was a checkpoint, and of the nodes that were refused in it."""
    given, items = config.load("recommended", None, [], privacy="secure"), Catalogue(np.arange(5))
    folder, algorithm = RunFolder(tmp_path / "run"), federated(given)
    run = FederatedRun(given, algorithm, items, folder, "mine", False)
    run.begin(BEGINS, torch.arange(4))
    assert run.setup.run == folder.name() == "mine"
    report = RoundReport(0, "degrees", 4, 4, None, 1, 1, 1)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(Entry(report, 1.0).line()) + "\n")
    rejections = tmp_path / "run" / "rejections.jsonl"
    rejections.write_text('{"node": "n1", "round": -1}\n{"node": "n2", "round": 0}\n{"node": "n3", "rou')
    assert FederatedRun(given, algorithm, items, folder, "another", True).setup.run == "mine"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert rejections.read_text() == '{"node": "n1", "round": -1}\n'


@pytest.mark.parametrize(
    ("left", "configured", "resume"),
    [
        ([".config.toml.99"], False, False),
        ([], True, False),
        (["superlink/superlink.log", ".name.99"], True, False),
        (["superlink/superlink.log", ".name.99"], True, True),
    ],
)
def test_a_coordinator_that_ended_before_it_asked_nodes_for_anything_begins_again(
    tmp_path: Path, left: list[str], configured: bool, resume: bool
) -> None:
    """It gave up waiting for nodes, or was killed while it wrote the first files: the same command works again."""
    given, items = config.load("recommended", None, [], privacy="secure"), Catalogue(np.arange(5))
    folder, algorithm = RunFolder(tmp_path / "run"), federated(given)
    if configured:
        FederatedRun(given, algorithm, items, folder, "first", False)
    for name in left:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("cut o")
    changed = given.model_copy(update={"run": given.run.model_copy(update={"rounds": 7})})
    run = FederatedRun(changed, algorithm, items, RunFolder(folder.path), "second", resume)
    assert sorted(each.name for each in folder.path.iterdir()) == ["config.toml", "environment.json", "items.txt"]
    assert (folder.config().run.rounds, run.setup.run) == (7, "second")
    run.begin(BEGINS, torch.arange(4))
    with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
        FederatedRun(given, algorithm, items, RunFolder(folder.path), "third", False)
    assert FederatedRun(given, algorithm, items, RunFolder(folder.path), "third", True).setup.run == "second"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    given, items = config.load("recommended", None, [], privacy="secure"), Catalogue(np.arange(5))
    path = tmp_path / "run"
    for name, content in (("items.txt", "0\n1\n"), ("config.toml", given.to_toml()), ("notes.txt", "mine")):
        path.mkdir(exist_ok=True)
        (path / name).write_text(content)
        before = {each: each.read_bytes() for each in path.iterdir()}
        with pytest.raises(PerfedrecError, match=r"is not empty|not a coordinator's run"):
            FederatedRun(given, federated(given), items, RunFolder(path), "mine", resume)
        assert {each: each.read_bytes() for each in path.iterdir()} == before


def test_a_run_has_one_coordinator(tmp_path: Path) -> None:
    taken = pytest.raises(ConfigError, match="another process is the coordinator")
    with RunFolder(tmp_path / "run").locked(), taken, RunFolder(tmp_path / "run").locked():
        pass
    with RunFolder(tmp_path / "run").locked():
        pass


def test_the_data_of_a_federation_are_with_its_nodes(tmp_path: Path) -> None:
    given = config.load("recommended", None, ["data.min_rating=3"], privacy="secure")
    items = Catalogue(np.array(["a", "b"], dtype=object))
    folder = RunFolder(tmp_path / "run")
    FederatedRun(given, federated(given), items, folder, "mine", False)
    stored = folder.config().data
    assert (stored.path, stored.min_rating) == ("nodes:", 3)
    with pytest.raises(DataError, match=r"^the data of this run are with the nodes of a federation; expected --data"):
        config.open_data(stored)


def test_incomplete_checkpoints_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".round-000003.4711").mkdir()
    for number in range(5):
        checkpoint.save(checkpoint.folder_of(tmp_path, number), {}, {}, {})
    checkpoint.prune(tmp_path)
    kept = [f"round-{number:06d}" for number in range(5 - checkpoint.KEPT, 5)]
    assert sorted(each.name for each in tmp_path.iterdir()) == kept


def test_a_run_that_is_continued_keeps_the_test_figures_of_its_best_round(finished: Federation, tmp_path: Path) -> None:
    """Nodes open a sum once, and refuse to where one of them is missing now. Another best round is tested."""
    folder, asked = RunFolder(Path(shutil.copytree(finished.folder, tmp_path / "run"))), list[int]()

    def evaluate(served: Any, question: Any) -> Answers:
        asked.append(question.played)
        return Answers((), "opened with other nodes")

    coordinator: Any = SimpleNamespace(blank=lambda: finished.simulator.state, evaluate=evaluate, rejected=[])
    given, items = folder.config(), Catalogue.of(finished.dataset, False)
    run = FederatedRun(given, federated(given), items, folder, "another", True)
    run.begin(coordinator, torch.arange(finished.dataset.n_users))
    before = folder.summary()
    assert before.test
    assert run.finish(["n0"], test=run.test(coordinator, {}, print)).test == before.test == folder.summary().test
    assert asked == []
    run.selection.best_valid = {**before.valid, "recall@20": 1.0}
    assert run.test(coordinator, {}, print) == {}
    folder.write("result.json", b"cut o")
    run.selection.best_valid = before.valid
    assert run.test(coordinator, {}, print) == {}
    assert asked == [run.best.round] * 2
