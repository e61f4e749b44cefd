"""Messages of a coordinator to nodes, over any Flower grid: what is sent, what comes back, and what does not."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from perfedrec.runtimes.flower.codec import array_bytes
from perfedrec.runtimes.flower.secagg import STAGES

FAILED = 2
"""Flower's code for a client that raised an error. The text that our nodes send with it begins with a reason."""

POLL = 0.05
"""The shortest time between two looks for replies, in seconds (Flower's own loop waits 3). Our SuperLink holds such a
request for longer."""

AGAIN = 0.5
"""The time between two looks for nodes that died with a message, in seconds."""

BYTES_A_SECOND = 2e6
"""How fast the coordinator's link has to be: nodes have a second more for as many bytes as are sent to them."""

NOT_REPEATED = frozenset(f"train.{stage}" for stage in STAGES[1:])
"""Types of messages that a node cannot answer after a restart."""


@dataclass(frozen=True)
class Rejection:
    """A node whose answer is missing in a round. ``reason`` is its kind, such as "not finite" or "late" (one of
    :data:`~perfedrec.runtimes.flower.codec.REASONS` or a code of Flower), and ``users`` the number of its users that
    were asked."""

    node: int
    round: int
    phase: str
    reason: str
    detail: str
    users: int


def exchange(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    """Send ``messages``, and yield the replies that come within ``timeout`` seconds, each with the number of the node
    that was asked.

    A node that died with a message is asked again when it is connected again. That is safe: a node answers a round
    once, and repeats that answer. Only the later stages of secure aggregation need what was lost with the node. A
    message that a restarted SuperLink has forgotten is sent again as well.
    """
    lost, again = dict[int, tuple[Message, Message]](), 0.0
    waiting = _send(grid, messages)
    end = time.monotonic() + timeout
    while waiting or lost:
        looked = time.monotonic()
        replies = list(grid.pull_messages(waiting)) if waiting else []
        for reply in replies:
            if (asked := waiting.pop(reply.metadata.reply_to_message_id, None)) is None:
                continue
            node = asked.metadata.dst_node_id
            if _is_lost(reply, asked):
                lost[node] = asked, reply
            else:
                yield node, reply
        now = time.monotonic()
        if now >= end:
            # What the SuperLink has forgotten may simply have expired by now: the node counts as late, and not as away.
            yield from ((node, reply) for node, (_, reply) in lost.items() if node_unavailable(reply))
            return
        if lost and now > again:
            back, again = lost.keys() & set(grid.get_node_ids()), now + AGAIN
            waiting |= _send(grid, [_copy(lost.pop(node)[0], end - now) for node in sorted(back)])
        if not replies:
            time.sleep(max(looked + POLL - time.monotonic(), 0.0))


def _send(grid: Grid, messages: Iterable[Message]) -> dict[str, Message]:
    """Send ``messages``, and return those that were accepted, by their names."""
    messages = list(messages)
    names = grid.push_messages(messages) if messages else []
    return {name: each for name, each in zip(names, messages, strict=True) if name}


def _is_lost(reply: Message, asked: Message) -> bool:
    """Whether ``asked`` was lost, with a node or with the SuperLink, and may be sent again."""
    repeated = asked.metadata.message_type not in NOT_REPEATED
    return (node_unavailable(reply) and repeated) or message_unknown(reply)


def node_unavailable(reply: Message) -> bool:
    """Whether the node that was asked has left, or counts as dead."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def message_unknown(reply: Message) -> bool:
    """Whether the SuperLink does not know, or no longer knows, what was asked."""
    return reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def _copy(message: Message, seconds: float) -> Message:
    """The message again, for the ``seconds`` that are left."""
    about = message.metadata
    kind, group = about.message_type, about.group_id
    return Message(message.content, dst_node_id=about.dst_node_id, message_type=kind, group_id=group, ttl=seconds + 1.0)


class Traffic:
    """The messages of one round, ``timeout`` seconds for each exchange, and a second more for every
    :data:`BYTES_A_SECOND` that have been sent in the round: answers may be twice as large.

    ``clients`` is the number of users that each node is asked for. Counted are the bytes of the arrays of these nodes:
    ``up`` by node, and ``down`` in all. What the neighbourhood service receives and answers is not among them.
    ``rejections`` are the nodes whose answers did not come or were refused.
    """

    def __init__(self, grid: Grid, number: int, phase: str, timeout: float, clients: Mapping[int, int]) -> None:
        self.grid, self.number, self.phase, self.timeout, self.clients = grid, number, phase, timeout, clients
        self.up, self.down, self._sent = dict[int, int](), 0, 0
        self._rejected = dict[int, Rejection]()

    @property
    def rejections(self) -> list[Rejection]:
        """One rejection for each node, the first."""
        return list(self._rejected.values())

    def ask(
        self, message_type: str, contents: Mapping[int, RecordDict]
    ) -> Generator[tuple[int, RecordDict], None, None]:
        """Send ``contents`` to nodes, and yield the content of each answer as it comes."""
        sizes = {node: array_bytes(content) for node, content in contents.items()}
        self.down += sum(size for node, size in sizes.items() if node in self.clients)
        self._sent += sum(sizes.values())
        seconds = self.timeout + self._sent / BYTES_A_SECOND
        ttl = seconds + 1.0  # a node that is later need not work on it
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, group_id=str(self.number), ttl=ttl)
            for node, content in contents.items()
        ]
        silent = set(contents)
        try:
            for node, answer in exchange(self.grid, messages, seconds):
                silent.discard(node)
                if answer.has_error():
                    self.refuse(node, *_failure(answer))
                elif answer.metadata.src_node_id != node:
                    self.refuse(node, f"it came from node {answer.metadata.src_node_id}", "unasked")
                else:
                    if node in self.clients:
                        self.up[node] = self.up.get(node, 0) + array_bytes(answer.content)
                    yield node, answer.content
        finally:
            for node in sorted(silent):
                self.refuse(node, "no reply before the round was closed", "late")

    def refuse(self, node: int, detail: str, reason: str = "refused") -> None:
        """Note that the answer of a node cannot be used; ``reason`` is the kind of the ``detail``."""
        users = self.clients.get(node, 0)
        self._rejected.setdefault(node, Rejection(node, self.number, self.phase, reason, detail, users))

    def withdraw(self, node: int) -> str:
        """Delete the rejection of a node, and return its detail ("" where there is none)."""
        rejection = self._rejected.pop(node, None)
        return "" if rejection is None else rejection.detail


def _failure(answer: Message) -> tuple[str, str]:
    """The text of an error, and its reason."""
    code, text = answer.error.code, answer.error.reason or ""
    reason, _, detail = text.partition(": ")
    return (detail, reason) if code == FAILED and detail else (text or "it gave no reason", f"code {code}")
