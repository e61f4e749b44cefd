"""Processes of a federation that fail at a chosen moment. They are forked from a process that has imported everything.

A fault is named by its kind and happens once, in a given round; "in keys" and the like name a stage of secure
aggregation. What it does to a process (SIGKILL, a limit on the size of its files, sleep) or to an answer is real. The
moment is chosen here, and so are the moments for which the program itself has a clock: a process that is to be missed
puts its name into a folder. The SuperLink counts the heartbeats of a node as missed once it is in ``gone``. A
coordinator that does "not wait" counts a deadline as over once all answers are there but those of nodes in ``gone`` or
``late``. All other limits of time are so long that they only end a test that hangs. Where sums are secure, nodes write
down the words that they add and the coordinator the sum that it opens, beside their logs.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["perfedrec.federation.coordinator", "perfedrec.federation.node", "perfedrec.cli"])
LONG = 900.0  # seconds
SUPERLINK = """
import contextlib, pathlib, runpy, sys
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState as State

def missed(state, back=None):
    for file in gone.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            number = int(file.read_text())
            if number in state.nodes:
                state.nodes[number].online_until = 0.0
            if number == back:
                file.unlink()

def looking(method):
    def looked(state, *given, **named):
        missed(state)
        return method(state, *given, **named)
    return looked

def activate(state, node, interval):
    with state.lock:
        missed(state, node)
        return activated(state, node, interval)

activated, State.activate_node = State.activate_node, activate
State.get_nodes, State.get_message_res = looking(State.get_nodes), looking(State.get_message_res)
gone, sys.argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def patient() -> None:
    """Let this process wait for others as long as it takes."""
    from perfedrec.runtimes.flower import connection, fleet, grid
    from perfedrec.runtimes.flower.control import Control

    connection.TIMEOUT = fleet.AWAY_SECONDS = fleet.UPLOAD_SECONDS = grid.UPLOAD_SECONDS = fleet.HEARTBEAT = LONG
    Control.wait.__defaults__ = (LONG,)


def watched(started: Callable[[Any], Any], gone: Path) -> Callable[[Any], Any]:
    """A replacement of ``SuperLink._start`` whose SuperLink misses the heartbeats of nodes in ``gone``."""

    def start(link: Any) -> Any:
        if "-c" not in link._command:
            link._command[2:2] = ["-c", SUPERLINK, str(gone)]
        return started(link)

    return start


def start(target: Callable[..., None], *given: Any) -> Any:
    process = FORKS.Process(target=target, args=given)
    process.start()
    return process


def end(process: Any) -> None:
    """End a process, whatever state it is in."""
    if process.is_alive():
        process.terminate()
        process.join(60)
    if process.is_alive():
        process.kill()
    process.join()


def node(
    arguments: list[str], log: Path, faults: Mapping[int, str], version: str | None = None, skew: float = 0.0
) -> None:
    """``perfedrec node run`` or ``service run``, of another ``version``, or with a clock that is off by ``skew``
    seconds."""
    _settle(log)
    from perfedrec.cli import app
    from perfedrec.federation import node as work
    from perfedrec.runtimes.flower import fleet, node_app, node_loop, secure_sum

    patient()
    home = log.parents[1 if log.parent.name == "service" else 2]
    close, metrics, leaving = fleet.Fleet.close, home / "run" / "metrics.jsonl", ""
    left, answer, send, to_words = dict(faults), node_loop.answer, fleet.Fleet.send, secure_sum.to_words
    current, context_of = "", SimpleNamespace(node_id=0)
    if version is not None:
        work.__version__ = version
    if skew:
        _shift(skew)

    def noted(total: Any) -> torch.Tensor:
        words: torch.Tensor = to_words(total)
        np.save(log.parent / f"words-{current}.npy", words.numpy())
        return words

    def dies(*_: Any) -> Any:
        _put(home / "gone" / log.parent.name, str(context_of.node_id))
        _die()

    def faulty(app: Any, message: Message, context: Any) -> Message:
        nonlocal current, leaving
        current, context_of.node_id = message.metadata.group_id, context.node_id
        number = int(current) if current else None  # a message outside rounds
        fault, _, stage = left.get(number, "").partition(" in ")  # type: ignore[arg-type]
        if stage not in ("", message.metadata.message_type.partition(".")[2]):
            fault = ""  # another stage
        elif fault:
            del left[number]  # type: ignore[arg-type]
        if fault in ("killed before", "killed"):
            dies()
        if fault == "killed during":  # the client states are written, the transaction is open
            node_app.dump = dies
        if fault == "slow":
            late = _put(home / "late" / log.parent.name)
            _await(metrics, f'"round": {number},')
            late.unlink()
        if fault == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        reply = answer(app, message, context)
        if fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if fault == "killed after":  # all is stored, nothing sent
            dies()
        if fault == "killed once sent":
            left[-2] = fault
        if fault == "leaves":
            leaving = f'"round": {number},'
            os.kill(os.getpid(), signal.SIGTERM)
        if fault in TAMPERED:
            TAMPERED[fault](reply.content)
        return reply

    def sent(connection: Any, reply: Message, seconds: float) -> None:
        send(connection, reply, seconds)
        if left.pop(-2, None):
            dies()

    def closed(connection: Any) -> None:
        if leaving:  # a SuperLink drops the answers of nodes that have left
            _await(metrics, leaving)
        close(connection)

    node_loop.answer, fleet.Fleet.send, fleet.Fleet.close = faulty, sent, closed
    secure_sum.to_words = noted
    app(arguments)


