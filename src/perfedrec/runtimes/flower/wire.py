"""Flower's private parts as a client has them: the fleet API as a node speaks it, and the control and runtime APIs as a
coordinator does. What a SuperLink has of them is in ``superlink.py``.

Flower's own SuperNode starts a Python process for every message, and its grid looks for replies every three seconds.
Here a node works in its own process (:class:`Fleet`), and a coordinator is the one long-lived server process of its run
(:func:`attached`). Written against Flower 1.41 and tested by ``tests/runtimes/flower/test_wire.py`` on real processes:
read both again when Flower changes.
"""

from __future__ import annotations

import hashlib
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from perfedrec.core.errors import PerfedrecError

HEARTBEAT = 20.0
"""Seconds that a node says its heartbeats are apart (it sends four in that time): a SuperLink takes a node that was
killed for present, and refuses it when it comes back, for twice as long; and it gives up a node that is silent for so
long, such as one whose SuperLink was away."""

UPLOAD_SECONDS = 60.0
"""How long the parts of one message may take to arrive."""

APP = {
    "project": {"name": "perfedrec", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "perfedrec",
                "components": {
                    "serverapp": "perfedrec:serverapp",
                    "clientapp": "perfedrec:clientapp",
                },
                "config": {},
            }
        }
    },
}
"""What a SuperLink wants to know of an app before it opens a run. Its components are never loaded: the coordinator
takes the run's task itself, and nodes answer by themselves."""

GOODBYE = 5.0
"""Most seconds that a goodbye waits for a heartbeat under way, after which the node would count as there again."""

AWAY_SECONDS = 60.0
"""How long a connection outlives a SuperLink that is away."""

NODE_WAITS, COORDINATOR_WAITS = 2, 1
"""Seconds, whole ones, that our SuperLink may hold a question for news. What a process is told meanwhile (to stop, that
a deadline is over) has to wait for as long."""

T = TypeVar("T")


class AwayError(PerfedrecError):
    """The SuperLink or somebody else who is needed cannot be reached, or not now: try again later."""

    exit_code = 3


class RefusedError(PerfedrecError):
    """The SuperLink cannot be trusted, or does not take this node or coordinator."""

    exit_code = 4


class UnknownKeyError(RefusedError):
    """The SuperLink does not accept a node's signature."""


class StoppedError(PerfedrecError):
    """The run that a message belongs to is over."""


# --- messages ---


class Bundler:
    """Makes few objects of a message. Flower moves every record, array and chunk as an object of its own, with a
    request for each: an array record becomes one object here, and a record that several messages share stays one."""

    _MARK = "arrays"

    def __init__(self) -> None:
        self._made: dict[int, tuple[ArrayRecord, ConfigRecord]] = {}

    def bundled(self, message: Message) -> Message:
        """The message as it travels."""
        if message.has_content():
            for name, record in list(message.content.array_records.items()):
                if id(record) not in self._made:
                    values: dict[str, Any] = {self._MARK: len(record)}
                    for key, array in record.items():
                        values[f"{array.dtype} {','.join(map(str, array.shape))} {key}"] = array.data
                    self._made[id(record)] = record, ConfigRecord(values)  # keeps the record, and with it the id
                del message.content[name]  # Flower warns of a record that is replaced
                message.content[name] = self._made[id(record)][1]
        return message

    @classmethod
    def opened(cls, message: Message) -> Message:
        """The message as it was sent. Arrays are read, and checked, by who wants them."""
        if message.has_content():
            for name, record in list(message.content.config_records.items()):
                if cls._MARK in record and len(record) == 1 + int(cast(int, record[cls._MARK])):
                    arrays = ArrayRecord()
                    for key, data in record.items():
                        if isinstance(data, bytes):
                            kind, shape, own = key.split(" ", 2)
                            sizes = tuple(int(each) for each in shape.split(",") if each)
                            arrays[own] = Array(kind, sizes, "numpy.ndarray", data)
                    del message.content[name]
                    message.content[name] = arrays
        return message


