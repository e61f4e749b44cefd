"""Processes of a federation that fail at a chosen moment. They are forked from a process that has imported everything.

A fault is named by its kind and happens once, in a given round; "in keys" and the like name a stage of secure
aggregation. What it does to a process (SIGKILL, a limit on the size of its files, sleep) or to an answer is real; only
the moment is chosen here. Where sums are secure, nodes write down the words that they add and the coordinator the sum
that it opens, beside their logs.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["perfedrec.federation.coordinator", "perfedrec.federation.node", "perfedrec.cli"])
HEARTBEAT = 4.0  # seconds; Flower allows 10 or more. A node that was killed is accepted again after twice as long
SUPERLINK = f"""
import runpy, sys
from flwr.common import constant
constant.HEARTBEAT_MIN_INTERVAL = {HEARTBEAT}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lenient(started: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A replacement of ``SuperLink._start`` that allows such heartbeats."""

    def start(link: Any) -> Any:
        if "-c" not in link._command:
            link._command[2:2] = ["-c", SUPERLINK]
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
        process.join(10)
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

    fleet.HEARTBEAT = HEARTBEAT
    left, answer, send, to_words = dict(faults), node_loop.answer, fleet.Fleet.send, secure_sum.to_words
    current = ""
    if version is not None:
        work.__version__ = version
    if skew:
        _shift(skew)

    def noted(total: Any) -> torch.Tensor:
        words: torch.Tensor = to_words(total)
        np.save(log.parent / f"words-{current}.npy", words.numpy())
        return words

    def faulty(app: Any, message: Message, context: Any) -> Message:
        nonlocal current
        current = message.metadata.group_id
        number = int(current) if current else None  # a message outside rounds
        fault, _, stage = left.get(number, "").partition(" in ")  # type: ignore[arg-type]
        if stage not in ("", message.metadata.message_type.partition(".")[2]):
            fault = ""  # another stage
        elif fault:
            del left[number]  # type: ignore[arg-type]
        if fault in ("killed before", "killed"):
            _die()
        if fault == "killed during":  # the client states are written, the transaction is open
            node_app.dump = _die
        if fault == "slow":
            _await(log.parents[2] / "run" / "metrics.jsonl", f'"round": {number},')
        if fault == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        reply = answer(app, message, context)
        if fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if fault == "killed after":  # all is stored, nothing sent
            _die()
        if fault == "killed once sent":
            left[-2] = fault
        if fault == "leaves":
            os.kill(os.getpid(), signal.SIGTERM)
        if fault in TAMPERED:
            TAMPERED[fault](reply.content)
        return reply

    def sent(connection: Any, reply: Message, seconds: float) -> None:
        send(connection, reply, seconds)
        if left.pop(-2, None):
            _die()

    node_loop.answer, fleet.Fleet.send, secure_sum.to_words = faulty, sent, noted
    app(arguments)


def coordinator(arguments: list[str], name: str, log: Path, faults: Mapping[int, str]) -> None:
    """``perfedrec serve``, for a run that gets the ``name``."""
    _settle(log)
    from perfedrec.cli import app
    from perfedrec.federation import coordinator as module
    from perfedrec.runtimes.flower import secagg
    from perfedrec.runtimes.flower.grid import FastGrid
    from perfedrec.runtimes.flower.superlink_process import SuperLink

    module.secrets = SimpleNamespace(token_hex=lambda size: name)  # type: ignore[assignment]
    left, play, push = dict(faults), module.Coordinator.play, FastGrid.push_messages
    links, started, total = list[Any](), lenient(SuperLink._start), secagg.secure_sum
    current, took = "", 0.0

    def noted(*given: Any) -> Any:
        words = total(*given)
        np.save(log.parent / f"sum-{current}.npy", words.view(np.int64))
        return words

    def faulty(each: Any, state: Any) -> Any:
        nonlocal current, took
        current, fault, start = str(state.round), left.get(int(state.round)), time.monotonic()
        if fault == "hurried":  # from now on the deadline is short, but long enough for this machine
            each.federation = replace(each.federation, deadline=max(4.0, 3 * took))
        after = play(each, state)
        took = time.monotonic() - start
        if fault == "killed":  # the nodes have played the round, and there is no checkpoint of it
            _die()
        return after

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

    module.Coordinator.play, FastGrid.push_messages, SuperLink._start = faulty, pushed, linked
    secagg.secure_sum = noted
    app(arguments)


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


def _await(path: Path, text: str) -> None:
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
