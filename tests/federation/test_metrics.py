"""Metrics as Prometheus reads them, parsed by its own client."""

from __future__ import annotations

import ast
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import polars as pl
import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strictly
from prometheus_client.parser import text_string_to_metric_families
from tests.ports import reserved_port
from typer.testing import CliRunner

import perfedrec
from perfedrec.cli import app
from perfedrec.core.errors import ConfigError
from perfedrec.core.types import RoundReport
from perfedrec.federation.metrics import COORDINATOR, NODE, SERVICE, Source, Watch, exposed, of_node, of_service, plain
from perfedrec.runs.folder import Entry
from perfedrec.runtimes.flower import REASONS, Activity
from perfedrec.runtimes.node import Store
from perfedrec.web.request_metrics import METRICS

runner = CliRunner()
DOCUMENT = Path(__file__).parents[2] / "docs" / "deployment.md"
REPORT = RoundReport(0, "train", cohort=10, clients=10, loss=None, bytes_up=1000, bytes_up_max=400, bytes_down=5000)


def page(port: int, accept: str = "text/plain") -> str:
    with urlopen(Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}), timeout=600) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, float]:
    """All samples on a page, by name and labels as they are written."""
    found = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {name_of(each.name, each.labels): each.value for each in found}


def name_of(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inside}}}" if inside else name


class Only:
    """A collector of one source."""

    def __init__(self, source: Source) -> None:
        self.collect = source


def shown(source: Source) -> dict[str, float]:
    """The samples of one source, as the page shows them."""
    registry = CollectorRegistry()
    registry.register(Only(source))
    return samples(generate_latest(registry).decode())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with hosting(tmp_path / "a.db", {"ann": [0, 1, 2]}) as made:
        yield made


def hosting(path: Path, own: dict[str, list[int]]) -> Store:
    made = Store.create(path, np.arange(50))
    rows = [(user, item) for user, items in own.items() for item in items]
    made.import_interactions(pl.DataFrame(rows, schema=["user", "item"], orient="row"))
    return made


def watching(privacy: Any = None, **more: Any) -> tuple[Watch, Any, Any]:
    """A coordinator with two nodes and a service; n1 is not connected."""
    watch = Watch({1: "n0", 2: "n1", 9: "service"}, 6, 60.0, {"ca.crt": 3e9, "server.pem": 2e9})
    algorithm = SimpleNamespace(phases=("spectral",), releases=lambda rounds, users: [], settings=None)
    algorithm.settings = SimpleNamespace(privacy=SimpleNamespace(delta=1e-5))
    coordinator = SimpleNamespace(
        present={1, 9}, service=9, service_client=object(), directory=None, algorithm=algorithm, apart={}
    )
    return watch, SimpleNamespace(**{**vars(coordinator), **more}), SimpleNamespace(restarts=2)


