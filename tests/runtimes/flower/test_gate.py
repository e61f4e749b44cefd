"""Nodes that do not count: they are in no sum, get the model unless they are excluded, and are told why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from tests.runtimes.flower.test_coordinator import (
    ALGORITHM,
    ALONE,
    N_USERS,
    PARTS,
    SECURE,
    assembled,
    change,
    coordinator,
    store,
)

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.records import copied, flatten
from perfedrec.federation.unusual import standing_out
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.flower import Apart, Coordinator, UploadError
from perfedrec.runtimes.flower.gate import TOLD, told
from perfedrec.runtimes.node import Store

HELD, EXCLUDED = Apart("held", "it claims too much"), Apart("excluded", "the operator has excluded it", excluded=True)


class Keeper:
    """A gate that the test opens and closes."""

    def __init__(self) -> None:
        self.states, self.claimed, self.most = dict[int, Apart](), dict[int, int](), 1_000_000

    def apart(self) -> Mapping[int, Apart]:
        return self.states

    def claim(self, node: int, users: int) -> None:
        self.claimed[node] = users
        if users > self.most:
            raise UploadError("limit", f"it claims {users} users; expected {self.most} at most")


def guarded(folder: Path, algorithm: PerFedRecPP = ALONE, nodes: int = 3) -> tuple[Coordinator, Keeper]:
    folder.mkdir(exist_ok=True)
    stores = {100 + i: store(folder / f"{i}.node", users) for i, users in enumerate(PARTS[:nodes])}
    given, keeper = coordinator(stores, algorithm=algorithm), Keeper()
    given.gate = keeper
    return given, keeper


def tables(state: Any) -> dict[str, torch.Tensor]:
    return flatten(state)[0]


def same(a: Any, b: Any) -> bool:
    found, wanted = tables(a), tables(b)
    return found.keys() == wanted.keys() and all(torch.equal(each, wanted[name]) for name, each in found.items())


def lines(given: Coordinator) -> list[tuple[int, str]]:
    """What nodes were told."""
    grid: Any = given.grid
    kinds = [(each.node, each.message) for each in grid.sent if not each.up]
    return [(node, told(message)) for node, message in kinds if message.metadata.message_type == TOLD]


def asked(given: Coordinator, node: int) -> set[str]:
    grid: Any = given.grid
    found = {each.message.metadata.message_type for each in grid.sent if each.node == node and not each.up}
    return {each for each in found if each != TOLD}


@pytest.mark.parametrize("algorithm", [ALONE, SECURE], ids=["in the clear", "secure"])
def test_a_gate_that_lets_all_in_changes_nothing(algorithm: PerFedRecPP, tmp_path: Path) -> None:
    stores = {100 + i: store(tmp_path / f"{i}.node", users) for i, users in enumerate(PARTS)}
    plain = coordinator(stores, algorithm=algorithm)
    given, keeper = guarded(tmp_path / "with", algorithm)
    states = []
    for each in (plain, given):
        assembled(each)
        states.append(each.play(each.begin())[0])
    assert same(*states)  # bit for bit
    assert keeper.claimed == {100: 10, 101: 4, 102: 9}
    assert lines(given) == []
    assert [asked(plain, node) for node in stores] == [asked(given, node) for node in stores]


def test_a_node_that_is_held_is_in_no_sum_and_gets_the_model(tmp_path: Path) -> None:
    given, keeper = guarded(tmp_path)
    keeper.states[102] = HELD
    found = assembled(given, nodes=2)[-1]
    assert found == f"2 nodes and {10 + 4} users are present (needed: 2 and 1), beside 1 that does not count"
    state, report = given.play(given.begin())
    assert (report.clients, report.cohort) == (14, N_USERS)
    assert given.rejected == []
    assert asked(given, 102) == {"query"}
    assert [each.nodes for each in given.seen] == [(100,), (101,)]
    assert given.hand_out(state) == [100, 101, 102]
    assert lines(given) == [(102, "this node takes no part in sums: it claims too much")]
    keeper.states.clear()
    _, report = given.play(state)
    assert report.clients == N_USERS
    assert lines(given)[1:] == [(102, "what this node sends counts")]


def test_a_decision_holds_from_the_next_round_on_and_can_be_undone(tmp_path: Path) -> None:
    """The sum is then that of the others, exactly: as if the node were not connected."""
    after, states = list[Coordinator](), list[Any]()
    for way in ("excluded", "away"):
        given, keeper = guarded(tmp_path / way)
        assembled(given)
        state = given.begin()
        if way == "excluded":
            keeper.states[101] = EXCLUDED
        else:
            del given.grid.apps[101]  # type: ignore[attr-defined]
        state, report = given.play(state)
        assert report.clients == N_USERS - 4
        after.append(given)
        states.append(copied(state))
    assert same(*states)
    excluded, away = after
    assert excluded.rejected == []
    assert [each.reason for each in away.rejected] == ["away"]
    assert "train" not in asked(excluded, 101)
    assert excluded.present == {100, 101, 102}
    assert excluded.hand_out(excluded.blank()) == [100, 102]
    excluded.gate.states.clear()  # type: ignore[attr-defined]
    assert excluded.play(state)[1].clients == N_USERS


def test_an_excluded_node_is_not_asked_which_users_it_hosts(tmp_path: Path) -> None:
    given, keeper = guarded(tmp_path)
    keeper.states[101] = EXCLUDED
    assembled(given, nodes=2)
    assert asked(given, 101) == set()
    assert given.directory is not None
    assert given.directory.identities.numel() == N_USERS - 4


def test_secure_sums_and_evaluations_are_those_of_the_nodes_that_count(tmp_path: Path) -> None:
    given, keeper = guarded(tmp_path, SECURE)
    assembled(given)
    keeper.states[102] = HELD
    state, report = given.play(given.begin())
    assert (report.clients, report.aborted) == (14, None)
    assert given.seen == []  # nothing is seen of single nodes
    before = len(given.grid.sent)  # type: ignore[attr-defined]
    given.evaluate(SECURE.serving(state), Question("valid", (20,), 1))
    assert 102 not in {each.node for each in given.grid.sent[before:]}  # type: ignore[attr-defined]


def test_a_node_that_claims_too_many_users_is_refused_and_told_why(tmp_path: Path) -> None:
    given, keeper = guarded(tmp_path)
    keeper.most = 9
    found = assembled(given, nodes=2)
    why = "it claims 10 users; expected 9 at most"
    assert f"node 100 is refused: {why}" in found
    assert [(each.node, each.reason) for each in given.rejected] == [(100, "limit")]
    assert lines(given) == [(100, f"this node is refused: {why}")]


def test_a_node_that_claims_too_many_new_users_gets_no_identities(tmp_path: Path) -> None:
    stores = {100: store(tmp_path / "0.node", torch.arange(N_USERS), named=False)}
    given, keeper = coordinator(stores, algorithm=ALONE), Keeper()
    given.gate, keeper.most = keeper, 9
    with pytest.raises(PerfedrecError, match="gave up waiting: 0 nodes"):
        assembled(given, nodes=1, seconds=0.0)
    assert len(stores[100].unregistered()) == N_USERS
    assert [each.reason for each in given.rejected] == ["limit"]


def test_what_a_coordinator_says_is_one_printable_line_in_the_log_of_a_node(tmp_path: Path) -> None:
    from perfedrec.federation.agreement import build
    from perfedrec.runtimes.flower import NodeApp

    node: Store = store(tmp_path / "0.node", PARTS[0])
    app, heard = NodeApp(node, build, "1"), list[str]()
    app.activity.log = heard.append
    message = Message(
        RecordDict({"told": ConfigRecord({"text": "no\nmore\x1b[2J" + 1000 * "x"})}), dst_node_id=1, message_type=TOLD
    )
    from flwr.app import Context

    app.app()(message, Context(1, 1, {}, RecordDict(), {}))
    (line,) = heard
    assert line.startswith("the coordinator says: no more [2Jxxx")
    assert len(line) < 330
    assert node.status()["run"] is None


def test_a_node_whose_sum_is_too_large_stands_out_and_is_left_out_of_the_next_round(tmp_path: Path) -> None:
    """What it sends is well-formed, so no check refuses it."""
    parts = torch.arange(N_USERS).split([4, 4, 4, 4, 4, 3])
    stores = {100 + i: store(tmp_path / f"{i}.node", users) for i, users in enumerate(parts)}
    given, keeper = coordinator(stores, change("sums", lambda sums: sums * 100), algorithm=ALONE), Keeper()
    given.gate = keeper
    assembled(given, nodes=6)
    state, _ = given.play(given.blank())
    assert given.rejected == []
    found = standing_out(given.seen, {node: f"n{node}" for node in stores})
    assert [(each.nodes, each.statistic) for each in found] == [(("n101",), "norm")]
    keeper.states[101] = EXCLUDED
    given.seen.clear()
    _, report = given.play(state)
    assert report.clients == N_USERS - 4
    assert standing_out(given.seen, {}) == []


@pytest.mark.parametrize("algorithm", [ALGORITHM, SECURE], ids=["with a service", "secure"])
def test_a_node_that_counts_only_after_the_phases_takes_part_in_training(
    algorithm: PerFedRecPP, tmp_path: Path
) -> None:
    given, keeper = guarded(tmp_path, algorithm)
    keeper.states[102] = HELD
    assembled(given, nodes=2)
    state, clients = given.begin(), list[int]()
    for number in range(len(algorithm.phases) + 2):
        if number == len(algorithm.phases):
            keeper.states.clear()
        state, report = given.play(state)
        clients.append(report.cohort - report.clients)
    assert given.rejected == []
    assert clients[-2:] == [0, 0]
    assert max(clients[:-2]) == 9
    assert bool(state.items.isfinite().all())
    assert given.hand_out(state) == [100, 101, 102]
