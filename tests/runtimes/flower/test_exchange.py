"""How long the coordinator waits for answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from perfedrec.runtimes.flower import exchange
from perfedrec.runtimes.flower.codec import array_bytes
from perfedrec.runtimes.flower.exchange import Traffic


class Sent:
    """A grid that keeps what is sent, and has no answers."""

    def __init__(self) -> None:
        self.messages = list[Message]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        new = list(messages)
        self.messages += new
        return [""] * len(new)  # not accepted: nothing is waited for


def test_nodes_have_more_time_for_large_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second more for as many bytes as were sent in the round, to all nodes together, in this stage and before it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    monkeypatch.setattr(exchange, "BYTES_A_SECOND", 1000.0)
    grid: Any = Sent()
    traffic, content = Traffic(grid, 3, "train", 60.0, {7: 1, 8: 1}), RecordDict()
    assert list(traffic.ask("train", {7: content})) == []
    content["shared"] = ArrayRecord({"items": Array(np.zeros(250))})
    assert list(traffic.ask("train.first", {7: content, 8: content})) == []
    assert list(traffic.ask("train.second", {7: RecordDict()})) == []
    seconds = 2 * array_bytes(content) / 1000
    assert seconds == 2 * (250 * 8 + 128) / 1000
    assert [each.metadata.ttl for each in grid.messages] == [61.0, *[61.0 + seconds] * 3]
    assert {(each.node, each.reason) for each in traffic.rejections} == {(7, "late"), (8, "late")}