def coordinator(arguments: list[str], name: str, log: Path, faults: Mapping[int, str]) -> None:
    """``perfedrec serve``, for a run that gets the ``name``. A fault of round -1 happens before the model is handed
    out."""
    _settle(log)
    patient()
    from perfedrec.cli import app
    from perfedrec.federation import coordinator as module
    from perfedrec.runtimes.flower import secagg
    from perfedrec.runtimes.flower.grid import FastGrid
    from perfedrec.runtimes.flower.superlink_process import SuperLink

    module.secrets = SimpleNamespace(token_hex=lambda size: name)  # type: ignore[assignment]
    exchanges: Any = import_module("perfedrec.runtimes.flower.exchange")
    left, play, hand_out, push = (
        dict(faults),
        module.Coordinator.play,
        module.Coordinator.hand_out,
        FastGrid.push_messages,
    )
    links, started, total = list[Any](), watched(SuperLink._start, log.parent / "gone"), secagg.secure_sum
    exchange, waits, current = exchanges.exchange, Waits(log.parent), ""

    def noted(*given: Any) -> Any:
        words = total(*given)
        np.save(log.parent / f"sum-{current}.npy", words.view(np.int64))
        return words

    def faulty(each: Any, state: Any) -> Any:
        nonlocal current
        current, fault, waits.names = str(state.round), left.get(int(state.round)), each.names
        waits.short |= fault == "not waiting"
        if fault == "held":
            _await(log.parent / f"go-{current}")
        after = play(each, state)
        if fault == "killed":  # the nodes have played the round, and there is no checkpoint of it
            _die()
        if fault == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        return after

    def handed_out(*given: Any) -> Any:
        if left.get(-1) == "held":
            _await(log.parent / "go--1")
        return hand_out(*given)

    def exchanged(grid: Any, messages: Any, timeout: float) -> Iterator[Any]:
        messages = list(messages)
        waits.open = {each.metadata.dst_node_id for each in messages}
        for node, reply in exchange(grid, messages, timeout):
            waits.open.discard(node)
            yield node, reply

    def pushed(grid: Any, messages: Any) -> Any:
        messages = list(messages)
        names = push(grid, messages)
        number = messages[0].metadata.group_id if messages else ""
        if number and left.get(int(number)) == "SuperLink killed":
            del left[int(number)]
            links[-1].kill()
        return names

    def linked(link: Any) -> Any:
        links.append(started(link))
        return links[-1]

    module.Coordinator.play, module.Coordinator.hand_out = faulty, handed_out
    FastGrid.push_messages, SuperLink._start, secagg.secure_sum = pushed, linked, noted
    exchanges.exchange, exchanges.time = exchanged, waits
    app(arguments)


class Waits:
    """The clock of a coordinator's exchanges. Where it is ``short`` it jumps once only nodes are missing that are known
    not to answer in time. ``open`` are the nodes that have not answered, and ``names`` those of all nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.short, self.skipped = folder, False, 0.0
        self.open, self.names = set[int](), dict[int, str]()

    def monotonic(self) -> float:
        missing = {file.name for kind in ("gone", "late") for file in (self.folder / kind).glob("*")}
        if self.short and self.open and {self.names[node] for node in self.open} <= missing:
            self.skipped += 1e6
        return time.monotonic() + self.skipped

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _put(path: Path, text: str = "") -> Path:
    """Write a small file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    scratch = path.parent.with_name(f"{path.name}.new")
    scratch.write_text(text)
    return scratch.replace(path)


def _shift(seconds: float) -> None:
    """Shift the clock of this process, as Flower and perfedrec read it. (With libfaketime Python's waits hang.)"""
    from flwr.supercore import date

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=seconds)

    right = time.time
    time.time = lambda: right() + seconds
    date.datetime = SimpleNamespace(datetime=Shifted, UTC=datetime.UTC)  # type: ignore[assignment]


def _settle(log: Path) -> None:
    """Write to ``log``, and end when the tests do."""
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        _die()

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)


def _await(path: Path, text: str = "") -> None:
    while not (path.exists() and text in path.read_text()):
        time.sleep(0.05)


def _die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _change(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[RecordDict], None]:
    def tamper(content: RecordDict) -> None:
        from perfedrec.runtimes.flower.codec import pack, unpack

        tensors = unpack(content.array_records["sums"])
        tensors[name] = change(tensors[name])
        content["sums"] = pack(tensors)

    return tamper


def _claim(content: RecordDict) -> None:
    counts = content.config_records["counts"]
    counts["clients"] = int(counts["clients"]) + 1  # type: ignore[call-overload]


def _lie(content: RecordDict) -> None:
    record = content.array_records["sums"]
    key, array = next(iter(record.items()))
    del record[key]
    record[key.replace(":", ":7,", 1)] = array


TAMPERED: dict[str, Callable[[RecordDict], None]] = {
    "not finite": _change("sums", lambda sums: sums.index_fill(0, torch.tensor([0]), torch.nan)),
    "shape": _change("sums", lambda sums: sums[:, 1:]),
    "size": _change("sums", lambda sums: torch.zeros(1_000_000)),
    "keys": _change("keys", lambda keys: keys.flip(0)),
    "users": _claim,
    "malformed": _lie,
}
"""Answers that cannot be part of a sum, by the reason for which they are refused."""
