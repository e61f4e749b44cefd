"""What nodes write in their journals: one entry for each answer and each secure sum, whatever happens."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from tests.parity.deployment import Deployment
from tests.parity.federation import N_USERS, settings

from perfedrec.core.records import copied
from perfedrec.core.types import Plan
from perfedrec.privacy.ledger import gaussian_epsilon
from perfedrec.privacy.statement import AGAINST, PUBLIC, RECEIVED
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.flower import NodeApp, Owner
from perfedrec.runtimes.flower.diary import REPEATED, size
from perfedrec.runtimes.flower.node_loop import answer
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.node import Store
from perfedrec.runtimes.node.journal import JOIN, MODEL, SUM, Journal

SECURE: dict[str, Any] = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "min_clients": 3, "min_contributors": 2}
HOLDS_OUT = '[evaluation]\nhold_out = "leave-one-out"\n'


Sizes = dict[tuple[int, str], int]
"""Bytes to ("received") and from ("sent") each node, as they travelled."""


def played(folder: Path, rounds: int, configuration: str = "", **parts: Any) -> tuple[Deployment, list[Plan], Sizes]:
    """A federation in memory after some rounds, phases before training included; who was asked in each; and bytes."""
    found, plans = Deployment(settings(**{"pretraining": {"cluster_passes": 0}, **parts}), folder), list[Plan]()
    federation, sizes = found.coordinator.federation, Sizes()
    assert federation.setup is not None
    setup = replace(federation.setup, configuration=configuration)
    seen = replace(federation, setup=setup, witness=lambda state, plan, total: plans.append(plan))
    found.coordinator.federation = seen
    found.apps |= {node: partial(measured, sizes, node, found.apps[node]) for node in found.nodes}
    for _ in range(rounds):
        found.play()
    return found, plans, sizes


def measured(sizes: Sizes, node: int, app: Any, message: Message, context: Any) -> Message:
    """The app's answer, whose bytes are counted before the coordinator takes it apart."""
    found: Message = app(message, context)
    for name, content in (("received", message.content), ("sent", found.content if found.has_content() else None)):
        sizes[node, name] = sizes.get((node, name), 0) + (0 if content is None else size(content))
    return found


def journal(store: Store, user: str | None = None) -> list[dict[str, Any]]:
    """The journal, oldest first."""
    return store.journal.read(user)[::-1]


@dataclass(frozen=True)
class Begun:
    """A federation, whose ``entries`` by node and ``sizes`` are those of its first rounds. Tests may go on with it."""

    given: Deployment
    plans: list[Plan]
    sizes: Sizes
    entries: dict[int, list[dict[str, Any]]]


def begun(folder: Path, rounds: int, **parts: Any) -> Begun:
    given, plans, sizes = played(folder, rounds, **parts)
    given.coordinator.hand_out(given.flower)
    entries = {node: journal(store) for node, store in given.nodes.items()}
    return Begun(given, list(plans), dict(sizes), entries)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """With secure sums."""
    return begun(tmp_path_factory.mktemp("secure"), 7, privacy=SECURE)


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """With sums in the clear, and a neighbourhood service."""
    return begun(tmp_path_factory.mktemp("clear"), 3)


def last_asked(given: Deployment) -> Message:
    """The last message of a round to node 101."""
    asked = (each.message for each in reversed(given.grid.sent) if each.node == 101 and not each.up)
    return next(each for each in asked if each.metadata.message_type.startswith("train"))


def test_every_answer_is_in_the_journal(clear: Begun) -> None:
    given, plans, sizes = clear.given, clear.plans, clear.sizes
    asked = {plan.phase: 0 for plan in plans}
    for node, store in given.nodes.items():
        entries = clear.entries[node]
        first, degrees, *rounds, model = entries
        assert (model["phase"], model["users"], model["sent"]) == (MODEL, None, 0)
        hosted = given.hosts[node]
        assert (first["phase"], first["users"], first["others"]) == (JOIN, hosted.numel(), None)
        assert first["protection"] == {"profile": "none", "statement": PUBLIC}
        assert (degrees["phase"], degrees["round"], degrees["stage"], degrees["others"]) == ("degrees", -1, "unmask", 3)
        members = [plan for plan in plans if torch.isin(plan.cohort, hosted).any()]
        assert [each["phase"] for each in rounds] == [plan.phase for plan in members]
        for entry, plan in zip(rounds, members, strict=True):
            users = plan.cohort[torch.isin(plan.cohort, hosted)]
            assert (entry["users"], entry["others"], entry["times"], entry["refused"]) == (users.numel(), 0, 1, None)
            assert "sealed for the neighbourhood service" in entry["protection"]["statement"]
            assert entry["epsilon"] is None
            assert entry["against"] is None
            asked[plan.phase] += users.numel()
            names = [name for name, number in store.user_ids().items() if number in users.tolist()]
            own = {name: {each["entry"] for each in journal(store, name)} for name in store.user_ids()}
            assert [name for name in own if entry["entry"] in own[name]] == names
        assert sum(each["sent"] for each in entries) == sizes[node, "sent"]
        assert sum(each["received"] for each in entries) == sizes[node, "received"]
        totals = store.journal.totals()
        assert (totals["answers"], totals["refusals"]) == (len(entries), 0)
        assert totals["runs"][0]["sent"] == totals["sent"] == sizes[node, "sent"]
    assert asked == {"join": N_USERS, "train": 24}