def test_rounds_and_rejections_are_counted() -> None:
    watch, coordinator, link = watching()
    watch.begin(2, 1000.0)
    before = shown(lambda: watch.metrics(coordinator, link))
    assert before["perfedrec_coordinator_last_round_timestamp_seconds"] == 1000.0
    assert before["perfedrec_coordinator_rounds_done"] == 2
    watch.count(Entry(replace(REPORT, round=2), 0.5), [], 1001.0)
    watch.count(Entry(replace(REPORT, round=3, clients=7), 2.5), [("n1", "late"), ("n0", "not finite")], 1004.0)
    watch.count(Entry(replace(REPORT, round=4, clients=0, aborted="too few"), 900.0), [("n1", "late")], 1904.0)
    after = shown(lambda: watch.metrics(coordinator, link))
    start = "perfedrec_coordinator_"
    values = {name.removeprefix(start): value for name, value in after.items() if value and name.startswith(start)}
    assert values == {
        "rounds_planned": 6,
        "rounds_done": 5,
        'rounds_total{outcome="complete"}': 1,
        'rounds_total{outcome="partial"}': 1,
        'rounds_total{outcome="aborted"}': 1,
        **{f'round_seconds_bucket{{le="{limit}"}}': 1 for limit in ("0.5", "1.0", "2.0")},
        **{f'round_seconds_bucket{{le="{limit}"}}': 2 for limit in ("5.0", "10.0", "20.0", "60.0", "120.0", "300.0")},
        'round_seconds_bucket{le="600.0"}': 2,
        'round_seconds_bucket{le="+Inf"}': 3,
        "round_seconds_count": 3,
        "round_seconds_sum": 903,
        "last_round_timestamp_seconds": 1904,
        "deadline_seconds": 60,
        "asked_clients_total": 30,
        "answered_clients_total": 17,
        "received_bytes_total": 3000,
        "sent_bytes_total": 15000,
        'rejections_total{node="n0",reason="not finite"}': 1,
        'rejections_total{node="n1",reason="late"}': 2,
        'node_connected{node="n0"}': 1,
        'node_connected{node="service"}': 1,
        'node_counts{node="n0"}': 1,
        'node_counts{node="n1"}': 1,
        "superlink_restarts_total": 2,
        'certificate_expiry_timestamp_seconds{certificate="ca.crt"}': 3e9,
        'certificate_expiry_timestamp_seconds{certificate="server.pem"}': 2e9,
    }
    assert after['perfedrec_coordinator_node_connected{node="n1"}'] == 0
    assert before.keys() == after.keys()  # every series is there from the start, so that an alert sees it grow
    assert len([name for name in after if "rejections" in name]) == 3 * len(REASONS)


def test_the_last_evaluation_is_shown_and_json_has_the_same_figures() -> None:
    watch, coordinator, link = watching()
    watch.begin(2, 1000.0, {"ndcg@20": 0.1, "recall@20": 0.2, "users": 7.0})
    watch.count(Entry(replace(REPORT, round=2), 0.5, {"ndcg@20": 0.3, "users": 7.0}), [("n1", "late")], 1001.0)
    watch.count(Entry(replace(REPORT, round=3), 2.5), [], 1004.0)  # a round that is not evaluated
    found = shown(lambda: watch.metrics(coordinator, link))
    assert {name: value for name, value in found.items() if "validation" in name} == {
        'perfedrec_coordinator_validation{metric="ndcg@20"}': 0.3
    }
    told = plain(COORDINATOR, watch.figures(coordinator, link))
    assert as_samples("coordinator", told) == {
        name: value
        for name, value in found.items()
        if "_bucket" not in name and (value or not re.search(r"_total\{", name))
    }


def as_samples(role: str, told: dict[str, Any]) -> dict[str, float]:
    """Figures as status.json has them, as the page of metrics has them; without the classes of histograms."""
    samples: dict[str, float] = {}
    for name, figure in told.items():
        if isinstance(figure, dict):
            samples |= {f"perfedrec_{role}_{name}_{part}": value for part, value in figure.items()}
        elif isinstance(figure, list):
            for each in figure:
                labels = {key: value for key, value in each.items() if key != "value"}
                samples[name_of(f"perfedrec_{role}_{name}", labels)] = each["value"]
        else:
            samples[f"perfedrec_{role}_{name}"] = figure
    return samples


def test_a_service_that_has_no_work_is_not_reported_as_missing() -> None:
    watch, coordinator, link = watching(service_client=None, present={1})
    found = shown(lambda: watch.metrics(coordinator, link))
    connected = {name: value for name, value in found.items() if "node_connected" in name}
    name = 'perfedrec_coordinator_node_connected{{node="{}"}}'.format
    assert connected == {name("n0"): 1, name("n1"): 0}


def test_epsilon_is_that_of_the_rounds_that_were_played() -> None:
    config = perfedrec.configure("recommended", privacy="private", overrides=["run.rounds=50"])
    algorithm = config.build()
    directory = SimpleNamespace(identities=torch.arange(5000))
    watch, coordinator, link = watching(directory=directory, algorithm=algorithm)
    watch.planned = len(algorithm.phases) + 50
    found = []
    for trained in (0, 1, 50):
        watch.begin(len(algorithm.phases) + trained, 0.0)
        each = shown(lambda: watch.metrics(coordinator, link))
        found.append(each["perfedrec_coordinator_epsilon"])
        assert each["perfedrec_coordinator_epsilon_planned"] == pytest.approx(8.0)
    assert 0 < found[0] < found[1] < found[2] == pytest.approx(8.0)
    algorithm = perfedrec.configure("recommended", privacy="secure").build()
    watch, coordinator, link = watching(directory=directory, algorithm=algorithm)
    assert "perfedrec_coordinator_epsilon" not in shown(lambda: watch.metrics(coordinator, link))


