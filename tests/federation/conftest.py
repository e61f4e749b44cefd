"""The folder of a coordinator, written without nodes: the simulator plays the rounds in their place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perfedrec.data import Catalogue, Dataset, load
from perfedrec.evaluation import Held
from perfedrec.federation.agreement import federated
from perfedrec.federation.run import FederatedRun
from perfedrec.runs import config
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.flower import Answers
from perfedrec.runtimes.simulator import Simulator

DATA = "synthetic:users=80,items=60,clusters=2,interactions_per_user=8,seed=3"


@dataclass(frozen=True)
class Federation:
    """A finished federation: the ``folder`` of its coordinator, and the ``simulator`` that stood in for its nodes."""

    folder: Path
    simulator: Simulator[Any, Any, Any]
    dataset: Dataset


def federation(folder: Path, *overrides: str, privacy: str = "secure", data: str = DATA, rounds: int = 3) -> Federation:
    """A federation of the users of ``data`` on two nodes."""
    small = ("model.embedding_dim=8", "selection.n_clients_per_round=60", "clusters.start=1", "run.seed=5")
    given = config.resolve(None, None, [*small, *overrides], privacy=privacy, run__rounds=rounds)
    algorithm, dataset = federated(given), load(data)
    simulator: Simulator[Any, Any, Any] = Simulator(algorithm, dataset, seed=given.run.seed, device="cpu")
    catalogue = Catalogue.of(dataset, given.attributes)
    run = FederatedRun(given, algorithm, catalogue, RunFolder(folder), "mine", False)

    def play(state: Any) -> tuple[Any, Any]:
        report = simulator.play()
        return simulator.state, report

    parts = {"valid": dataset.valid, "test": dataset.test}
    held = {name: Held.of(each.offsets, each.items, simulator.device) for name, each in parts.items()}

    def evaluate(served: Any, question: Question) -> Answers:
        return Answers((simulator.recommender().evaluate(held[question.part], question.ks),))

    coordinator: Any = SimpleNamespace(begin=lambda: simulator.state, play=play, evaluate=evaluate, rejected=[])
    run.begin(coordinator, torch.arange(dataset.n_users))
    while not run.progress.over:
        run.play(coordinator, {}, print)
    run.finish(["n0", "n1"], test=run.test(coordinator, {}, print))
    return Federation(folder, simulator, dataset)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A finished federation with secure sums."""
    return federation(tmp_path_factory.mktemp("federation") / "run")
