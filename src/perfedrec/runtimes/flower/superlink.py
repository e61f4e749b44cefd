"""The process of a SuperLink: Flower's own, with messages in memory and a fast path for the requests of a round.

Flower's SuperLink keeps every part of every message in SQLite, passes a request through five layers of middleware, and
has clients ask again and again whether there is news. Most of the time of a round was spent on that. Here

* messages are kept in memory only (:class:`DurableState`). What has to survive a restart (which nodes are registered
  and which runs are open) is in a small file. Messages under way are lost with the process, and the client that waits
  for one asks again: see :func:`perfedrec.runtimes.flower.exchange.exchange`;
* :class:`FastPath` hands the requests of a round directly to Flower's handlers. Where a client asks for it, it holds a
  request until there is news. All other requests, and those that fail in it, are answered by Flower's own app;
* :class:`FastPath` also refuses what one key does too often (:mod:`perfedrec.runtimes.flower.rates`), before anything
  of it is kept. Flower has no such limit.

Clients see no difference: it is the same API with the same authentication. Like ``fleet.py``, ``grid.py``,
``control.py`` and ``messages.py``, this file uses private parts of Flower. It fits Flower 1.41 and 1.42: see
``tests/runtimes/flower/test_superlink.py``.

It is run as a script, and imports nothing else of this package but the rates: other imports would slow a restart down.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TASK_TOKEN_HEADER, NodeStatus
from flwr.supercore.corestate.in_memory_corestate import TokenRecord
from flwr.supercore.date import now
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.supercore.object_store import ObjectStore, ObjectStoreFactory
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.run import Run, RunStatus
from flwr.superlink import main
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.federation import FederationManager
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers as fleet
from flwr.superlink.servicer.runtime import runtime_handlers as runtime
from google.protobuf.json_format import MessageToDict, ParseDict  # type: ignore[import-untyped]

from perfedrec.runtimes.flower.rates import MOST_BYTES, REFUSED, VARIABLE, Meter, Rates

MOST_SECONDS = 10.0
"""The longest time that a request is held for a client that prefers to wait (RFC 7240), in seconds. Flower's own
clients do not ask for it."""

GRACE = 120.0
"""How long after a message has expired its parts may still be fetched, in seconds."""


def _saved(method: Callable[..., Any]) -> Callable[..., Any]:
    """A ``method`` after which the state is written to its file."""

    def changed(self: DurableState, *given: Any, **named: Any) -> Any:
        try:
            return method(self, *given, **named)
        finally:
            self.write()

    return changed


class DurableState(InMemoryLinkState):
    """Flower's state in memory, of which nodes, runs, and the tokens of coordinators are also kept in the file
    ``path``."""

    create_node = _saved(InMemoryLinkState.create_node)
    delete_node = _saved(InMemoryLinkState.delete_node)
    deactivate_node = _saved(InMemoryLinkState.deactivate_node)
    create_run = _saved(InMemoryLinkState.create_run)
    claim_task = _saved(InMemoryLinkState.claim_task)
    activate_task = _saved(InMemoryLinkState.activate_task)
    finish_task = _saved(InMemoryLinkState.finish_task)

    def __init__(self, path: Path, federations: FederationManager, objects: ObjectStore) -> None:
        super().__init__(federations, objects)
        self._path, self._writing = path, threading.Lock()
        self._inbox, self._sending = dict[int, list[Message]](), dict[int, str]()
        self._until = list[tuple[float, str]]()  # a heap
        if path.exists():
            self._restore(json.loads(path.read_text(encoding="utf-8")))

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """A node that connects again has lost the messages that it was given before: they are deleted here, and their
        senders send them again."""
        active = super().activate_node(node_id, heartbeat_interval)
        if active:
            self._cleanup_push_session(
                self._sending.pop(node_id, ""), cleanup_messages=True
            )  # a reply that was sent in part
            with self.lock:
                given = [each for each in self.message_ins_store.values() if each.metadata.dst_node_id == node_id]
                names = {each.metadata.message_id for each in given if each.metadata.delivered_at}
                self.delete_messages(names - self.message_ins_id_to_message_res_id.keys())
        self.write()
        return active

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Store a message, and delete those that nobody has fetched in time, such as replies that came after the end of
        a round."""
        with self.lock:
            about, time = message.metadata, now().timestamp()
            heappush(self._until, (about.created_at + about.ttl + GRACE, about.message_id))
            if about.reply_to_message_id:
                self._sending[about.src_node_id] = session_id
            while self._until and self._until[0][0] < time:
                name = heappop(self._until)[1]
                self.delete_messages({name})
                self.object_store.delete(name)
            return super().store_message_and_object_tree(message, object_tree, session_id)

    def store_message_ins(self, message: Message) -> str | None:
        new = message.metadata.message_id not in self.message_ins_store
        with self.lock:
            name = super().store_message_ins(message)
            if name is not None and new:
                self._inbox.setdefault(message.metadata.dst_node_id, []).append(message)
        return name

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """The messages that wait for a node. (Flower's own method searches the messages for all nodes each time.)"""
        found, left = list[Message](), list[Message]()
        with self.lock:
            waiting = self._inbox.pop(node_id, [])
            self._check_stored_messages({each.metadata.message_id for each in waiting})
            for each in waiting:
                if each.metadata.message_id not in self.message_ins_store:
                    continue
                wanted = run_id is None or each.metadata.run_id == run_id
                (found if wanted and (limit is None or len(found) < limit) else left).append(each)
            if left:
                self._inbox[node_id] = left
            for each in found:
                each.metadata.delivered_at = now().isoformat()
        return found

    def write(self) -> None:
        """Write nodes, runs, tasks and tokens to the file, whole or not at all."""
        with self._writing:
            with self.lock_task_store, self.lock:
                content = {
                    "nodes": [MessageToDict(each) for each in self.nodes.values()],
                    "runs": [asdict(each.run) for each in self.run_ids.values()],
                    "tasks": [MessageToDict(each) for each in self.task_store.values()],
                    "tokens": {each: record.token for each, record in self.task_token_store.items()},
                }
            scratch = self._path.with_suffix(".new")
            with open(scratch, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._path)

    def _restore(self, content: dict[str, Any]) -> None:
        """Read what was written. Nodes and runs that were active count as active, until their next heartbeat is due."""
        soon = now() + timedelta(seconds=HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)
        for each in content["nodes"]:
            node = ParseDict(each, NodeInfo())
            if node.status == NodeStatus.ONLINE:
                node.online_until = now().timestamp() + HEARTBEAT_PATIENCE * node.heartbeat_interval
            self.nodes[node.node_id] = node
            self.node_public_key_to_node_id[node.public_key] = node.node_id
            self.owner_to_node_ids.setdefault(node.owner_aid, set()).add(node.node_id)
        for each in content["runs"]:
            run = Run(**each | {"status": RunStatus(**each["status"])})
            self.run_ids[run.run_id] = RunRecord(run)
            self.flwr_aid_to_run_ids[run.flwr_aid].add(run.run_id)
        for each in content["tasks"]:
            task = ParseDict(each, Task())
            self.task_store[task.task_id] = task
        for name, token in content["tokens"].items():
            self.task_token_store[int(name)] = TokenRecord(token, soon)
            self.task_token_to_task_id[token] = int(name)


