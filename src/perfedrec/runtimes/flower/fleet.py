"""A node's connection to a SuperLink: Flower's fleet API, spoken by one long-lived process.

Flower's own SuperNode starts a Python process for every message. Here the node's process answers messages itself. This
module, :mod:`~perfedrec.runtimes.flower.grid`, :mod:`~perfedrec.runtimes.flower.control` and
:mod:`~perfedrec.runtimes.flower.messages` use private parts of Flower. They fit Flower 1.41 and 1.42, and are tested
by ``tests/runtimes/flower/test_flower_api.py`` and on real processes: read them again when Flower changes. The
SuperLink's side is in ``superlink.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree, no_object_id_recompute
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes.flower.connection import (
    NODE_WAITS,
    UPLOAD_SECONDS,
    A,
    AwayError,
    Endpoint,
    LongPolling,
    Q,
    StoppedError,
    UnknownKeyError,
    call,
)
from perfedrec.runtimes.flower.keys import private_key
from perfedrec.runtimes.flower.messages import Bundler, put_together, take_apart

HEARTBEAT = 20.0
"""The time between heartbeats that a node announces, in seconds; it sends four in that time. A SuperLink counts a node
that was killed as connected for twice as long, and refuses it until then when it comes back. It also stops counting a
node as connected that is silent for as long, for example while the SuperLink itself was away."""

GOODBYE = 5.0
"""The longest time that a goodbye waits for a heartbeat that is under way, in seconds. A heartbeat that arrives after
the goodbye would make the node count as connected again."""

AWAY_SECONDS = 60.0
"""How long a connection outlasts a SuperLink that cannot be reached, in seconds."""


class Fleet:
    """A node's connection to the SuperLink at an ``endpoint``, with TLS; the node's ``key`` signs every request.

    Methods raise :class:`~perfedrec.runtimes.flower.connection.AwayError` where waiting may help and
    :class:`~perfedrec.runtimes.flower.connection.RefusedError` where it does not.
    """

    def __init__(self, endpoint: Endpoint, key: Path) -> None:
        self.endpoint, private = endpoint, private_key(key)
        self._public = public_key_to_bytes(private.public_key())
        signed = NodeAuthHttpInterceptor(private, private.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self.ending = threading.Event()  # once it is set, calls no longer wait for a SuperLink that is away
        interceptors: list[ProtobufClientInterceptor] = [version, signed, LongPolling(NODE_WAITS)]
        self._client = endpoint.client(FleetHttpClient, interceptors)
        self._node: Node | None = None
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    @property
    def node_id(self) -> int:
        """The number that the SuperLink gave this node."""
        assert self._node is not None
        return int(self._node.node_id)

    def activate(self) -> int:
        """Tell the SuperLink that the node is connected, and return the node's number.

        A node that was killed is refused with :class:`~perfedrec.runtimes.flower.connection.AwayError` until the
        SuperLink has missed its heartbeats.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        self._node = Node(node_id=call(self._client.ActivateNode, request, self.endpoint).node_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, self.node_id
        self._beating.start()
        return self.node_id

    def receive(self) -> Message | None:
        """The next message; ``None`` if none came while the SuperLink held the request.

        Raises :class:`~perfedrec.runtimes.flower.connection.StoppedError` when the message's run has ended.
        """
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        head, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        run, name = head.metadata.run_id, head.metadata.message_id
        contents = dict[str, bytes]()
        for each in iterate_object_tree(tree):
            end = time.monotonic() + UPLOAD_SECONDS
            request = PullObjectRequest(node=self._node, run_id=run, object_id=each.object_id)
            while not (found := self._call(self._client.PullObject, request)).object_available:
                if not found.object_found or time.monotonic() > end:
                    raise StoppedError(f"message {name[:8]} is not complete")
                time.sleep(0.03)
            contents[each.object_id] = found.object_content
        confirmation = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=name)
        self._call(self._client.ConfirmMessageReceived, confirmation)
        message = put_together(name, contents)
        TaskIdentity.run_id = run
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply that took ``seconds`` to compute.

        Raises :class:`~perfedrec.runtimes.flower.connection.StoppedError` when its run has ended.
        """
        reply = Bundler().bundle(reply)
        with no_object_id_recompute():
            parts = take_apart(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[parts.head],
                message_object_trees=[parts.tree],
                clientapp_runtime_list=[seconds],
            )
            answer = self._call(self._client.PushMessages, request)
            for name in answer.objects_to_push:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=name,
                    object_content=parts.objects[name].deflate(),
                    session_id=answer.session_id,
                )
                if not self._call(self._client.PushObject, part).stored:
                    raise StoppedError("the SuperLink no longer accepts this reply")

    def close(self) -> None:
        """Tell the SuperLink that the node leaves, so that it may come back at once."""
        self._stop.set()
        if self._node is not None:
            self._beating.join(GOODBYE)
            with suppress(PerfedrecError):
                call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id), self.endpoint)
        self._client.close()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT / 4):
            with suppress(PerfedrecError, RuntimeError):  # the main thread meets the same error and reports it
                request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
                call(self._client.SendNodeHeartbeat, request, self.endpoint)

    def _call(self, method: Callable[[Q], A], request: Q) -> A:
        """Call a method, again and again while the SuperLink is away for a short time: a message that was sent in part
        is then continued."""
        end, wait = time.monotonic() + AWAY_SECONDS, 0.1
        while True:
            try:
                return call(method, request, self.endpoint)
            except UnknownKeyError:  # the key was accepted before: another run has begun, or the key was replaced
                raise AwayError(f"{self.endpoint}: the coordinator no longer knows this node") from None
            except AwayError:
                if time.monotonic() > end or self.ending.is_set() or self._stop.wait(wait):
                    raise
                wait = min(2 * wait, 2.0)
