"""The runs of a comparison, several at a time, each ``perfedrec train`` in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from perfedrec.compare.bench import Cell
from perfedrec.core.errors import ConfigError
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.training import InterruptedRunError, signals

COST = "cost.json"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


class Watcher(Protocol):
    """Shows how a comparison goes on. Called from several threads."""

    def begin(self, cell: Cell) -> None: ...

    def round(self, cell: Cell, standing: dict[str, Any]) -> None: ...

    def end(self, cell: Cell, error: str | None) -> None: ...


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keep other comparisons out of a folder that exists; :class:`ConfigError` where one is at work."""
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{output}: another perfedrec bench is at work in this folder") from None
        yield


def play(cells: Sequence[Cell], processes: int, watcher: Watcher) -> dict[str, str]:
    """Run what is not finished, ``processes`` at a time; names of cells that failed, with their error.

    What has a checkpoint goes on from it. SIGINT and SIGTERM reach every run once: it ends after its round with a
    checkpoint, and then :class:`InterruptedRunError` is raised.
    """
    todo = [cell for cell in cells if not cell.finished]
    failed: dict[str, str] = {}
    with TemporaryDirectory(prefix="perfedrec-") as scratch, signals() as caught, ThreadPoolExecutor(processes) as pool:
        children = _Children()
        futures = {pool.submit(_run, cell, Path(scratch), children, watcher): cell for cell in todo}
        waiting: set[Future[str | None]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2)
                failed |= {futures[each].name: error for each in done if (error := each.result()) is not None}
                if caught:
                    children.stop(signal.SIGTERM)
        except BaseException:
            children.stop(signal.SIGKILL)
            raise
    if caught and any(not cell.finished for cell in cells):
        kept = sum(cell.finished for cell in cells)
        raise InterruptedRunError(
            f"stopped by {signal.Signals(caught[0]).name}: {kept} of {len(cells)} runs are finished, "
            f"{sum(cell.begun and not cell.finished for cell in cells)} more have a checkpoint; "
            "the same command goes on",
            caught[0],
        )
    return failed


class _Children:
    """The processes that are running. A signal reaches each at most once, and none that has been reaped."""

    def __init__(self) -> None:
        self.lock, self.running = threading.Lock(), set[int]()
        self.stopped: signal.Signals | None = None

    def start(self, command: Sequence[str]) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.stopped is not None:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | _ONE_THREAD,
                start_new_session=True,  # a terminal's Ctrl-C is passed on by us, once
            )
            self.running.add(process.pid)
            return process

    def stop(self, number: signal.Signals) -> None:
        with self.lock:
            if self.stopped != number:
                self.stopped = number
                for pid in self.running:
                    os.kill(pid, number)

    def reap(self, process: subprocess.Popen[str]) -> float:
        """Wait for the end of a process; its processor time in seconds."""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self.lock:
            self.running.remove(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime


def _run(cell: Cell, scratch: Path, children: _Children, watcher: Watcher) -> str | None:
    """One run, from its beginning or its checkpoint; what went wrong, or ``None``."""
    if children.stopped is not None:
        return None
    command = [sys.executable, "-m", "perfedrec", "train", "--json", "--output", str(cell.folder)]
    before = {"seconds": 0.0, "cpu_seconds": 0.0}
    if cell.begun:
        write_atomic(cell.folder / "config.toml", cell.config.to_toml().encode())  # data may have moved
        before |= cost(cell.folder)
        command += ["--resume", "--previous"]
    else:
        shutil.rmtree(cell.folder, ignore_errors=True)  # broken off before its first checkpoint
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        file = scratch / f"{threading.get_ident()}.toml"
        file.write_text(cell.config.to_toml(), encoding="utf-8")
        command += ["--config", str(file)]
    start = time.perf_counter()
    process = children.start(command)
    if process is None:
        return None
    watcher.begin(cell)
    said = []
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            try:
                watcher.round(cell, json.loads(line))
            except ValueError:
                said.append(line)
    cpu = children.reap(process)
    if cell.folder.exists():
        spent = {
            "seconds": before["seconds"] + time.perf_counter() - start,
            "cpu_seconds": before["cpu_seconds"] + cpu,
        }
        write_atomic(cell.folder / COST, json.dumps(spent).encode())
    error, log = None, cell.folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    if process.returncode and children.stopped is None:
        write_atomic(log, "".join(said).encode())
        last = said[-1].strip().removeprefix("error: ") if said else f"exit code {process.returncode}"
        error = last if process.returncode == 2 else f"{last} (see {log})"
    watcher.end(cell, error)
    return error


def cost(folder: Path) -> dict[str, float]:
    """Seconds and processor seconds of a run's processes, from their start to their end."""
    try:
        found: dict[str, float] = json.loads((folder / COST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
