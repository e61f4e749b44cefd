"""A small run with everything that a report can show, a small comparison, their reports, and a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from tests.report.tab import NAME, Tab

from perfedrec import configure, load, train
from perfedrec.audit.audit import audit
from perfedrec.compare import bench
from perfedrec.compare.results import collect
from perfedrec.report import write_report

COMPARISON = """
seeds = [0, 1]
metric = "recall@20"
reference = "lightgcn"

[data.planted]
path = "synthetic:users=160,items=120,clusters=3,interactions_per_user=10"

[common]
set = ["run.threads=1", "run.evaluate_every=2"]

[methods]
lightgcn = { set = ["run.rounds=6", "method.learning_rate=0.02", "method.batch_size=256"] }
fedmf = { set = ["run.rounds=6", "selection.n_clients_per_round=60"] }
mf = { set = ["run.rounds=4", "method.batch_size=256"] }
item_knn = {}

[sweep]
key = "method.embedding_dim"
values = [4, 8, 64]
methods = ["mf"]
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audited run of preset paper that has clusters in its best round."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ("data.path=synthetic:users=240,items=160,clusters=4", "run.rounds=12", "run.evaluate_every=2")
    more = ("selection.n_clients_per_round=80", "clusters.start=2", "clusters.every=2", "run.threads=1")
    config = configure("paper", overrides=[*options, *more])
    train(config.build(), load(config.data.path), config.run, output=folder, config=config)
    audit(folder, rounds=(1,), trials=1000)
    notes = json.loads((folder / "diagnostics.json").read_text())
    notes["data"]["name"] = NAME
    (folder / "diagnostics.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="session")
def report(run_folder: Path) -> Path:
    """The report of the run."""
    return write_report(run_folder)


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with a reference, a sweep and an unfinished run. Its runs are played here, one after the other."""
    folder = tmp_path_factory.mktemp("benches") / "bench"
    file = folder.parent / "comparison.toml"
    file.write_text(COMPARISON)
    comparison = bench.read(file, folder)
    comparison.prepare()
    for cell in comparison.cells():
        if (cell.label, cell.seed) == ("fedmf", 1):
            continue
        dataset, config = comparison.datasets[cell.data], cell.config
        train(config.build(), dataset, config.run, output=cell.folder, config=config)
        (cell.folder / "cost.json").write_text(json.dumps({"seconds": 2.0, "cpu_seconds": 1.0 + cell.seed}))
    results = collect(comparison, {"fedmf, planted, seed 1": "stopped by a test"})
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="session")
def bench_report(bench_folder: Path) -> Path:
    """The report of the comparison."""
    return write_report(bench_folder)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """A function that opens a file in a new tab."""
    tabs: list[Tab] = []

    def open_tab(file: Path, **options: Any) -> Tab:
        tabs.append(Tab(browser, file, **{"viewport": {"width": 1100, "height": 900}, **options}))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()
