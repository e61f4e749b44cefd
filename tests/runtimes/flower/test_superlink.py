"""The state of our SuperLink, part of which survives a restart, and its fast path. A failure may mean: Flower has
changed, read superlink.py again."""

from __future__ import annotations

import asyncio
import selectors
import stat
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse, PushAppMessagesRequest
from flwr.supercore.constant import TASK_TOKEN_HEADER, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from perfedrec.runtimes.flower import superlink
from perfedrec.runtimes.flower.superlink import DurableState, FastPath

KEY = ec.generate_private_key(ec.SECP384R1())
PUBLIC = public_key_to_bytes(KEY.public_key())
HEARTBEAT = 1000.0
SECRET = b"what a node sends stays off the disk"


def state(folder: Path) -> DurableState:
    return DurableState(folder / "superlink.json", get_federation_manager(), ObjectStoreFactory().store())


def opened(given: DurableState) -> tuple[int, int, str]:
    """An open run: its number, that of its task, and the token of its coordinator."""
    run = given.create_run("app", "1", "hash", {}, "@none/default", None, "", TaskType.SERVER_APP)
    (task,) = given.get_tasks(task_ids=None)
    token = given.claim_task(task.task_id)
    assert token is not None
    assert given.activate_task(task.task_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run, 1
    return run, task.task_id, token


def message(node: int, number: int = 0, ttl: float = 10_000.0) -> Message:
    content = RecordDict({"content": ConfigRecord({"secret": SECRET, "number": number})})
    made = Message(content, dst_node_id=node, message_type="train", ttl=ttl)
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def taken(given: DurableState, each: Message) -> str:
    """Store a message with all its parts, and return its name."""
    session = given.start_session(each.metadata.run_id)
    head = message_from_proto(message_to_proto(remove_content_from_message(each)))
    stored, missing = given.store_message_and_object_tree(head, get_object_tree(each), session)
    assert stored
    objects = get_all_nested_objects(each)
    assert all(given.store_object(each.metadata.run_id, session, name, objects[name].deflate()) for name in missing)
    return str(each.metadata.message_id)


def answered(given: DurableState, asked: Message) -> Message:
    reply = Message(RecordDict({"content": ConfigRecord({"secret": SECRET})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    taken(given, reply)
    return reply


def fails(given: DurableState, name: str, run: int) -> int | None:
    """The code where the answer to a message is an error."""
    (found,) = given.get_message_res({name}, run) or (None,)
    return found.error.code if found is not None and found.has_error() else None


def test_flower_is_the_version_that_was_read() -> None:
    assert metadata.version("flwr").startswith(("1.41.", "1.42.")), "superlink.py was written for another Flower"


def test_registered_nodes_and_open_runs_survive_a_restart_and_messages_do_not(tmp_path: Path) -> None:
    before = state(tmp_path)
    gone = before.create_node("", "", b"another key", 0)
    node = before.create_node("", "", PUBLIC, 0)
    before.delete_node("", gone)
    assert before.activate_node(node, HEARTBEAT)
    run, task, token = opened(before)
    name = taken(before, message(node))
    assert before.object_store.get(name)
    path = tmp_path / "superlink.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SECRET not in b"".join(each.read_bytes() for each in tmp_path.iterdir())

    after = state(tmp_path)
    assert after.get_node_id_by_public_key(PUBLIC) == node
    assert after.get_nodes(run) == {node}  # it counts as connected without connecting again
    assert {each.node_id: each.status for each in after.get_node_info()}[gone] == NodeStatus.UNREGISTERED
    with pytest.raises(ValueError, match="already in use"):
        after.create_node("", "", b"another key", 0)
    speaker = after.get_task_by_token(token)
    assert speaker is not None
    assert (speaker.task_id, speaker.run_id) == (task, run)
    assert after.get_run_status({run})[run].status == "running"
    assert after.get_run_info(run_ids=[run]) == before.get_run_info(run_ids=[run])
    assert after.get_message_ins(node, 1) == []
    assert fails(after, name, run) == ErrorCode.MESSAGE_UNAVAILABLE

    assert after.finish_task(task, SubStatus.COMPLETED, "")
    ended = state(tmp_path)
    assert ended.get_task_by_token(token) is None
    assert ended.get_run_status({run})[run].sub_status == SubStatus.COMPLETED


def test_a_node_that_is_silent_after_a_restart_no_longer_counts_as_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(tmp_path)
    node = before.create_node("", "", PUBLIC, 0)
    before.activate_node(node, HEARTBEAT)
    run, _, _ = opened(before)
    after = state(tmp_path)
    late = superlink.now().timestamp() + 2 * HEARTBEAT + 1.0
    monkeypatch.setattr(
        "flwr.server.superlink.linkstate.in_memory_linkstate.now", lambda: datetime.fromtimestamp(late, tz=UTC)
    )
    assert after.get_nodes(run) == set()


def test_a_node_receives_its_own_messages_once_and_in_order(tmp_path: Path) -> None:
    given = state(tmp_path)
    nodes = [given.create_node("", "", bytes([each]), 0) for each in range(2)]
    for each in nodes:
        given.activate_node(each, HEARTBEAT)
    run, _, _ = opened(given)
    names = [taken(given, message(nodes[number % 2], number)) for number in range(5)]
    assert taken(given, message(nodes[0], 0)) not in names[1:]  # another one, made later
    first = [each.metadata.message_id for each in given.get_message_ins(nodes[0], 2)]
    assert first == [names[0], names[2]]
    assert given.get_message_ins(nodes[1], None, run_id=run + 1) == []
    assert [each.metadata.message_id for each in given.get_message_ins(nodes[1], None, run_id=run)] == names[1::2]
    assert given.get_message_ins(nodes[1], None) == []
    assert [each.metadata.message_id for each in given.get_message_ins(nodes[0], 1)] == [names[4]]


def test_messages_that_a_node_had_when_it_died_are_unknown_afterwards(tmp_path: Path) -> None:
    given = state(tmp_path)
    node = given.create_node("", "", PUBLIC, 0)
    given.activate_node(node, HEARTBEAT)
    run, _, _ = opened(given)
    answers, lost, half, waiting = (message(node, number) for number in range(4))
    for each in (answers, lost, half):
        taken(given, each)
    got = given.get_message_ins(node, None)
    answered(given, got[0])
    reply = Message(RecordDict({"content": ConfigRecord({"number": 2})}), reply_to=got[2])
    reply.metadata.__dict__["_message_id"] = reply.object_id
    given.store_message_and_object_tree(
        message_from_proto(message_to_proto(remove_content_from_message(reply))),
        get_object_tree(reply),
        given.start_session(run),
    )  # and its parts never arrive
    name = taken(given, waiting)
    given.deactivate_node(node)
    assert given.activate_node(node, HEARTBEAT)
    assert fails(given, lost.metadata.message_id, run) == ErrorCode.MESSAGE_UNAVAILABLE
    assert fails(given, half.metadata.message_id, run) == ErrorCode.MESSAGE_UNAVAILABLE
    assert reply.metadata.message_id not in given.object_store
    (found,) = given.get_message_res({answers.metadata.message_id}, run)
    assert not found.has_error()
    assert [each.metadata.message_id for each in given.get_message_ins(node, None)] == [name]


def test_expired_messages_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = state(tmp_path)
    node = given.create_node("", "", PUBLIC, 0)
    given.activate_node(node, HEARTBEAT)
    opened(given)
    lasting = taken(given, message(node))
    taken(given, message(node, 1, ttl=1000.0))
    answered(given, given.get_message_ins(node, 2)[1])
    assert len(given.object_store) == 9  # two messages, their contents and their records, and those of the answer
    soon = timedelta(seconds=superlink.GRACE + 1001.0)
    monkeypatch.setattr(superlink, "now", lambda: datetime.now(UTC) + soon)
    new = taken(given, message(node, 2))
    assert len(given.object_store) == 6
    assert lasting in given.object_store
    assert new in given.object_store


class Timeless(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own. Where all tasks wait, the clock jumps to the time that comes first."""

    def __init__(self) -> None:
        self.now, selector = 0.0, selectors.DefaultSelector()
        super().__init__(selector)
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            self.now += timeout or 0.0
            return select(None if timeout is None else 0.0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now


def in_a_loop(play: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: other tests with a browser may have left a running loop in this one."""

    def run() -> Any:
        with asyncio.Runner(loop_factory=Timeless) as runner:
            return runner.run(play)

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()


class Line:
    """A client of a :class:`FastPath`, in front of an app that notes its requests."""

    def __init__(self, folder: Path) -> None:
        self.state, self.fallen = state(folder), list[str]()
        self.node = self.state.create_node("", "", PUBLIC, 0)
        self.state.activate_node(self.node, HEARTBEAT)
        self.run, _, self.token = opened(self.state)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert (await receive())["type"] == "http.request"
            self.fallen.append(scope["path"])
            await send({"type": "http.response.start", "status": 418, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        app.state = SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: self.state))  # type: ignore[attr-defined]
        self.app: Any = FastPath(app)  # type: ignore[arg-type]

    async def call(self, path: str, request: Any, wait: int = 0, key: Any = KEY, token: str | None = None) -> Any:
        sent = httpx.Request("POST", f"https://x{path}", content=request.SerializeToString())
        sent.headers["content-type"] = superlink.PROTOBUF_MEDIA_TYPE
        sent.headers[TASK_TOKEN_HEADER] = token or self.token
        if wait:
            sent.headers["prefer"] = f"wait={wait}"
        context = ProtobufRequestContext(rpc_method="", message=request, request=sent)
        NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda each: httpx.Response(200))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as client:
            return await client.send(sent)

    async def pull(self, wait: int = 0, **given: Any) -> PullMessagesResponse:
        request = PullMessagesRequest(node=Node(node_id=self.node))
        answer = await self.call("/v1/fleet/pull-messages", request, wait, **given)
        assert answer.status_code == 200, self.fallen
        return PullMessagesResponse.FromString(answer.content)

    async def push(self, each: Message) -> Any:
        head = message_to_proto(remove_content_from_message(each))
        request = PushAppMessagesRequest(messages_list=[head], message_object_trees=[get_object_tree(each)])
        return await self.call("/v1/runtime/push-messages", request)


def test_a_request_is_held_until_there_is_news(tmp_path: Path) -> None:
    line = Line(tmp_path)

    async def play() -> None:
        time = asyncio.get_running_loop().time
        assert not (await line.pull()).messages_list
        start = time()
        assert not (await line.pull(wait=1)).messages_list
        assert time() - start == 1.0
        held = asyncio.create_task(line.pull(wait=9))
        await asyncio.sleep(0.05)
        assert not held.done()
        asked = message(line.node)
        assert (await line.push(asked)).status_code == 200
        (head,) = (await asyncio.wait_for(held, 5)).messages_list
        assert head.metadata.message_id == asked.metadata.message_id

        wanted = PullObjectRequest(node=Node(node_id=line.node), run_id=line.run, object_id=asked.object_id)
        part = asyncio.create_task(line.call("/v1/fleet/pull-object", wanted, wait=9))
        replies = PullAppMessagesRequest(message_ids=[asked.metadata.message_id])
        answer = asyncio.create_task(line.call("/v1/runtime/pull-messages", replies, wait=9))
        await asyncio.sleep(0.05)
        assert not part.done()
        assert not answer.done()
        session = line.state.start_session(line.run)
        line.state.preregister_object_tree(get_object_tree(asked), session)
        content = superlink.PROTOBUF_REQUEST_TYPES["POST", "/v1/runtime/push-object"](
            node=Node(node_id=1), run_id=line.run, object_id=asked.object_id, session_id=session
        )
        content.object_content = asked.deflate()
        assert (await line.call("/v1/runtime/push-object", content)).status_code == 200
        found = PullObjectResponse.FromString((await asyncio.wait_for(part, 5)).content)
        assert found.object_content == asked.deflate()

        reply = Message(RecordDict(), reply_to=message_from_proto(head))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        request = PushMessagesRequest(
            node=Node(node_id=line.node),
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
        )
        assert (await line.call("/v1/fleet/push-messages", request)).status_code == 200
        told = PullAppMessagesResponse.FromString((await asyncio.wait_for(answer, 5)).content)
        assert [each.metadata.message_id for each in told.messages_list] == [reply.object_id]

    in_a_loop(play())
    assert line.fallen == []


def test_requests_that_fail_are_answered_by_flower(tmp_path: Path) -> None:
    line, other = Line(tmp_path), ec.generate_private_key(ec.SECP384R1())

    async def play() -> list[int]:
        own = PullMessagesRequest(node=Node(node_id=line.node))
        calls = [
            line.call("/v1/fleet/pull-messages", own, key=other),
            line.call("/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=line.node + 1))),
            line.call("/v1/runtime/pull-messages", PullAppMessagesRequest(), token="wrong"),
            line.call("/v1/fleet/activate-node", own),
            line.call("/v1/fleet/pull-object", PullObjectRequest(node=Node(node_id=line.node), run_id=7)),
        ]
        return [(await each).status_code for each in calls]

    assert in_a_loop(play()) == [418] * 5
    assert [each.rpartition("/")[2] for each in line.fallen] == [
        *("pull-messages", "pull-messages", "pull-messages", "activate-node", "pull-object")
    ]


def test_a_client_that_disconnects_while_waiting_receives_nothing(tmp_path: Path) -> None:
    """The message for it is still there for the next client."""
    line = Line(tmp_path)
    sent = list[Any]()

    async def play() -> int:
        request = PullMessagesRequest(node=Node(node_id=line.node))
        signed = httpx.Request("POST", "https://x")
        context = ProtobufRequestContext(rpc_method="", message=request, request=signed)
        NodeAuthHttpInterceptor(KEY, KEY.public_key()).intercept(context, lambda each: httpx.Response(200))
        headers = [(name.lower(), value) for name, value in signed.headers.raw]
        headers += [(b"content-type", superlink.PROTOBUF_MEDIA_TYPE.encode()), (b"prefer", b"wait=9")]
        hung_up = asyncio.Event()
        events = [{"type": "http.request", "body": request.SerializeToString()}]

        async def receive() -> Any:
            if events:
                return events.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {"type": "http", "method": "POST", "path": "/v1/fleet/pull-messages", "headers": headers}
        scope |= {"query_string": b"", "server": ("x", 443), "scheme": "https"}
        held = asyncio.create_task(line.app(scope, receive, send))
        await asyncio.sleep(0.05)
        hung_up.set()
        await asyncio.wait_for(held, 5)
        await line.push(message(line.node))
        return len((await line.pull()).messages_list)

    assert in_a_loop(play()) == 1
    assert sent == []