FLEET: dict[str, Callable[..., Any]] = {
    "/v1/fleet/pull-messages": lambda request, state: fleet.pull_messages(request, state, state.object_store),
    "/v1/fleet/pull-object": fleet.pull_object,
    "/v1/fleet/confirm-message-received": lambda request, state: fleet.confirm_message_received(
        request, state, state.object_store
    ),
    "/v1/fleet/push-messages": fleet.push_messages,
    "/v1/fleet/push-object": fleet.push_object,
}
"""The requests of a node in a round."""

RUNTIME: dict[str, Callable[..., Any]] = {
    "/v1/runtime/get-nodes": runtime.get_nodes,
    "/v1/runtime/push-messages": runtime.push_messages,
    "/v1/runtime/push-object": runtime.push_object,
    "/v1/runtime/pull-messages": runtime.pull_messages,
    "/v1/runtime/pull-object": runtime.pull_object,
    "/v1/runtime/confirm-message-received": runtime.confirm_message_received,
}
"""The requests of a coordinator in a round."""


JOIN = "/v1/fleet/activate-node"
"""The request with which a node connects."""


class TooMuchError(Exception):
    """A request that is refused, with an HTTP ``status``."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class FastPath:
    """An ASGI app in front of Flower's ``app`` that answers the requests of a round.

    It works in the event loop, because it only moves bytes in memory. Where there is a ``meter``, it counts what nodes
    do whose signature is right, and refuses what is too much.
    """

    def __init__(self, app: FastAPI, meter: Meter | None = None) -> None:
        self.app, self.meter, self._news = app, meter, dict[Topic, asyncio.Event]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        of_node = scope["type"] == "http" and scope["path"].startswith("/v1/fleet/")
        if scope["type"] != "http" or not (of_node or scope["path"] in RUNTIME):
            await self.app(scope, receive, send)
            return
        try:
            body = await _body(receive, MOST_BYTES if of_node else None)
            if body is None:
                return
            request = Request(scope | {"app": self.app, "state": {}})
            if of_node:
                self._count(request, body)
        except TooMuchError as error:
            await _refuse(send, error)
            return
        if not (scope["path"] in FLEET or scope["path"] in RUNTIME):
            await self.app(scope, _replayed(body, receive), send)
            return
        try:
            answer = await self._answer(request, body, receive)
        except Exception:  # Flower's own app meets the same error, and answers with its message
            await self.app(scope, _replayed(body, receive), send)
            return
        if answer is not None:
            headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode()), (b"content-length", b"%d" % len(answer))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

    def _count(self, request: Request, body: bytes) -> None:
        """Count a request of a node. What is not signed by a registered key is left to Flower, which refuses it: nobody
        can use up what another key may do."""
        if self.meter is None or (kind := PROTOBUF_REQUEST_TYPES.get((request.method, request.url.path))) is None:
            return
        state = self.app.state.linkstate_factory.state()
        try:
            request.state.protobuf_request = kind.FromString(body)
            authenticate_node(request)
            key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
        except Exception:  # Flower's own app meets the same error, and answers with its message
            return
        node = state.get_node_id_by_public_key(key)
        if node is not None and (why := self.meter.take(node, len(body), request.url.path == JOIN)) is not None:
            raise TooMuchError(429, why)

    async def _answer(self, request: Request, body: bytes, receive: Any) -> bytes | None:
        """The answer to a request, once there is news or its time is over; ``None`` where the client has
        disconnected."""
        path, time = request.url.path, asyncio.get_running_loop().time
        wait = re.fullmatch(r"wait=(\d+)", request.headers.get("prefer", ""))
        end = time() + min(float(wait[1]) if wait else 0.0, MOST_SECONDS)
        message = PROTOBUF_REQUEST_TYPES[request.method, path].FromString(body)
        if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
            raise ValueError("another content type")
        while True:
            answer = self._handled(request, path, message)
            topic = _awaited(path, message, answer)
            if topic is None or time() >= end:
                return bytes(answer.SerializeToString())
            news = asyncio.ensure_future(self._news.setdefault(topic, asyncio.Event()).wait())
            closed = asyncio.ensure_future(receive())
            await asyncio.wait((news, closed), timeout=end - time(), return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            if closed.done():
                return None
            closed.cancel()

    def _handled(self, request: Request, path: str, message: Any) -> Any:
        state = self.app.state.linkstate_factory.state()
        if path in FLEET:
            request.state.protobuf_request = message
            authenticate_node(request)
            answer = FLEET[path](message, state)
        else:
            task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
            answer = RUNTIME[path](message, state, task)
        for topic in _news_from(path, message):
            if (news := self._news.pop(topic, None)) is not None:
                news.set()
        return answer


Topic = int | str
"""What there can be news about: the number of a node, the name of an object, or "replies"."""


def _news_from(path: str, message: Any) -> Sequence[Topic]:
    """What there is news about once a request has been answered."""
    if path == "/v1/runtime/push-messages":
        return [each.metadata.dst_node_id for each in message.messages_list]
    if path == "/v1/fleet/push-messages":
        return ["replies"]
    return [message.object_id] if path.endswith("/push-object") else []


def _awaited(path: str, message: Any, answer: Any) -> Topic | None:
    """What a request waits for news about; ``None``: nothing, because the ``answer`` is not empty."""
    if path.endswith("/pull-messages") and not answer.messages_list:
        return int(message.node.node_id) if path in FLEET else "replies"
    if path.endswith("/pull-object") and answer.object_found and not answer.object_available:
        return str(message.object_id)
    return None


async def _body(receive: Any, most: int | None = None) -> bytes | None:
    """The body of a request; ``None`` where the client has disconnected. Raises :class:`TooMuchError` for one of more
    than ``most`` bytes, without reading all of it."""
    parts, size = [], 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if most is not None and size > most:
            raise TooMuchError(413, f"more than {most:,} bytes in one request")
        if not event.get("more_body", False):
            return b"".join(parts)


async def _refuse(send: Any, error: TooMuchError) -> None:
    text = str(error).encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text)), (b"retry-after", b"5")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _replayed(body: bytes, receive: Any) -> Any:
    """A function that returns a ``body`` again that was received, and then what is received after it."""
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return events.pop() if events else await receive()

    return replayed


def meter_beside(database: Path) -> Meter | None:
    """What counts what keys do, with the rates in the environment; refusals are written beside the ``database``."""
    rates = os.environ.get(VARIABLE)
    return None if rates is None else Meter(Rates.load(rates), database.with_name(REFUSED))


def run() -> None:
    """Run a SuperLink with the options of Flower's command. ``--database`` names the file of :class:`DurableState`.

    It ends when the process that started it ends, which closes this one's standard input.
    """

    def watch() -> None:
        with suppress(OSError):
            sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    logging.getLogger("flwr").setLevel(logging.WARNING)  # else there is a line for every request
    console_handler.setLevel(logging.WARNING)

    def factories(database: str, federation_manager: FederationManager) -> tuple[ObjectStoreFactory, LinkStateFactory]:
        objects = ObjectStoreFactory()
        states = LinkStateFactory(database, federation_manager, objects)
        states.state_instance = DurableState(Path(database), federation_manager, objects.store())
        return objects, states

    main.get_objectstore_linkstate_factories = factories  # type: ignore[attr-defined]
    config = _parse_superlink_lifespan_config()
    uvicorn.run(
        FastPath(main.create_app(config, SuperLinkLifespan), meter_beside(Path(str(config.database)))),
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_config=get_uvicorn_log_config(logging.WARNING),
        access_log=False,
    )


if __name__ == "__main__":
    run()
