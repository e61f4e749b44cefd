"""What a coordinator writes down and says at the begin and the end of a run; what a node says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data.catalogue import Catalogue
from perfedrec.federation.agreement import federated
from perfedrec.federation.metrics import Watch
from perfedrec.federation.record import Record
from perfedrec.federation.run import FederatedRun
from perfedrec.federation.status import look
from perfedrec.runs import config
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.signals import InterruptedRunError
from perfedrec.runtimes.flower import Activity, Rejection

NAMES = {1: "n0", 2: "n1", 9: "service"}


def recorded(folder: Path, told: list[str], resume: bool = False) -> tuple[Record, Any]:
    """The record of a run with two nodes that have not said yet which users they host, and its coordinator."""
    given = config.load("recommended", None, ["run.rounds=20"], privacy="secure")
    run = FederatedRun(given, federated(given), Catalogue(np.arange(5)), RunFolder(folder), "mine", resume)
    coordinator: Any = SimpleNamespace(
        names=NAMES,
        service=9,
        service_client=None,
        directory=None,
        rejected=[],
        present={1},
        apart={},
        algorithm=run.algorithm,
    )
    watch = Watch(NAMES, run.progress.total, 60.0, {"ca.crt": 3e9})
    link: Any = SimpleNamespace(restarts=0)
    return Record(run, coordinator, lambda: watch.figures(coordinator, link), told.append), coordinator


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def test_a_run_from_waiting_to_its_begin(tmp_path: Path) -> None:
    told, folder = list[str](), tmp_path / "run"
    record, coordinator = recorded(folder, told)
    coordinator.rejected.append(Rejection(2, -1, "registration", "version", "this node runs version 0.1", 0))
    record.waiting("1 node and 16 users are present")
    with RunFolder(folder).locked():
        assert look(folder)["state"] == "waiting"
    assert [look(folder)["state"], look(folder)["done"], look(folder)["planned"]] == [
        "gone",
        0,
        record.run.progress.total,
    ]
    assert {each["name"]: each["state"] for each in look(folder)["nodes"]} == {"n0": "not known", "n1": "refused"}

    coordinator.directory = SimpleNamespace(hosts={1: torch.arange(3)}, identities=torch.arange(3))
    record.run.begin(SimpleNamespace(begin=lambda: SimpleNamespace(round=0)), torch.arange(3))  # type: ignore[arg-type]
    record.begin()
    phases = record.run.n_phases
    assert told == [
        "1 node and 16 users are present",
        f"run mine begins: perfedrec_pp, 20 rounds of training after {phases} phases, 1 node with 3 users",
    ]
    found = status(folder)
    assert (found["state"], found["users"], found["run"], found["phases"]) == ("running", 3, "mine", phases)
    assert found["protection"] == "no individual upload is visible; no DP guarantee"
    assert found["nodes"]["n0"] == {"service": False, "users": 3, "refused": None}
    record.run.progress.done = phases + 7
    record.begin()
    assert told[-1].startswith("run mine continues after round 7/20: perfedrec_pp, 20 rounds of training")

    record.run.progress.done = record.run.progress.total
    summary: Any = SimpleNamespace(valid={"recall@20": 0.25}, best_round=18, nodes_with_model=["n0"])
    record.end(summary)
    best = "run mine has ended after round 20/20: best round 18, validation recall@20 0.2500; "
    assert told[-1] == f"{best}its model is on 1 of 1 node"
    assert (status(folder)["state"], status(folder)["why"]) == ("finished", "")
    record.end(summary, "version 3 of models, which is promoted, is on 1 of 1 node")
    assert told[-1] == f"{best}version 3 of models, which is promoted, is on 1 of 1 node"
    assert status(folder)["why"] == "version 3 of models, which is promoted, is on 1 of 1 node"
    record.end(SimpleNamespace(**{**vars(summary), "best_round": -1, "n_phases": 3}))  # type: ignore[arg-type]
    assert "best phase 2 before training, validation recall@20 0.2500; " in told[-1]


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (InterruptedRunError("stopped after round 3/20", 15), "stopped", "stopped after round 3/20"),
        (ConfigError("the service is not connected"), "failed", "the service is not connected"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (ZeroDivisionError("in our own code"), "failed", "ZeroDivisionError"),
    ],
)
def test_how_a_run_ends_is_written_down(error: BaseException, state: str, why: str, tmp_path: Path) -> None:
    told, folder = list[str](), tmp_path / "run"
    record, _ = recorded(folder, told)
    with pytest.raises(type(error)), record.to_the_end():
        raise error
    assert told == [f"run mine ends here: {'failed: ' if state == 'failed' else ''}{why}"]
    assert (status(folder)["state"], status(folder)["why"]) == (state, why)
    assert look(folder)["state"] == state
    assert [each["name"] for each in look(folder)["alerts"]] == (["ProcessGone"] if state == "failed" else [])


def test_a_run_that_never_began_can_begin_again(tmp_path: Path) -> None:
    """status.json does not make the folder one of somebody else."""
    record, _ = recorded(tmp_path / "run", [])
    record.waiting("0 nodes are present")
    recorded(tmp_path / "run", [])
    record, _ = recorded(tmp_path / "run", [], resume=True)
    assert record.run.progress.done == 0


def test_a_node_says_when_a_run_begins_and_ends() -> None:
    told = list[str]()
    work = Activity(log=told.append)
    work.end("with a model")  # it takes part in none
    for _ in range(2):
        work.begin("a", "FedMF")
        work.play("a", 0)
    work.play("a", 1)
    work.end("with the model of run a after 2 rounds")
    work.begin("b", "PerFedRec")
    work.play("b", 0)
    work.begin("c", "PerFedRec")
    work.end("without a model: this process ends")
    assert told == [
        "run a begins here: FedMF",
        "run a ends here, after 2 rounds, with the model of run a after 2 rounds",
        "run b begins here: PerFedRec",
        "run b ends here, after 1 round, without a model: another run begins",
        "run c begins here: PerFedRec",
        "run c ends here, after 0 rounds, without a model: this process ends",
    ]
