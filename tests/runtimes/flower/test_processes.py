"""A federation of real processes, under TLS and with keys, computes what the simulator computes, and its coordinator
keeps nothing that is for the neighbourhood service."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ports import reserved_port
from tests.web.test_node_pages import Home
from torch import Tensor
from typer.testing import CliRunner

from perfedrec import Node
from perfedrec.cli import app
from perfedrec.core.records import flatten
from perfedrec.data import read_catalogue
from perfedrec.federation import local
from perfedrec.federation.bundles import BUNDLE, KEYS, read_bundle
from perfedrec.federation.certificates import make_certificates
from perfedrec.federation.coordinator import Deployment, Terms, serve
from perfedrec.federation.service import StateStore
from perfedrec.runs import checkpoint, config
from perfedrec.runs.config import open_data
from perfedrec.runs.engine import engine
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Quiet
from perfedrec.runtimes.flower import Coordinator
from perfedrec.runtimes.flower.codec import pack
from perfedrec.runtimes.flower.sealing import unseal
from perfedrec.runtimes.node import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SECRET, NAME = bytes(range(32)), "a run"
SMALL = ["model.embedding_dim=8", "pretraining.passes=1", "clusters.n_clusters=2", "clusters.start=1"]
SMALL += ["evaluation.hold_out=none"]


def draws(folder: Path, algorithm: Any) -> int:
    """The seed of all draws of nodes that share a secret, in a run of that name."""
    with Store.open(folder / "nodes" / "n0" / "store.db") as store:
        return store.join_run(algorithm, NAME)


@pytest.mark.parametrize(
    ("users", "nodes", "rounds", "host"), [(3, 3, 2, "127.0.0.1"), (24, 2, 3, "::1")], ids=["one user a node", "many"]
)
def test_processes_compute_the_tables_of_the_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: int, nodes: int, rounds: int, host: str
) -> None:
    """Also over IPv6, with a certificate whose first name is none of this machine, and where there is a proxy for other
    machines."""
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.1:9")
    size = f"data.path=synthetic:users={users},items=200,interactions_per_user=8,clusters=2"
    cohort = f"selection.n_clients_per_round={max(users - 2, 2)}"
    given = config.load("recommended", None, [size, cohort, *SMALL], run__rounds=rounds)
    dataset = open_data(given.data)
    folder = tmp_path / "federation"
    local.lay_out(folder, dataset, nodes, secret=SECRET)
    make_certificates(folder / "certificates", ["fed.example.org", host])
    seed = draws(folder, given.build())
    given = given.model_copy(update={"run": given.run.model_copy(update={"seed": seed})})

    port, lines = reserved_port(), list[str]()
    with local.nodes(folder, port, service=True, host=host):
        terms = Terms(f"[{host}]" if ":" in host else host, port, min_nodes=nodes, wait=900, deadline=900)
        ids = read_catalogue(folder / local.CATALOGUE)
        files, keys = folder / "certificates", folder / "keys"
        deployment = Deployment(given, ids, tmp_path / "run", files, keys, terms, name=NAME)
        summary = serve(deployment, Quiet(), lines.append)

    state = as_simulated(given, dataset, folder, tmp_path / "run")
    assert sorted(summary.nodes_with_model or ()) == sorted(f"n{number}" for number in range(nodes))
    assert not (tmp_path / "run" / "rejections.jsonl").exists(), lines
    assert json.loads((tmp_path / "run" / "result.json").read_text())["users"] == users

    answers = 0  # the lot, and so which node trains, depends on clusters, which depend on the service's random tokens
    for number in range(nodes):  # what each owner sees on a page
        with Node.open(folder / "nodes" / f"n{number}" / "store.db") as node:
            assert {each["coordinator"] for each in node.journal()} == {str(terms.address)}
            trained, left = sum(each["phase"] == "train" for each in node.journal()), Home(node).text("/left")
        assert ("Helped to train the model" in left) == (trained > 0)
        assert "Received the model that your lists come from" in left
        answers += trained
    assert answers == rounds * 2  # two nodes in each round: the two users of a cohort, or all nodes

    with Store.open(folder / "nodes" / "n0" / "store.db") as store:
        served = store.broadcast(given.build().broadcast_type, store.everyone()[:1])
    assert torch.equal(served.neighbours, state.neighbours)
    nothing_for_the_service(folder, tmp_path / "run", state.service, dataset.train.n_items)


def as_simulated(given: Any, dataset: Any, folder: Path, run: Path) -> Any:
    """The tables and cohorts of a run are the simulator's, bit for bit, and so is what the service has and publishes.

    Returns the simulator's state.
    """
    simulated: Any = engine(given.build(), dataset, seed=given.run.seed, device="cpu")
    bundle = read_bundle(folder / "nodes" / "n0" / BUNDLE)
    tokens = bundle.tokens(dataset.train.n_items)
    simulated.state = replace(simulated.state, tokens=tokens)
    reports = [simulated.play() for _ in range(simulated.n_phases + given.run.rounds)]
    assert [each.report.clients for each in RunFolder(run).history()] == [each.clients for each in reports]
    newest = checkpoint.load(checkpoint.folders(run / "checkpoints")[0])
    elsewhere = ("service.", "tokens", "neighbours", "low_rank.")  # which the coordinator does not have
    expected = {name: each for name, each in flatten(simulated.state)[0].items() if not name.startswith(elsewhere)}
    found = {name: each for name, each in newest.records["state"][0].items() if not name.startswith("service.")}
    assert found.keys() == expected.keys()
    assert max(float((found[name].double() - expected[name].double()).abs().max()) for name in found) == 0.0
    assert float(expected["offsets"].abs().max()) > 0
    assert torch.equal(newest.records["roll"][0]["users"], torch.arange(dataset.n_users))
    kept = flatten(StateStore(folder / "service").get(NAME, simulated.state.round, simulated.state.service))[0]
    own = flatten(simulated.state.service)[0]
    assert kept.keys() == own.keys()
    assert all(torch.equal(kept[name], own[name]) for name in own)
    sealed = pack({"sealed": newest.records["mediator"][0]["neighbours"]})
    assert torch.equal(unseal(sealed, bundle.common, "neighbours")["neighbours"][:, tokens], simulated.state.neighbours)
    return simulated.state


def nothing_for_the_service(folder: Path, run: Path, held: Any, n_items: int) -> None:
    """The coordinator's disk has nothing that is for the service or the nodes. The same searches find it where it
    belongs."""
    coordinator, service = content(run), content(folder / "service")
    graph = held.graph.by_user  # a list of few items, or out of few, may be there by chance among the rows touched
    several = graph.starts.diff(append=torch.tensor([graph.columns.numel()])) > 1  # layer 1 of one item can be its row
    vectors = torch.cat([held.reports[:, 0], held.reports[several, 1]])
    rows = [each.numpy().tobytes() for each in vectors if each.any()]
    lists = [each for each in graph.columns.tensor_split(graph.starts[1:]) if len(each) > 4 and n_items > 30]
    edges = [form for each in lists for form in forms(each)]
    assert sum(each in service for each in rows) == len(rows) >= len(held.reports)
    assert sum(each in service for each in edges) == len(lists)
    assert len(lists) == (11 if n_items > 30 else 0)
    assert sum(each in coordinator for each in rows + edges) == 0
    bundle, keys = read_bundle(folder / "nodes" / "n0" / BUNDLE), json.loads((folder / "service" / KEYS).read_text())
    tokens = bundle.tokens(n_items)
    secrets = [bundle.secret, bundle.common, *forms(tokens), *forms(tokens.argsort())]
    assert sum(each in service or each.hex().encode() in service for each in secrets) == 0
    secrets.append(bytes.fromhex(keys["private"]))
    assert sum(each in coordinator or each.hex().encode() in coordinator for each in secrets) == 0
    for path in (folder / "nodes" / "n0" / BUNDLE, folder / "service" / KEYS):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "service").stat().st_mode) == 0o700


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def forms(numbers: Tensor) -> list[bytes]:
    """The bytes of whole numbers as they are stored and as they travel."""
    return [numbers.to(kind).numpy().tobytes() for kind in (torch.int64, torch.int32)]


def test_under_profile_private_the_nodes_of_federation_up_draw_with_opendp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node loads OpenDP when it draws noise: not when it joins, but before the end."""
    nodes, begin, seen = local.nodes, Coordinator.begin, list[list[bool]]()
    processes: list[subprocess.Popen[bytes]] = []

    def look() -> None:
        seen.append(["/opendp/lib/" in Path(f"/proc/{each.pid}/maps").read_text() for each in processes])

    @contextmanager
    def watched(*given: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
        with nodes(*given) as found:
            processes.extend(found)
            yield found
            look()

    def joined(coordinator: Coordinator) -> Any:
        look()
        return begin(coordinator)

    monkeypatch.setattr(local, "nodes", watched)
    monkeypatch.setattr(Coordinator, "begin", joined)
    data = "synthetic:users=12,items=40,interactions_per_user=8,clusters=2"
    options = ["--nodes", "3", "--data", data, "--privacy", "private", "--set", "pretraining.passes=1"]
    options += ["--set", "privacy.min_clients=2", "--keep-sums", "--deadline", "900"]
    ended = CliRunner().invoke(
        app, ["federation", "up", "--output", str(tmp_path / "up"), *options, "--quiet", "--json"]
    )
    assert ended.exit_code == 0, ended.output
    assert seen == [[False] * 3, [True] * 3]
    summary = json.loads((tmp_path / "up" / "run" / "result.json").read_text())
    assert summary["privacy"]["noise_source"] == "OpenDP"
    assert summary["privacy"]["audit"] == "none so far"  # the sums were kept
    assert (summary["users"], sorted(summary["nodes_with_model"])) == (12, ["n0", "n1", "n2"])
    assert [each.report.clients for each in RunFolder(tmp_path / "up" / "run").history()] == [12, 12]
    assert not (tmp_path / "up" / "run" / "rejections.jsonl").exists()
    files = ["--nodes", str(tmp_path / "up" / "nodes")]
    attacked = CliRunner().invoke(app, ["audit", str(tmp_path / "up" / "run"), *files, "--json"])
    assert attacked.exit_code == 0, attacked.output
    found = {each["attack"]: each["value"] for each in json.loads(attacked.stdout)["findings"]}
    assert found["collinear rows of passes"] == 0
