"""Flower's private parts are what our modules expect. A failure means: Flower has changed, read the modules again."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient

from perfedrec.core.address import Address
from perfedrec.core.errors import PerfedrecError
from perfedrec.federation.certificates import make_certificates, make_key
from perfedrec.runtimes.flower import Certificates, Endpoint, SuperLink, fleet, messages, public_key
from perfedrec.runtimes.flower.control import APP
from perfedrec.runtimes.flower.keys import private_key
from perfedrec.runtimes.flower.messages import Bundler

READ = ("1.41.", "1.42.")
"""The versions of Flower that were read; pyproject.toml admits no others."""

CALLS = {
    FleetHttpClient: (
        *("ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages", "PullObject"),
        *("PushObject", "ConfirmMessageReceived"),
    ),
    RuntimeHttpClient: (
        *("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat", "PullMessages", "PullObject"),
        "ConfirmMessageReceived",
    ),
    ControlHttpClient: ("ListNodes", "RegisterNode", "ListRuns", "StopRun", "StartRun"),
}


def test_flower_is_the_version_that_was_read() -> None:
    assert metadata.version("flwr").startswith(READ), (
        "fleet, grid, control and messages were written for another Flower"
    )
    for client, names in CALLS.items():
        assert [name for name in names if not hasattr(client, name)] == [], client
    assert ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED == 2004
    assert {"_runtime_client", "pull_messages", "push_messages", "set_run"} <= set(dir(HttpGrid))
    assert list(inspect.signature(HttpGrid).parameters)[:1] == ["runtime_api_address"]
    made = vars(ProtobufClient("https://localhost:1")).keys()
    assert made == {"_base_url", "_interceptors", "_retry_invoker", "_client"}, "see Endpoint.client"


def test_the_app_that_opens_a_run_can_be_built() -> None:
    import tomli_w

    content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(APP).encode()})
    assert content[:2] == b"PK"


def test_bundled_messages_are_few_objects_and_the_same_message() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    shared = ArrayRecord({"float32 a:2,3 b:": Array(np.arange(7, dtype=np.float32)), "int64 c:0": Array(np.zeros(0))})
    bundler, found = Bundler(), []
    for node in (1, 2):
        content = RecordDict({"task": ConfigRecord({"round": node, "raw": b"x"}), "shared": shared})
        message = bundler.bundle(Message(content, dst_node_id=node, message_type="train"))
        assert len(get_all_nested_objects(message)) == 4  # the message, its content, and two records
        found.append(message.content["shared part 0"].object_id)
        opened = Bundler.unbundle(message).content
        assert opened["task"] == ConfigRecord({"round": node, "raw": b"x"})
        for key, array in shared.items():
            assert np.array_equal(opened.array_records["shared"][key].numpy(), array.numpy())
            assert opened.array_records["shared"][key].dtype == array.dtype
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [1, 100, 128, 129, 10_000])
def test_large_records_travel_in_parts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """No part is larger than the size; together they are the same arrays, and another record whose name looks like
    that of a part stays as it is."""
    monkeypatch.setattr(messages, "PART_BYTES", size)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    arrays = {"float32 a:50": np.arange(50, dtype=np.float32), "int64 b:0": np.zeros(0), "bool c:3": np.ones(3, bool)}
    record = ArrayRecord({key: Array(each) for key, each in arrays.items()})
    content = RecordDict({"shared": record, "other part 1": ConfigRecord({"round": 7}), "none": ArrayRecord()})
    message = Bundler().bundle(Message(content, dst_node_id=1, message_type="train"))
    sent = message.content.config_records
    assert all(sum(len(data) for data in each.values() if isinstance(data, bytes)) <= size for each in sent.values())
    total = sum(len(each.data) for each in record.values())
    assert len(sent) == 2 + -(-total // size)
    opened = Bundler.unbundle(message).content
    assert opened.keys() == {"shared", "other part 1", "none"}
    assert opened["other part 1"] == ConfigRecord({"round": 7})
    assert list(opened.array_records["shared"]) == list(arrays)
    for key, each in arrays.items():
        assert np.array_equal(opened.array_records["shared"][key].numpy(), each)


@pytest.mark.parametrize("values", [{"no array": b"1"}, {"int64 a,b x": b"1"}])
def test_records_that_look_like_parts_stay_as_they_are(values: dict[str, bytes]) -> None:
    """A node may send anything."""
    content = RecordDict({"shared part 0": ConfigRecord({"arrays": 1, "part": 0, **values})})
    message = Bundler.unbundle(Message(content, dst_node_id=1, message_type="train"))
    assert message.content.keys() == {"shared part 0"}


def test_a_superlink_ends_while_it_is_being_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, started = threading.Event(), list[subprocess.Popen[bytes]]()

    def start(link: SuperLink) -> subprocess.Popen[bytes]:
        if started:
            begun.set()
            link._stop.wait()  # stop() is called meanwhile
        code = "input()" if started else ""
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(SuperLink, "_start", start)
    files = Certificates(*(tmp_path / name for name in ("ca.crt", "server.pem", "server.key")))
    link = SuperLink(tmp_path / "link", "127.0.0.1", 1, files)
    try:
        begun.wait()
        link.stop()
        assert len(started) == 2
        assert [each.poll() is not None for each in started] == [True, True]
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_no_heartbeat_comes_after_a_goodbye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the node would count as connected, and be refused when it comes back."""
    make_certificates(tmp_path)
    make_key(tmp_path / "n0")
    monkeypatch.setattr(fleet, "HEARTBEAT", 0.01)
    monkeypatch.setattr(fleet, "GOODBYE", 600.0)
    begun, calls = threading.Event(), list[str]()

    def beat(request: Any) -> None:
        begun.set()
        connection._stop.wait()  # close() is called meanwhile
        calls.append("heartbeat")

    connection = fleet.Fleet(Endpoint(Address("127.0.0.1", 1), tmp_path / "ca.crt"), tmp_path / "n0")
    connection._client = SimpleNamespace(  # type: ignore[assignment]
        ActivateNode=lambda request: SimpleNamespace(node_id=7),
        SendNodeHeartbeat=beat,
        DeactivateNode=lambda request: calls.append("goodbye"),
        close=lambda: None,
    )
    connection.activate()
    begun.wait()
    connection.close()
    assert not connection._beating.is_alive()
    assert calls == ["heartbeat", "goodbye"]