def test_a_secure_sum_is_one_entry(secure: Begun) -> None:
    given, plans, sizes = secure.given, secure.plans, secure.sizes
    for node, entries in secure.entries.items():
        members = [plan for plan in plans if torch.isin(plan.cohort, given.hosts[node]).any()]
        assert [each["phase"] for each in entries] == [JOIN, *(plan.phase for plan in members), MODEL]
        for entry, plan in zip(entries[1:-1], members, strict=True):
            nodes = sum(bool(torch.isin(plan.cohort, users).any()) for users in given.hosts.values())
            assert (entry["stage"], entry["others"]) == ("unmask", nodes - 1)
            assert entry["users"] == int(torch.isin(plan.cohort, given.hosts[node]).sum())
            text = entry["protection"]["statement"]
            assert "nothing else of this node's part" in text
            assert "A sum over fewer than 3 users is not opened." in text
            opened = {"train": "64 columns", "spectral": "2 users or more have", "degrees": "opened in full"}
            assert opened.get(plan.phase, "opened in") in text
        assert sum(each["sent"] for each in entries) == sizes[node, "sent"]
        assert sum(each["received"] for each in entries) == sizes[node, "received"]
        model = entries[-1]
        assert (model["protection"]["statement"], model["users"], model["sent"]) == (RECEIVED, None, 0)
        assert model["received"] > 1000


def test_an_evaluation_is_an_entry(tmp_path: Path) -> None:
    given, _, _ = played(tmp_path, 3, HOLDS_OUT)
    given.coordinator.evaluate(given.algorithm.serving(given.flower), Question("valid", (5,), given.flower.round))
    found = [journal(store)[-1] for store in given.nodes.values()]
    assert {each["phase"] for each in found} == {"evaluate"}
    assert sum(each["users"] for each in found) == N_USERS
    assert {each["others"] for each in found} == {3}
    assert {"sums of metrics" in each["protection"]["statement"] for each in found} == {True}


def test_epsilon_is_that_of_the_answers_so_far(tmp_path: Path) -> None:
    noise = {"degrees": 6.0, "spectral": 5.0, "training": 4.0, "join": 3.0}
    private = {**SECURE, "noise": noise, "dropout_tolerance": 0.5}
    parts = {"selection": {"n_clients_per_round": 20, "max_participations": 9}, "clusters": {"n_clusters": 0}}
    given, _, _ = played(tmp_path, 8, privacy=private, **parts)
    name = next(iter(given.nodes[101].user_ids()))
    released = {"degrees": "degrees", "spectral": "spectral", "train": "training", "join": "join"}
    total, seen = 0.0, 0
    for entry in journal(given.nodes[101], name):
        if entry["phase"] == JOIN:
            assert entry["epsilon"] is None
            continue
        total += 1 / noise[released[entry["phase"]]] ** 2
        assert entry["epsilon"] == pytest.approx(gaussian_epsilon(sqrt(1 / total), 1e-5), rel=1e-6)
        assert entry["against"] == AGAINST
        assert "Epsilon is that of differential privacy for a user, at delta 1e-05." in entry["protection"]["statement"]
        seen += 1
    assert seen >= 6
    largest = max(each["epsilon"] or 0 for each in journal(given.nodes[101]))
    assert given.nodes[101].journal.totals()["runs"][0]["epsilon"] == largest >= entry["epsilon"]


def test_an_answer_that_is_sent_again_tells_nothing_new(clear: Begun) -> None:
    given = clear.given
    *_, before, model = journal(given.nodes[101])
    again = given.apps[101](last_asked(given), given.grid.contexts[101])
    assert not again.has_error()
    *_, after, still = journal(given.nodes[101])
    assert still == model
    assert after == {**before, "times": 2, "sent": before["sent"] + size(again.content), "received": after["received"]}


