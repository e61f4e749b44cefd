"""A coordinator's connection to a SuperLink: Flower's runtime API, spoken by the one long-lived process of a run.

Flower's own grid looks for replies every three seconds; this one asks the SuperLink to hold its request until there are
some.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from perfedrec.runtimes.flower.connection import (
    COORDINATOR_WAITS,
    UPLOAD_SECONDS,
    Endpoint,
    LongPolling,
    RefusedError,
    call,
)
from perfedrec.runtimes.flower.messages import Bundler, put_together, take_apart


@dataclass
class _Arriving:
    """A reply of which the SuperLink may not have all objects yet: its ``head``, the names of the objects that are
    ``wanted``, the ``contents`` of those that are here, and the time (monotonic seconds) when it counts as lost."""

    head: ProtoMessage
    wanted: list[str]
    end: float
    contents: dict[str, bytes] = field(default_factory=dict)


class FastGrid(HttpGrid):
    """A grid whose :meth:`pull_messages` takes no longer than the SuperLink holds a request. A reply that has not
    arrived whole by then is looked for in the next call."""

    def __init__(self, endpoint: Endpoint, token: str) -> None:
        super().__init__(str(endpoint), token=token)
        self._arriving: dict[str, _Arriving] = {}
        self._polling = LongPolling(COORDINATOR_WAITS)
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        interceptors: list[ProtobufClientInterceptor] = [
            version,
            RuntimeTokenHttpInterceptor(token=token),
            self._polling,
        ]
        self._client = endpoint.client(RuntimeHttpClient, interceptors, self._retry_invoker)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and return the name of each (empty: not accepted).

        A message that a SuperLink forgets because it is restarted is answered by an error later.
        """
        bundler, client, run_id = Bundler(), self._runtime_client, self.run.run_id
        request, objects = PushAppMessagesRequest(), dict[str, InflatableObject]()
        with no_object_id_recompute():
            for message in map(bundler.bundle, messages):
                parts = take_apart(message)
                request.messages_list.append(parts.head)
                request.message_object_trees.append(parts.tree)
                objects |= parts.objects
            answer = client.PushMessages(request)
            for name in answer.objects_to_push:
                part = PushObjectRequest(node=self.node, run_id=run_id, object_id=name, session_id=answer.session_id)
                part.object_content = objects[name].deflate()
                client.PushObject(part)
        return list(answer.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that have arrived whole, and errors for those that are lost."""
        self._find_new(message_ids)
        arrived = []
        for name, reply in list(self._arriving.items()):
            message = self._fetch(name, reply)
            if message is not None:
                del self._arriving[name]
                arrived.append(message)
        return arrived

    def _find_new(self, message_ids: Iterable[str]) -> None:
        """Ask which replies have begun to arrive. The SuperLink names each reply once."""
        begun = {each.head.metadata.reply_to_message_id for each in self._arriving.values()}
        if waiting := [name for name in message_ids if name not in begun]:
            self._polling.seconds = 0 if self._arriving else COORDINATOR_WAITS
            answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=waiting))
            self._polling.seconds = COORDINATOR_WAITS
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                wanted = [each.object_id for each in iterate_object_tree(tree)]
                self._arriving[head.metadata.message_id] = _Arriving(head, wanted, time.monotonic() + UPLOAD_SECONDS)

    def _fetch(self, name: str, reply: _Arriving) -> Message | None:
        """Fetch what there is of a reply; ``None`` while something is missing, and an error once it is lost."""
        client, run_id, lost = self._runtime_client, self.run.run_id, time.monotonic() > reply.end
        for each in reply.wanted:
            if each in reply.contents:
                continue
            found = client.PullObject(PullObjectRequest(node=self.node, run_id=run_id, object_id=each))
            lost = lost or not found.object_found
            if not found.object_available:
                break
            reply.contents[each] = found.object_content
            reply.end = time.monotonic() + UPLOAD_SECONDS
        if len(reply.contents) == len(set(reply.wanted)):
            confirmation = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=name)
            client.ConfirmMessageReceived(confirmation)
            return put_together(name, reply.contents)
        return _lost(reply.head, run_id) if lost else None


def _lost(head: ProtoMessage, run_id: int) -> Message:
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=head.metadata.src_node_id,
        dst_node_id=SUPERLINK_NODE_ID,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=head.metadata.reply_to_message_id,
        created_at=time.time(),
    )
    return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "its upload broke off"))


@contextmanager
def attached(endpoint: Endpoint, secret: bytes, run_id: int) -> Iterator[Grid]:
    """The grid of a run. The run is marked as completed at the end of the block, and as failed after an error.

    ``secret`` is the one of the SuperLink at the ``endpoint``. Raises
    :class:`~perfedrec.runtimes.flower.connection.RefusedError` where the SuperLink has no task for the run.
    """
    grid, done = FastGrid(endpoint, _token(endpoint, secret, run_id)), threading.Event()
    client = grid._runtime_client

    def beat() -> None:
        while not done.wait(10.0):
            with suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    task = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run_id, task.context.node_id
    grid.set_run(run_from_proto(task.run))
    threading.Thread(target=beat, daemon=True).start()
    status = SubStatus.FAILED
    try:
        yield grid
        status = SubStatus.COMPLETED
    finally:
        done.set()
        grid._retry_invoker.max_tries = 1
        with suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        grid.close()


def _token(endpoint: Endpoint, secret: bytes, run_id: int) -> str:
    """The token of the coordinator of a run, whose task is taken for it; tasks of other runs are taken and dropped."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    signed = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    with endpoint.client(RuntimeHttpClient, [version, signed]) as client:
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while True:
            answer = call(client.AcquireTask, request, endpoint)
            if not answer.HasField("task"):
                raise RefusedError(
                    f"{endpoint}: the SuperLink has no task for this coordinator; expected that of its run"
                )
            if answer.task.run_id == run_id:
                return answer.token
