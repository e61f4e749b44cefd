"""Which nodes a coordinator counts: what it asks somebody who knows the nodes and the operator's decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

TOLD = "query.told"
"""The type of a message that tells a node something: it is written in the node's log."""

LONGEST = 300
"""The most characters of it."""


@dataclass(frozen=True)
class Apart:
    """A node that takes no part in sums now: its ``state`` in one word, and ``why`` in a few. An ``excluded`` node is
    asked for nothing and gets no model; another one is asked which users it hosts, and gets the model."""

    state: str
    why: str
    excluded: bool = False


class Gate(Protocol):
    """Who decides which nodes count."""

    def apart(self) -> Mapping[int, Apart]:
        """The nodes that do not count now. It is asked while the coordinator waits, and at the start of each round."""

    def claim(self, node: int, users: int) -> None:
        """Take note that a node says that it hosts a number of ``users``.

        Raises :class:`~perfedrec.runtimes.flower.codec.UploadError` where it is refused for that.
        """


class Open:
    """A gate that lets every node in."""

    def apart(self) -> Mapping[int, Apart]:
        """No node."""
        return {}

    def claim(self, node: int, users: int) -> None:
        """Any number."""


def tell(grid: Grid, node: int, text: str, seconds: float) -> None:
    """Let a connected node write a ``text`` in its log. Nobody waits for its answer, which is dropped after some
    ``seconds``."""
    content = RecordDict({"told": ConfigRecord({"text": text[:LONGEST]})})
    grid.push_messages([Message(content, dst_node_id=node, message_type=TOLD, ttl=max(seconds, 1.0))])


def told(message: Message) -> str:
    """What a message tells, without characters that a terminal would take for something else."""
    text = str(message.content.config_records["told"]["text"])[:LONGEST]
    return "".join(letter if letter.isprintable() else " " for letter in text)
