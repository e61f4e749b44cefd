"""A node's loop: what it logs for its owner."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tests.parity.federation import settings
from tests.parity.test_store import stored
from torch import arange

from perfedrec.federation.node import policy_of
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.flower import Fleet, NodeApp, Owner, Setup, run_node
from perfedrec.runtimes.node import RoundError, Store


class Inbox:
    """A connection that delivers messages, and stops the node once they are answered."""

    endpoint = "here"

    def __init__(self, messages: list[Message]) -> None:
        self.messages, self.answers, self.ending = messages, list[Message](), threading.Event()

    def activate(self) -> int:
        return 7

    def receive(self) -> Message | None:
        if not self.messages:
            self.ending.set()
            return None
        return self.messages.pop(0)

    def send(self, reply: Message, seconds: float) -> None:
        self.answers.append(reply)

    def close(self) -> None: ...


def test_a_repeated_refusal_is_logged_once(tmp_path: Path) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    lines, stop = list[str](), threading.Event()
    with stored(tmp_path / "a.node", arange(3)) as store:
        policy = policy_of("secure")
        assert policy is not None
        node_app = NodeApp(store, lambda _: PerFedRecPP(settings()), "1", owner=Owner(lambda: (policy,)))
        setups = [Setup("a run", "", store.catalogue, version) for version in ("1", "1", "1", "2")]
        asked = [Message(RecordDict({"setup": each.record()}), dst_node_id=7, message_type="query") for each in setups]
        for message in asked:
            message.metadata.__dict__["_message_id"] = message.object_id
        inbox = Inbox(asked)
        inbox.ending = stop
        run_node(lambda: cast(Fleet, inbox), node_app, stop, lines.append)
    assert lines == [
        "connected to here as node 7, with 3 users, and requires profile secure or more protection",
        "refused to answer: policy: this node requires the protection of profile secure at least, and "
        "privacy.aggregation is sparse, not secure",
        "refused to answer: version: this node runs version 1, the coordinator 2",
    ]
    assert [each.has_error() for each in inbox.answers] == [True] * 4
    assert {name: count for name, count in node_app.activity.refused.items() if count} == {"policy": 3, "version": 1}


def test_a_node_obeys_its_rules_at_once(tmp_path: Path) -> None:
    """A message that comes while the node is paused is refused, and then there is no connection until it goes on."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    lines, stop = list[str](), threading.Event()
    algorithm = PerFedRecPP(settings(privacy={"aggregation": "secure", "norm": "l2", "clip": 0.5}))
    with stored(tmp_path / "a.node", arange(3)) as store:
        node_app = NodeApp(store, lambda _: algorithm, "1")
        setup = Setup("a run", "", store.catalogue, "1").record()
        asked = [Message(RecordDict({"setup": setup}), dst_node_id=7, message_type="query") for _ in range(3)]
        for message in asked:
            message.metadata.__dict__["_message_id"] = message.object_id
        boxes = [Inbox(asked[:2]), Inbox(asked[2:])]
        receive = boxes[0].receive

        def paused_meanwhile() -> Message | None:
            if len(boxes[0].messages) == 1:
                with Store.open(store.path) as another:
                    another.rules.pause(True)
            return receive()

        boxes[0].receive = paused_meanwhile  # type: ignore[method-assign]
        boxes[1].ending = stop
        waiting = iter(boxes)

        def wait(seconds: float) -> bool:
            store.rules.pause(False)
            return False

        stop.wait = wait  # type: ignore[method-assign, assignment]
        run_node(lambda: cast(Fleet, next(waiting)), node_app, stop, lines.append)
        assert [each.has_error() for box in boxes for each in box.answers] == [False, True, False]
        why = "this node answers nothing: its owner has paused it"
        assert [each["refused"] for each in store.journal.read()[::-1]] == [None, f"away: {why}", None]
        assert [line for line in lines if not line.startswith("run ")] == [
            "connected to here as node 7, with 3 users",
            f"refused to answer: away: {why}",
            "answers nothing from now on: its owner has paused it",
            "connected to here as node 7, with 3 users",
        ]


def test_a_node_whose_owner_left_takes_part_in_no_run_so_far(tmp_path: Path) -> None:
    algorithm = PerFedRecPP(settings())
    with stored(tmp_path / "a.node", arange(3)) as store:
        store.join_run(algorithm, "a run")
        store.rules.leave()
        assert NodeApp(store, lambda _: algorithm, "1").absence == "its owner has left the federation"
        store.rules.come_back()
        with pytest.raises(RoundError, match="has left the federation during run a run"):
            store.answer_round(0, b"", lambda: b"")
        with pytest.raises(RoundError, match="expected a new run"):
            store.join_run(algorithm, "a run")
        store.join_run(algorithm, "another run")