def test_keys_are_read_and_other_files_are_refused(tmp_path: Path) -> None:
    make_key(tmp_path / "n0")
    assert (tmp_path / "n0").stat().st_mode & 0o077 == 0
    private = private_key(tmp_path / "n0")
    assert public_key(tmp_path / "n0.pub") == public_key_to_bytes(private.public_key())
    with pytest.raises(PerfedrecError, match="exists already"):
        make_key(tmp_path / "n0")
    (tmp_path / "empty").touch()
    for path, said in ((tmp_path, "it is a folder"), (tmp_path / "n1", "there is no such file or folder")):
        for read, kind in ((private_key, "private"), (public_key, "public")):
            with pytest.raises(PerfedrecError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: cannot be read ({said}); expected a {kind} key, as")
    for name, read, said in (
        ("n0.pub", private_key, "is no private key; expected"),
        ("n0", public_key, "is a private key, which belongs to its owner alone; expected"),
        ("empty", private_key, "is no private key; expected"),
        ("empty", public_key, "is no public key; expected"),
    ):
        with pytest.raises(PerfedrecError, match=f"{name}: {said}"):
            read(tmp_path / name)
    locked = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a word"))
    (tmp_path / "locked").write_bytes(locked)
    with pytest.raises(PerfedrecError, match="locked: has a password; expected a private key without one"):
        private_key(tmp_path / "locked")


def test_certificates_are_renewed_under_the_same_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("localhost", "10.0.0.7"))
    authority, first = (tmp_path / "ca.crt").read_bytes(), (tmp_path / "server.pem").read_bytes()
    make_certificates(tmp_path, ("localhost",))
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "server.pem").read_bytes() != first
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0