def test_a_round_that_is_summed_again_tells_nothing_new(secure: Begun) -> None:
    """The coordinator asks for a round a second time, in another secure sum with the same nodes."""
    given = secure.given
    state = copied(given.flower, torch.device("cpu"))
    given.play()
    before = {node: len(journal(store)) for node, store in given.nodes.items()}
    given.coordinator.play(state)
    for node, store in given.nodes.items():
        *_, first, again = journal(store)
        if len(journal(store)) > before[node]:
            assert (again["phase"], again["round"], again["users"]) == (first["phase"], first["round"], None)
            assert again["protection"]["statement"] == REPEATED
            assert all(each["entry"] != again["entry"] for name in store.user_ids() for each in journal(store, name))


def test_refusals_are_in_the_journal(clear: Begun) -> None:
    given = clear.given
    owner = Owner(coordinator="here:1")
    newer = partial(answer, NodeApp(given.nodes[101], lambda _: given.algorithm, "2", None, owner).app())
    last = last_asked(given)
    for _ in range(3):
        assert newer(last, given.grid.contexts[101]).has_error()
    entry = journal(given.nodes[101])[-1]
    assert entry["refused"] == "version: this node runs version 2, the coordinator 1"
    assert (entry["coordinator"], entry["run"], entry["phase"], entry["times"]) == ("here:1", "a run", "train", 3)
    assert (entry["sent"], entry["users"], entry["protection"]) == (0, None, None)
    assert given.nodes[101].journal.totals()["refusals"] == 3
    record = {**last.content["setup"], "run": "x" * 9000}
    strange = RecordDict({**last.content, "setup": ConfigRecord(record)})
    message = Message(strange, dst_node_id=101, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    assert newer(message, given.grid.contexts[101]).has_error()
    assert len(journal(given.nodes[101])[-1]["run"]) == 500


def test_a_secure_sum_that_a_node_refuses_is_one_entry(secure: Begun) -> None:
    given = secure.given
    entry = next(each for each in journal(given.nodes[101])[::-1] if each["stage"])
    messages = [
        each.message
        for each in given.grid.sent
        if each.node == 101 and not each.up and each.message.metadata.message_type.startswith("train")
    ][-4:]
    context = given.grid.contexts[101]
    assert [each.metadata.message_type for each in messages] == [f"train.{stage}" for stage in STAGES]
    for message in (messages[0], messages[2]):  # the shares are left out
        found = given.apps[101](message, context)
    assert found.has_error()
    refused = journal(given.nodes[101])[-1]
    assert refused["entry"] == entry["entry"] + 1
    assert "out of turn" in refused["refused"]
    assert (refused["stage"], refused["run"], refused["users"]) == ("keys", "a run", None)


def test_keys_alone_are_an_entry_without_a_phase(secure: Begun) -> None:
    given = secure.given
    first = [
        each.message
        for each in given.grid.sent
        if each.node == 101 and not each.up and each.message.metadata.message_type.startswith("train")
    ][-4]
    given.apps[101](first, given.grid.contexts[101])
    entry = journal(given.nodes[101])[-1]
    assert (entry["phase"], entry["stage"], entry["run"], entry["users"]) == (SUM, "keys", "a run", None)


@pytest.mark.parametrize("sums", ["secure", "in the clear"])
def test_what_cannot_be_written_is_not_sent(
    sums: str, secure: Begun, clear: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal and the answer are stored together, or neither is."""
    given = (secure if sums == "secure" else clear).given
    rounds, entries = given.nodes[101].status()["last_round"], len(journal(given.nodes[101]))
    real, broken = Journal.extend, list[str]()

    def extend(self: Journal, number: int, entry: Any) -> None:
        if entry.phase == "train" and entry.refused is None and self is given.nodes[101].journal:
            broken.append("here")
            raise sqlite3.OperationalError("no room")
        real(self, number, entry)

    monkeypatch.setattr(Journal, "extend", extend)
    given.coordinator.play(given.flower)
    monkeypatch.undo()
    assert broken == ["here"]
    assert given.nodes[101].status()["last_round"] == rounds
    assert {each.node for each in given.coordinator.rejected} == {101}
    given.coordinator.rejected.clear()
    assert [each["refused"] for each in journal(given.nodes[101])[entries:]] == ["failed: OperationalError: no room"]


def test_what_is_about_a_user_is_forgotten(clear: Begun) -> None:
    store = clear.given.nodes[101]
    name, before = next(iter(store.user_ids())), journal(store)
    assert journal(store, name)
    store.forget(name)
    assert journal(store) == before  # how many users were in an answer, and no word about who
    assert journal(store, name) == []
    with store._database.reading() as db:
        assert db.execute("SELECT count(DISTINCT user) FROM journal_users").fetchone()[0] == len(store.user_ids())
