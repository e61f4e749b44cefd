"""Requests of nodes to forget: who may ask, once, and what the operator's log has of it."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tests.runtimes.node.nodes import write_node
from typer.testing import CliRunner

from perfedrec import ConfigError, Node
from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError, PerfedrecError
from perfedrec.data import load
from perfedrec.federation.certificates import make_key
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.requests import SignedRequest, accept, make, verify
from perfedrec.federation.signing import fingerprint_of, sign
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.runs import checkpoint
from perfedrec.runs.certificate import Certificate
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runtimes.flower.keys import private_key
from perfedrec.runtimes.node.file import NodeFile
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
    assert any("user is one of node n1: it was not checked" in each for each in found.not_covered)
    certificate = json.loads((run / f"forgotten-{request.nonce}.json").read_text())
    assert certificate == json.loads(found.text())
    with pytest.raises(ConfigError, match="was forgotten at"):
        accept(run, tmp_path / "ask", stored / "keys")
    last = Log(run).lines()[-1]
    assert (last["event"], last["by"]) == ("refused", "n1")


def test_another_node_cannot_ask_for_a_user(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    user, other = node.users()[:2]
    mine, theirs = (torch.tensor([int(node.export(each)["identity"])]) for each in (user, other))
    hosts = Hosts(run)
    hosts.add({"n0": mine})
    hosts.add({"n1": torch.cat([mine, theirs])})  # n0 is away: n1 does not get its user
    assert (hosts.of(int(mine)), hosts.of(int(theirs)), hosts.of(7)) == ("n0", "n1", None)
    make(node, user, stored / "keys" / "n1").write(tmp_path / "forged")
    with pytest.raises(ConfigError, match=r"node n1 has signed the request, and user \d+ of run .* is on node n0"):
        accept(run, tmp_path / "forged", stored / "keys")
    assert [line["event"] for line in Log(run).lines()] == ["refused"]
    assert not list(run.glob("forgotten-*"))
    make(node, user, stored / "keys" / "n0").write(tmp_path / "ask")
    (stored / "keys" / "n0.pub").rename(stored / "keys" / "ann.pub")
    with pytest.raises(ConfigError, match=r"is on node n0; .* has no n0.pub: if ann.pub is that key, name it n0.pub"):
        accept(run, tmp_path / "ask", stored / "keys")
    (stored / "keys" / "ann.pub").rename(stored / "keys" / "n0.pub")
    found = accept(run, tmp_path / "ask", stored / "keys")
    assert any("and the nodes of the run's users" in each for each in found.done)
    assert not any("was not checked" in each for each in found.not_covered)


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
    with pytest.raises(ConfigError, match="1 request of n0 was accepted within a day"):
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
    went_on = federation(tmp_path / "on", RunFolder(run).name(), left)
    empty = tmp_path / "empty"
    empty.mkdir()
    RunFolder(empty).write_name("g")
    for folder, said in (
        (items, "another catalogue of items"),
        (strangers, "nobody who took part in .* took part in it"),
        (other_keys, "its nodes have other keys"),
        (early, "it began before the request was made"),
        (simulated, "not a coordinator's run; expected the folder that perfedrec serve wrote"),
        (went_on, "it goes on with the run of the request; expected a run with a name of its own"),
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
    with pytest.raises(ConfigError, match="nothere: there is no such folder"):
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


@pytest.mark.parametrize(
    ("key", "request_file", "said"),
    [
        ("keys/n1", "ask", "is not the key with which this node works"),
        ("keys/n0.pub", "ask", "is no private key"),
        ("nothere", "ask", "nothere: cannot be read"),
        ("keys/n0", "missing/ask", "expected a new file"),
    ],
)
def test_nobody_is_deleted_without_a_request(
    key: str, request_file: str, said: str, node: Node, stored: Path, tmp_path: Path
) -> None:
    user, path = node.users()[0], tmp_path / "a.node"
    with NodeFile.open(path) as file:
        file.rules.use_key(fingerprint_of(stored / "keys" / "n0.pub"))
    words = ["node", "forget", "--store", path, "--user", user, "--request", tmp_path / request_file]
    asked = CliRunner().invoke(app, [str(each) for each in [*words, "--key", stored / key]])
    assert (asked.exit_code, said in asked.stderr) == (2, True), asked.stderr
    assert len(asked.stderr.splitlines()) == 1
    assert user in node.users()
    assert not (tmp_path / request_file).exists()
    words[-1] = tmp_path / "good"
    asked = CliRunner().invoke(app, [str(each) for each in [*words, "--key", stored / "keys" / "n0"]])
    assert asked.exit_code == 0, asked.output
    assert user not in node.users()


def test_a_file_that_is_no_request_is_refused(run: Path, stored: Path, tmp_path: Path) -> None:
    for content in ("", "[]", "5", "null", '{"format": "other"}'):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(ConfigError, match="no request can be read"):
            accept(run, tmp_path / "bad", stored / "keys")


@pytest.fixture
def signed(node: Node, run: Path, stored: Path, tmp_path: Path) -> Path:
    """A certificate that the operator has signed, about the request in the file ``ask``."""
    make_key(tmp_path / "operator")
    make(node, node.users()[0], stored / "keys" / "n0").write(tmp_path / "ask")
    found = accept(run, tmp_path / "ask", stored / "keys", signer=tmp_path / "operator")
    return run / f"forgotten-{found.run['request']}.json"


def test_an_owner_verifies_the_certificate_of_the_own_request(signed: Path, tmp_path: Path) -> None:
    found = verify(signed, tmp_path / "operator.pub", tmp_path / "ask")
    assert found.users == [str(SignedRequest.read(tmp_path / "ask").identity)]
    blob = base64.b64decode((tmp_path / "operator.pub").read_text().split()[1])
    assert found.signature["key"] == "SHA256:" + base64.b64encode(sha256(blob).digest()).decode().rstrip("=")


@pytest.mark.parametrize(
    "name", [each.name for each in fields(Certificate) if each.name not in ("format", "signature")]
)
def test_a_certificate_of_which_any_field_was_altered_is_refused(name: str, signed: Path, tmp_path: Path) -> None:
    content = json.loads(signed.read_text())
    value = content[name]
    if isinstance(value, list):
        content[name] = [*value, "more"]
    elif isinstance(value, dict):
        content[name] = {**value, next(iter(value), "more"): 7}
    else:
        content[name] = "other"
    signed.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="was altered after it was signed"):
        verify(signed, tmp_path / "operator.pub", tmp_path / "ask")
    content[name] = value
    signed.write_text(json.dumps(content, indent=3))  # spaces do not count
    verify(signed, tmp_path / "operator.pub", tmp_path / "ask")


def test_what_is_wrong_with_a_certificate_is_said(node: Node, signed: Path, stored: Path, tmp_path: Path) -> None:
    operator, ask = tmp_path / "operator.pub", tmp_path / "ask"
    with pytest.raises(
        ConfigError, match=r"signed with another key, SHA256:.*; expected SHA256:.*, the key in .*n1\.pub"
    ):
        verify(signed, stored / "keys" / "n1.pub", ask)
    with pytest.raises(ConfigError, match="expected the file of your request"):
        verify(signed, operator)
    make(node, node.users()[1], stored / "keys" / "n0").write(tmp_path / "second")
    with pytest.raises(ConfigError, match="is the certificate of another request"):
        verify(signed, operator, tmp_path / "second")
    text = signed.read_text()
    signed.write_text(text.replace('"users"', '"users": ["1"],\n "users"'))
    with pytest.raises(CheckpointError, match="a name stands in it twice"):
        verify(signed, operator, ask)
    signed.write_text(json.dumps(json.loads(text) | {"signature": {}}))
    with pytest.raises(ConfigError, match="is not signed"):
        verify(signed, operator, ask)
    simulated = replace(Certificate.read_file(signed), run={"folder": "run"})
    signed.write_text(sign(simulated, private_key(tmp_path / "operator")).text())
    assert verify(signed, operator).run == {"folder": "run"}
    with pytest.raises(ConfigError, match="is about a simulation"):
        verify(signed, operator, ask)


def test_a_certificate_can_be_signed_later_and_stays_as_it_is(
    node: Node, run: Path, stored: Path, tmp_path: Path
) -> None:
    user, other = node.users()[:2]
    make(node, user, stored / "keys" / "n0").write(tmp_path / "ask")
    without = federation(tmp_path / "without", "c", [int(node.export(other)["identity"])])
    found = accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), without)
    make_key(tmp_path / "operator")
    with pytest.raises(ConfigError, match="n1: is the key of node n1; expected a key of the operator alone"):
        accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), signer=stored / "keys" / "n1")
    again = accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), signer=tmp_path / "operator")
    assert replace(again, signature={}) == found
    file = run / f"forgotten-{found.run['request']}.json"
    assert verify(file, tmp_path / "operator.pub", tmp_path / "ask") == again
    assert [line["event"] for line in Log(run).lines()] == ["accepted", "done", "signed"]
    make_key(tmp_path / "second")
    with pytest.raises(ConfigError, match=r"is signed already, with SHA256:.*; expected one without a signature"):
        accept(run, tmp_path / "ask", stored / "keys", Limits(1.0), signer=tmp_path / "second")
    assert Certificate.read_file(file) == again
    assert len(Log(run).lines()) == 3


def test_the_commands_that_sign_and_verify(node: Node, run: Path, stored: Path, tmp_path: Path) -> None:
    def cli(*words: object) -> Result:
        return CliRunner().invoke(app, [str(each) for each in words])

    make(node, node.users()[0], stored / "keys" / "n0").write(tmp_path / "ask")
    made = cli("federation", "key", tmp_path / "operator", "--operator")
    given = cli("federation", "forget", run, "--request", tmp_path / "ask", "--keys", stored / "keys", "--sign")
    assert given.exit_code == 2
    words = ("federation", "forget", run, "--request", tmp_path / "ask", "--keys", stored / "keys")
    given = cli(*words, "--sign", tmp_path / "operator", "--json")
    assert given.exit_code == 0, given.output
    found = json.loads(given.stdout)
    assert found["signature"]["key"] in made.stdout
    path = run / f"forgotten-{found['run']['request']}.json"
    ours = ("node", "verify", path, "--operator", tmp_path / "operator.pub", "--request", tmp_path / "ask")
    checked = cli(*ours)
    assert checked.exit_code == 0, checked.output
    assert "signed with the key in" in checked.stdout
    assert json.loads(cli(*ours, "--json").stdout) == found
    path.write_text(path.read_text().replace(found["made"], "2020-01-01T00:00:00+00:00"))
    refused = cli(*ours)
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
