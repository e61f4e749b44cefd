"""A Flower grid in memory: messages are taken apart into bytes and put together again, as on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

SERVER = 1


@dataclass(frozen=True)
class Sent:
    """A message as it travelled: ``objects`` are all its bytes, by the hash that names them."""

    node: int
    up: bool
    message: Message
    objects: dict[str, bytes]


class MemoryGrid(Grid):
    """Calls the apps of the nodes one after the other; ``tamper`` may change or drop (``None``) a reply."""

    def __init__(
        self, apps: Mapping[int, ClientApp], tamper: Callable[[Message], Message | None] | None = None
    ) -> None:
        self.apps, self.tamper, self.sent = apps, tamper, list[Sent]()
        self.replies: dict[str, Message] = {}
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in apps}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER

    def _travel(self, message: Message, node: int, up: bool) -> Message:
        objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        name, contents = message.object_id, dict(objects)
        arrived = cast(Message, inflate_object_from_contents(name, contents))
        arrived.metadata.__dict__["_message_id"] = name
        self.sent.append(Sent(node, up, arrived, objects))
        return arrived

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            node = message.metadata.dst_node_id
            asked = self._travel(message, node, up=False)
            names.append(asked.metadata.message_id)
            try:
                reply: Message | None = self.apps[node](asked, self.contexts[node])
            except Exception as error:
                reply = Message(Error(2, str(error)), reply_to=asked)  # what a SuperNode does
            reply = self.tamper(reply) if self.tamper and reply else reply
            if reply is not None:
                self.replies[names[-1]] = self._travel(reply, node, up=True)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    # The rest of the interface is not used.
    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
