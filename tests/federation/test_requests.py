"""Requests of nodes to forget: who may ask, once, and what the operator's log has of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.runtimes.node.nodes import write_node
from typer.testing import CliRunner

from perfedrec import ConfigError, Node
from perfedrec.cli import app
from perfedrec.core.errors import PerfedrecError
from perfedrec.data import load
from perfedrec.federation.certificates import make_key
from perfedrec.federation.requests import SignedRequest, accept, make
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.runs import checkpoint
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runtimes.simulator import Simulator


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's file with users after a round, and keys of two nodes and of a stranger."""
    folder = tmp_path_factory.mktemp("node")
    dataset = load("synthetic:users=40,items=100,interactions_per_user=6,seed=4")
    settings = FedMF.Options.model_validate({"model": {"embedding_dim": 4}, "selection": {"n_clients_per_round": 40}})
    simulator = Simulator(FedMF(settings), dataset, seed=5, device="cpu")
    simulator.play()
    write_node(simulator, dataset, torch.tensor([3, 11, 30]), 1, folder / "a.node")
    for name in ("n0", "n1"):
        make_key(folder / "keys" / name)
    make_key(folder / "stranger")
    return folder


@pytest.fixture
def node(stored: Path, tmp_path: Path) -> Node:
    path = tmp_path / "a.node"
    path.write_bytes((stored / "a.node").read_bytes())
    return Node.open(path)


def federation(folder: Path, name: str, users: list[int], catalogue: str = "films") -> Path:
    """What a request needs of the folder of a federation's run: its name, its catalogue, and who took part."""
    folder.mkdir()
    RunFolder(folder).write_name(name)
    belongs = {"catalogue": catalogue}
    checkpoint.save(folder / "model", {"roll": {"users": torch.tensor(sorted(users))}}, belongs, {})
    return folder


@pytest.fixture
def run(node: Node, tmp_path: Path) -> Path:
    numbers = [int(node.export(user)["identity"]) for user in node.users()]
    return federation(tmp_path / "run", str(node.status()["run"]), numbers)


def test_a_request_is_accepted_noted_and_certified(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    user = node.users()[0]
    request = make(node, user, stored / "keys" / "n1")
    request.write(tmp_path / "ask")
    assert SignedRequest.read(tmp_path / "ask") == request
    found = accept(run, tmp_path / "ask", stored / "keys")
    assert found.users == [str(node.export(user)["identity"])]
    assert found.method == "no further part"
    assert any("the model" in each for each in found.not_covered)
    lines = Log(run).lines()
    assert [line["event"] for line in lines] == ["accepted", "done"]
    assert lines[0]["by"] == "n1"
    assert lines[0]["nonce"] == request.nonce
    certificate = json.loads((run / f"forgotten-{request.nonce}.json").read_text())
    assert certificate == json.loads(found.text())
    with pytest.raises(ConfigError, match="was forgotten at"):
        accept(run, tmp_path / "ask", stored / "keys")
    last = Log(run).lines()[-1]
    assert (last["event"], last["by"]) == ("refused", "n1")


@pytest.mark.parametrize("change", ["identity", "run", "made", "nonce"])
def test_a_request_that_was_changed_is_refused(
    change: str, node: Node, run: Path, stored: Path, tmp_path: Path
) -> None:
    request = make(node, node.users()[0], stored / "keys" / "n0")
    other = int(node.export(node.users()[1])["identity"])
    values = {"identity": other, "run": "another", "made": "2020-01-01T00:00:00+00:00", "nonce": "0" * 32}
    replace(request, **{change: values[change]}).write(tmp_path / "ask")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="signed with no key"):
        accept(run, tmp_path / "ask", stored / "keys")
    (line,) = Log(run).lines()
    assert line["event"] == "refused"


def test_only_registered_nodes_ask_and_only_for_users_of_the_run(
    node: Node, run: Path, stored: Path, tmp_path: Path
) -> None:
    make(node, node.users()[0], stored / "stranger").write(tmp_path / "stranger")
    with pytest.raises(ConfigError, match="signed with no key"):
        accept(run, tmp_path / "stranger", stored / "keys")
    make(node, node.users()[0], stored / "keys" / "n0").write(tmp_path / "ask")
    with pytest.raises(ConfigError, match="took no part in run"):
        accept(federation(tmp_path / "b", RunFolder(run).name(), [1, 2]), tmp_path / "ask", stored / "keys")
    with pytest.raises(ConfigError, match="expected other"):
        accept(federation(tmp_path / "c", "other", [1, 2]), tmp_path / "ask", stored / "keys")