class _Patient:
    """Says with each request that the answer may wait ``seconds`` for news (RFC 7240)."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def intercept(
        self, context: ProtobufRequestContext, call_next: Callable[[ProtobufRequestContext], httpx.Response]
    ) -> httpx.Response:
        context.request.headers["prefer"] = f"wait={self.seconds}"
        return call_next(context)


# --- a node ---


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's key, as OpenSSH or PEM. Raises :class:`PerfedrecError` where it is none."""
    try:
        content = path.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
        key = load(content, None)
    except OSError as error:
        raise PerfedrecError(f"{path}: cannot be read ({error.strerror}); expected a private key") from None
    except (ValueError, TypeError):
        raise PerfedrecError(
            f"{path}: cannot be read as a private key; expected what perfedrec federation key wrote, without .pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PerfedrecError(f"{path}: expected a private key on a NIST curve, as ssh-keygen -t ecdsa makes")
    return key


def public_key(path: Path) -> bytes:
    """A node's public key in PEM, from an OpenSSH or PEM file. Raises :class:`PerfedrecError` where it is none."""
    try:
        content = path.read_bytes()
        load = serialization.load_pem_public_key if b"BEGIN" in content else serialization.load_ssh_public_key
        key = load(content)
    except (OSError, ValueError) as error:
        raise PerfedrecError(f"{path}: cannot be read as a public key ({error})") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PerfedrecError(f"{path}: expected a public key on a NIST curve, as ssh-keygen -t ecdsa makes")
    return public_key_to_bytes(key)


class Fleet:
    """A node's connection to a SuperLink, under TLS, with requests that the node's key signs.

    Raises :class:`AwayError` where waiting may help and :class:`RefusedError` where it does not.
    """

    def __init__(self, address: str, ca: Path, key: Path) -> None:
        self.address, private = address, private_key(key)
        self._public = public_key_to_bytes(private.public_key())
        signed = NodeAuthHttpInterceptor(private, private.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self.ending = threading.Event()  # once set, a SuperLink that is away is not waited for
        interceptors: list[ProtobufClientInterceptor] = [version, signed, _Patient(NODE_WAITS)]
        self._client = FleetHttpClient(f"https://{address}", interceptors=interceptors, verify=_trusting(ca))
        self._node: Node | None = None
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    @property
    def node_id(self) -> int:
        assert self._node is not None
        return int(self._node.node_id)

    def activate(self) -> int:
        """Tell the SuperLink that the node is there, and its id. A node that was killed is refused with
        :class:`AwayError` until the SuperLink misses its heartbeats."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        self._node = Node(node_id=_called(self._client.ActivateNode, request, self.address).node_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, self.node_id
        self._beating.start()
        return self.node_id

    def receive(self) -> Message | None:
        """The next message, or ``None`` where none came in the time that the SuperLink holds such a question.

        Raises :class:`StoppedError` when its run is over.
        """
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        head, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        run, name = head.metadata.run_id, head.metadata.message_id
        contents, end = dict[str, bytes](), time.monotonic() + UPLOAD_SECONDS
        for each in iterate_object_tree(tree):
            request = PullObjectRequest(node=self._node, run_id=run, object_id=each.object_id)
            while not (found := self._call(self._client.PullObject, request)).object_available:
                if not found.object_found or time.monotonic() > end:
                    raise StoppedError(f"message {name[:8]} is not complete")
                time.sleep(0.03)
            contents[each.object_id] = found.object_content
        confirmation = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=name)
        self._call(self._client.ConfirmMessageReceived, confirmation)
        message = cast(Message, inflate_object_from_contents(name, contents))
        message.metadata.__dict__["_message_id"] = name
        TaskIdentity.run_id = run
        return Bundler.opened(message)

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply that took so many ``seconds`` to make. Raises :class:`StoppedError` when its run is over."""
        reply = Bundler().bundled(reply)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            head = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            answer = self._call(self._client.PushMessages, request)
            for name in answer.objects_to_push:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=name,
                    object_content=objects[name].deflate(),
                    session_id=answer.session_id,
                )
                if not self._call(self._client.PushObject, part).stored:
                    raise StoppedError("the SuperLink no longer takes this reply")

    def close(self) -> None:
        """Say goodbye, so that the node may come back at once."""
        self._stop.set()
        if self._node is not None:
            self._beating.join(GOODBYE)
            with suppress(PerfedrecError):
                _called(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id), self.address)
        self._client.close()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT / 4):
            with suppress(PerfedrecError, RuntimeError):  # what is wrong shows in the main thread
                request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
                _called(self._client.SendNodeHeartbeat, request, self.address)

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Call, again and again while the SuperLink is away for a short time: a message that was half sent goes on."""
        end, wait = time.monotonic() + AWAY_SECONDS, 0.1
        while True:
            try:
                return _called(method, request, self.address)
            except UnknownKeyError:  # it was before: the SuperLink is that of another run now, or the key was replaced
                raise AwayError(f"{self.address}: the coordinator no longer knows this node") from None
            except AwayError:
                if time.monotonic() > end or self.ending.is_set() or self._stop.wait(wait):
                    raise
                wait = min(2 * wait, 2.0)


def _called(method: Callable[[Any], T], request: Any, address: str) -> T:
    """Call an API, with errors that tell whether waiting helps."""
    try:
        return method(request)
    except httpx.TransportError as error:
        if "certificate" in str(error).lower():
            raise RefusedError(
                f"{address}: its certificate cannot be trusted ({error}); expected one of --ca"
            ) from None
        raise AwayError(f"{address}: the coordinator cannot be reached ({error})") from None
    except httpx.HTTPStatusError as error:
        status, known = error.response.status_code, FlowerError.from_json(error.response.text)
        code = None if known is None else known.code
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise AwayError(f"{address}: this key's node still counts as connected, or is not registered") from None
        if status == httpx.codes.UNAUTHORIZED:
            raise UnknownKeyError(
                f"{address}: this node's key is not accepted; expected one that the coordinator has registered, and a "
                "clock that is right to a few seconds"
            ) from None
        if status == httpx.codes.FORBIDDEN:
            raise StoppedError(f"{address}: the run is over") from None
        if status in (502, 503, 504):
            raise AwayError(f"{address}: the coordinator is not ready (HTTP {status})") from None
        detail = error.response.text[:200] if known is None else f"[{known.code}] {known.message}"
        raise RefusedError(f"{address}: HTTP {status}: {detail}") from None


def _trusting(ca: Path) -> ssl.SSLContext:
    """What trusts the certificates of ``ca`` alone."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise PerfedrecError(f"{ca}: cannot be read as a certificate of an authority ({error})") from None