def test_reasons_that_a_node_makes_up_add_no_series() -> None:
    watch, coordinator, link = watching()
    watch.begin(0, 0.0)
    before = shown(lambda: watch.metrics(coordinator, link))
    made_up = [("n0", f"{word} {number}") for number in range(50) for word in ("code", "lie", 'late"} 1\n')]
    watch.count(Entry(REPORT, 1.0), [*made_up, ("stranger", "late"), ("n0", "late\n"), ("n1", "late")], 0.0)
    after = shown(lambda: watch.metrics(coordinator, link))
    assert after.keys() == before.keys()
    counted = {name: value for name, value in after.items() if "rejections" in name and value}
    name = 'perfedrec_coordinator_rejections_total{{node="{}",reason="{}"}}'.format
    assert counted == {name("n0", "code"): 50, name("n0", "other"): 101, name("n1", "late"): 1}


def test_every_reason_that_the_package_gives_is_counted_by_its_name() -> None:
    given = set[str]()
    for path in Path(perfedrec.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UploadError":
                given |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert {"version", "not finite"} <= given <= set(REASONS)


def test_a_node_shows_its_work_and_how_many_users_it_has(store: Store) -> None:
    work = Activity()
    assert shown(lambda: of_node(work, store)) == {
        "perfedrec_node_connected": 0,
        "perfedrec_node_rounds_total": 0,
        "perfedrec_node_computing_seconds_total": 0,
        "perfedrec_node_users": 1,
        **{f'perfedrec_node_refusals_total{{reason="{reason}"}}': 0 for reason in REASONS},
    }
    work.connected, work.seconds, work.answered = True, 1.5, 1e9
    work.play("a", 0)
    work.play("a", 0)  # asked again
    work.play("b", 0)
    work.refused["version"] += 1
    before = int(time.time())
    store.receive(Served(torch.zeros(2, 3)), torch.zeros(0, dtype=torch.int64), "b", 1, "")
    found = shown(lambda: of_node(work, store))
    assert before <= found.pop("perfedrec_node_model_timestamp_seconds") <= time.time()
    assert {name.removeprefix("perfedrec_node_"): value for name, value in found.items() if value} == {
        "connected": 1,
        "rounds_total": 2,
        "computing_seconds_total": 1.5,
        "last_answer_timestamp_seconds": 1e9,
        "users": 1,
        'refusals_total{reason="version"}': 1,
    }
    assert found["perfedrec_node_last_round"] == 0
    service = shown(lambda: of_service(work))
    assert service == {
        name.replace("node", "service"): value for name, value in found.items() if name != "perfedrec_node_users"
    }


@dataclass
class Served:
    items: torch.Tensor


def test_a_node_shows_nothing_of_what_its_users_have(store: Store, tmp_path: Path) -> None:
    """Two nodes of one user each; all that they have in common is that they were asked in the same rounds."""
    work = Activity(rounds=3, last=("a", 4), seconds=1.0, answered=1e9, connected=True)
    with hosting(tmp_path / "b.db", {"somebody else": list(range(7, 50))}) as other:
        assert shown(lambda: of_node(work, store)) == shown(lambda: of_node(work, other))
        assert "ann" not in str(shown(lambda: of_node(work, store)))
        other.import_interactions(pl.DataFrame({"user": ["a third"], "item": [1]}))
        assert shown(lambda: of_node(work, other))["perfedrec_node_users"] == 2


def test_metrics_of_a_node_can_be_read_while_it_computes_a_round(store: Store) -> None:
    found = list[dict[str, float]]()

    def work() -> bytes:
        looker = threading.Thread(target=lambda: found.append(shown(lambda: of_node(Activity(), store))))
        looker.start()
        looker.join()
        return b"done"

    store.join_run(None, "a run")  # type: ignore[arg-type]
    assert store.answer_round(0, b"", work) == b"done"
    assert [each["perfedrec_node_users"] for each in found] == [1]
    store.path.unlink()
    assert "perfedrec_node_users" not in shown(lambda: of_node(Activity(), store))


def test_the_page_is_for_this_machine_and_has_the_process_on_it() -> None:
    watch, coordinator, link = watching()
    port = reserved_port()
    with exposed(port) as expose:
        expose(lambda: watch.metrics(coordinator, link))
        families = {each.name: each for each in strictly(page(port, "application/openmetrics-text; version=1.0.0"))}
        assert families["process_cpu_seconds"].samples[0].value > 0
        assert families["process_resident_memory_bytes"].samples[0].value > 1e6
        start, told = "perfedrec_coordinator_", {name.partition("{")[0]: text for name, text in COORDINATOR.items()}
        assert {name: each.documentation for name, each in families.items() if name.startswith(start)} == {
            start + name.removesuffix("_total"): text for name, text in told.items()
        }
        with socket.create_server(("127.0.0.2", port)):  # free: the page is on 127.0.0.1, not on all addresses
            pass
    with socket.create_server(("127.0.0.1", port)):
        pass
    with exposed(port):  # nor is anything left of the first page
        assert "perfedrec" not in page(port)
    assert not [name for name in REGISTRY._names_to_collectors if "perfedrec" in name]


def test_all_metrics_are_documented() -> None:
    """Each metric has a line in the table, with its labels, and no other is named there or in the rules."""
    named = set(re.findall(r"`(perfedrec_[a-z_]+(?:\{[a-z,]+\})?)`", DOCUMENT.read_text(encoding="utf-8")))
    roles = (("coordinator", COORDINATOR), ("node", NODE), ("service", SERVICE))
    assert named == {f"perfedrec_{role}_{key}" for role, texts in roles for key in texts} | set(METRICS)
    rules = set(re.findall(r"\bperfedrec_[a-z_]+", DOCUMENT.read_text(encoding="utf-8")))
    suffixes = {f"{name}{suffix}" for name in ("perfedrec_coordinator_round_seconds",) for suffix in ("_sum", "_count")}
    assert rules <= {name.partition("{")[0] for name in named} | suffixes


def test_without_a_port_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with exposed(None) as expose:
        expose(lambda: pytest.fail("nobody asked"))
    with pytest.raises(ConfigError, match=r"--metrics-port needs the extra flower, which is not installed"), exposed(1):
        pass


def commands(folder: Path) -> Iterator[list[str]]:
    connection = ["--coordinator", "h:1", "--ca", "c", "--key", "k"]
    yield ["node", "run", "--store", str(folder / "n.db"), *connection]
    yield ["service", "run", "--state", str(folder / "service"), *connection]
    files = ["--certificates", str(folder / "certificates"), "--nodes", str(folder / "keys")]
    yield ["serve", "--output", str(folder / "run"), "--catalogue", str(folder / "items.txt"), *files]
    yield ["federation", "up", "--output", str(folder / "up")]


def test_a_port_that_cannot_be_used_is_reported_in_one_line_before_anything_starts(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        for command in commands(folder):
            for port, said in (
                (number, f"--metrics-port {number}: cannot be listened on (Address already in use); expected a free"),
                (0, "--metrics-port 0: expected a port, a number from 1 to 65535"),
                (65536, "--metrics-port 65536: expected a port"),
                (-1, "--metrics-port -1: expected a port"),
            ):
                refused = runner.invoke(app, [*command, "--metrics-port", str(port)])
                assert refused.exit_code == 2, refused.output
                assert refused.stderr.startswith(f"error: {said}")
                assert refused.stderr.count("\n") == 1
    refused = runner.invoke(app, [*list(commands(folder))[2], "--port", "18000", "--metrics-port", "18000"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "expected two ports" in refused.stderr
    assert not folder.exists()