def test_requests_are_limited_for_each_node_and_in_all(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    first, second, _ = node.users()
    for user in (first, second):
        make(node, user, stored / "keys" / "n0").write(tmp_path / user)
    accept(run, tmp_path / first, stored / "keys", Limits(share=1.0, per_day=1))
    with pytest.raises(ConfigError, match="1 requests of n0 were accepted within a day"):
        accept(run, tmp_path / second, stored / "keys", Limits(share=1.0, per_day=1))
    with pytest.raises(ConfigError, match="2 of 3 users would be forgotten; expected at most 1"):
        accept(run, tmp_path / second, stored / "keys", Limits(share=0.34))
    accept(run, tmp_path / second, stored / "keys", Limits(share=1.0))


def test_a_new_run_is_certified_where_the_user_took_no_part(
    node: Node, run: Path, stored: Path, tmp_path: Path
) -> None:
    user, other = node.users()[:2]
    numbers = [int(node.export(each)["identity"]) for each in (user, other)]
    make(node, user, stored / "keys" / "n0").write(tmp_path / "ask")
    with pytest.raises(ConfigError, match="took part in this run as well"):
        accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), federation(tmp_path / "same", "b", numbers))
    without = federation(tmp_path / "without", "c", numbers[1:])
    accept(run, tmp_path / "ask", stored / "keys", Limits(1.0))
    found = accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), without)
    assert [line["event"] for line in Log(run).lines()] == ["accepted", "done", "done"]
    assert found.method == "new run"
    assert found.exact == ["the whole model of the new run"]


def test_a_run_of_another_federation_is_not_certified(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    user, other = node.users()[:2]
    left, keys = [int(node.export(other)["identity"])], stored / "keys"
    make(node, user, keys / "n0").write(tmp_path / "ask")
    items = federation(tmp_path / "items", "b", left, "books")
    strangers = federation(tmp_path / "strangers", "c", [1, 2])
    other_keys = federation(tmp_path / "keys", "d", left)
    make_key(tmp_path / "theirs" / "n0")
    (other_keys / "status.json").write_text(json.dumps({"keys": str(tmp_path / "theirs")}))
    early = federation(tmp_path / "early", "e", left)
    os.utime(early / "name", (1e9, 1e9))
    simulated = federation(tmp_path / "simulated", "f", left)
    (simulated / "name").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    RunFolder(empty).write_name("g")
    for folder, said in (
        (items, "another catalogue of items"),
        (strangers, "nobody who took part in .* took part in it"),
        (other_keys, "its nodes have other keys"),
        (early, "it began before the request was made"),
        (simulated, "not a coordinator's run; expected the folder that perfedrec serve wrote"),
        (empty, "neither a model nor a checkpoint"),
        (tmp_path / "missing", "there is no such folder"),
    ):
        with pytest.raises(PerfedrecError, match=said) as caught:
            accept(run, tmp_path / "ask", keys, Limits(1.0), folder)
        assert "--output" not in str(caught.value)
    assert not Log(run).lines()
    assert not list(run.glob("forgotten-*"))
    (other_keys / "status.json").write_text(json.dumps({"keys": str(keys)}))
    assert accept(run, tmp_path / "ask", keys, Limits(1.0), other_keys).method == "new run"


def test_a_mistake_of_the_operator_is_not_noted(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    make(node, node.users()[0], stored / "keys" / "n0").write(tmp_path / "ask")
    with pytest.raises(ConfigError, match="no public keys of nodes are there"):
        accept(run, tmp_path / "ask", tmp_path / "nothere")
    assert not Log(run).path.exists()


def test_the_commands_of_node_and_operator(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    user, key = node.users()[0], stored / "keys" / "n0"
    identity, path = node.export(user)["identity"], tmp_path / "a.node"
    asked = CliRunner().invoke(app, ["node", "forget", "--store", str(path), "--user", user, "--request", "x"])
    assert "expected both --request and --key" in asked.stderr
    assert user in node.users()
    words = ["node", "forget", "--store", str(path), "--user", user, "--request", str(tmp_path / "ask")]
    asked = CliRunner().invoke(app, [*words, "--key", str(key)])
    assert asked.exit_code == 0, asked.output
    assert user not in node.users()
    words = ["federation", "forget", str(run), "--request", str(tmp_path / "ask"), "--keys", str(stored / "keys")]
    answer = CliRunner().invoke(app, [*words, "--max-share", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["users"] == [str(identity)]


def test_a_file_that_is_no_request_is_refused(run: Path, stored: Path, tmp_path: Path) -> None:
    for content in ("", "[]", '{"format": "other"}'):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(ConfigError, match="no request can be read"):
            accept(run, tmp_path / "bad", stored / "keys")