# --- the coordinator ---


@dataclass(frozen=True)
class Certificates:
    """Files of a server: the authority's certificate, its own certificate, and the key of that."""

    ca: Path
    certificate: Path
    key: Path


class SuperLink:
    """A SuperLink as a child process, which ends with this one, keeps in ``folder`` who is registered and which runs
    are open, and is started again when it dies: so many ``restarts`` until now."""

    def __init__(self, folder: Path, host: str, port: int, certificates: Certificates) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.secret = secrets.token_bytes(32)
        self._secret_file = folder / "superexec.secret"
        self._secret_file.touch(mode=0o600)
        self._secret_file.write_bytes(self.secret)
        self._log = folder / "superlink.log"
        self._command = [
            *(sys.executable, "-P", str(Path(__file__).with_name("superlink.py"))),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret_file)),
            *("--ssl-ca-certfile", str(certificates.ca)),
            *("--ssl-certfile", str(certificates.certificate), "--ssl-keyfile", str(certificates.key)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--host", host, "--port", str(port), "--database", str(folder / "superlink.json")),
        ]
        self._stop, self.restarts = threading.Event(), 0
        self.process = self._start()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            if self.process.poll() is not None:
                self.process, self.restarts = self._start(), self.restarts + 1
                self._stop.wait(2.0)

    def stop(self) -> None:
        """End the process."""
        self._stop.set()
        self._watching.join()  # it may be starting another one just now
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Control:
    """What an administrator may do: register nodes and open runs."""

    def __init__(self, address: str, ca: Path) -> None:
        self.address = address
        version = RuntimeVersionHttpInterceptor(component_name="flwr-cli")
        self._client = ControlHttpClient(f"https://{address}", interceptors=[version], verify=_trusting(ca))

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until the SuperLink answers."""
        end = time.monotonic() + seconds
        while True:
            try:
                self._call(self._client.ListNodes, ListNodesRequest())
                return
            except AwayError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def register(self, keys: Iterable[bytes]) -> dict[int, bytes]:
        """Register the nodes with these public keys (PEM), and no others, and return them by id.

        A key that was unregistered from this SuperLink cannot come back: it is not among those returned.
        """
        wanted, known = set(keys), set()
        for each in self._call(self._client.ListNodes, ListNodesRequest()).nodes_info:
            known.add(each.public_key)
            if each.public_key not in wanted and each.status != NodeStatus.UNREGISTERED:
                self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=each.node_id))
        for key in sorted(wanted - known):
            self._call(self._client.RegisterNode, RegisterNodeRequest(public_key=key))
        nodes = self._call(self._client.ListNodes, ListNodesRequest()).nodes_info
        here = [each for each in nodes if each.public_key in wanted and each.status != NodeStatus.UNREGISTERED]
        return {int(each.node_id): bytes(each.public_key) for each in here}

    def open(self) -> int:
        """Open a run, after ending those that are left of a coordinator that died."""
        for each, run in self._call(self._client.ListRuns, ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                with suppress(PerfedrecError):
                    self._call(self._client.StopRun, StopRunRequest(run_id=each))
        content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(APP).encode()})
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        return int(self._call(self._client.StartRun, StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        return _called(method, request, self.address)


class FastGrid(HttpGrid):
    """A grid whose :meth:`pull_messages` waits no longer than the SuperLink holds a question: what has not arrived
    whole is looked for the next time."""

    def __init__(self, address: str, ca: Path, token: str) -> None:
        super().__init__(address, root_certificates=ca.read_bytes(), token=token)
        self._arriving: dict[str, tuple[Any, list[str], dict[str, bytes], float]] = {}
        self._patience = _Patient(COORDINATOR_WAITS)
        self._runtime_client._interceptors += (self._patience,)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and give the name of each (empty: not taken). What a SuperLink that is started again meanwhile
        forgets is answered by an error later, as what it forgets afterwards."""
        bundler, client, run_id = Bundler(), self._runtime_client, self.run.run_id
        request, objects = PushAppMessagesRequest(), dict[str, Any]()
        with no_object_id_recompute():
            for message in map(bundler.bundled, messages):
                message.metadata.__dict__["_message_id"] = message.object_id
                request.message_object_trees.append(get_object_tree(message))
                objects |= get_all_nested_objects(message)
                request.messages_list.append(message_to_proto(remove_content_from_message(message)))
            answer = client.PushMessages(request)
            for name in answer.objects_to_push:
                part = PushObjectRequest(node=self.node, run_id=run_id, object_id=name, session_id=answer.session_id)
                part.object_content = objects[name].deflate()
                client.PushObject(part)
        return list(answer.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        client, run_id = self._runtime_client, self.run.run_id
        begun = {head.metadata.reply_to_message_id for head, *_ in self._arriving.values()}
        if open_ := [name for name in message_ids if name not in begun]:  # the SuperLink tells of each reply once
            self._patience.seconds = 0 if self._arriving else COORDINATOR_WAITS
            answer = client.PullMessages(PullAppMessagesRequest(message_ids=open_))
            self._patience.seconds = COORDINATOR_WAITS
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                wanted = [each.object_id for each in iterate_object_tree(tree)]
                self._arriving[head.metadata.message_id] = (head, wanted, {}, time.monotonic() + UPLOAD_SECONDS)
        arrived = []
        for name, (head, wanted, contents, end) in list(self._arriving.items()):
            lost = time.monotonic() > end
            for each in wanted:
                if each in contents:
                    continue
                found = client.PullObject(PullObjectRequest(node=self.node, run_id=run_id, object_id=each))
                lost = lost or not found.object_found
                if not found.object_available:
                    break
                contents[each] = found.object_content
            if len(contents) == len(set(wanted)):
                confirmation = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=name)
                client.ConfirmMessageReceived(confirmation)
                message = cast(Message, inflate_object_from_contents(name, contents))
                message.metadata.__dict__["_message_id"] = name
                message = Bundler.opened(message)
            elif lost:
                message = _lost(head, run_id)
            else:
                continue
            del self._arriving[name]
            arrived.append(message)
        return arrived


def _lost(head: Any, run_id: int) -> Message:
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
def attached(address: str, ca: Path, secret: bytes, run_id: int) -> Iterator[Grid]:
    """The grid of a run, which is marked as completed at the end and as failed after an error."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    signed = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    with RuntimeHttpClient(f"https://{address}", interceptors=[version, signed], verify=_trusting(ca)) as client:
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while True:
            answer = _called(client.AcquireTask, request, address)
            if not answer.HasField("task"):
                raise RefusedError(f"{address}: the SuperLink has no task for this coordinator")
            if answer.task.run_id == run_id:
                break
    grid, done = FastGrid(address, ca, answer.token), threading.Event()
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
