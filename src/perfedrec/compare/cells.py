"""Plays the runs of a comparison, several at a time: each is ``perfedrec train`` in a process of its own."""

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

from perfedrec.compare.bench import BENCH, Cell
from perfedrec.core.errors import ConfigError
from perfedrec.runs.checkpoint import check_writable, write_atomic
from perfedrec.runs.files import CONFIG
from perfedrec.runs.signals import InterruptedRunError, signals

COST = "cost.json"
LOCK = ".lock"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


class Watcher(Protocol):
    """Shows the progress of a comparison. Called from several threads."""

    def begin(self, cell: Cell) -> None: ...

    def round(self, cell: Cell, progress: dict[str, Any]) -> None:
        """``progress`` is a line of ``perfedrec train --json``, one for each round."""

    def end(self, cell: Cell, error: str | None) -> None: ...


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_output(output: Path) -> None:
    """Raise :class:`ConfigError` where a folder can hold no comparison: it holds something else, it is in use, or it
    cannot be written to."""
    check_writable(output)
    holds_run = (output / CONFIG).exists()
    known = any((output / name).exists() for name in (BENCH, "results.json"))
    if holds_run or (output.exists() and any(output.iterdir()) and not known):
        what = "holds a run" if holds_run else "is not empty"
        raise ConfigError(f"{output} {what}; expected a new folder, or that of a comparison to continue it")
    if (output / LOCK).exists():
        with locked(output):
            pass


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock the folder of a comparison. Raises :class:`ConfigError` where another process uses it."""
    with open(output / LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{output}: another perfedrec bench is running in this folder; wait for its end or use another --output"
            ) from None
        yield


def play(cells: Sequence[Cell], processes: int, watcher: Watcher) -> dict[str, str]:
    """Play all cells that are not finished, ``processes`` at a time, and return the error of each failed cell by name.

    A run that has a checkpoint is resumed from it. SIGINT and SIGTERM are passed on to every run once: each run ends
    after its current round with a checkpoint, and then :class:`InterruptedRunError` is raised.
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
        finished = sum(cell.finished for cell in cells)
        raise InterruptedRunError(
            f"stopped by {signal.Signals(caught[0]).name}: {finished} of {len(cells)} runs are finished, "
            f"{sum(cell.begun and not cell.finished for cell in cells)} more have a checkpoint; "
            "run the same command again to continue",
            caught[0],
        )
    return failed


class _Children:
    """The processes that are running.

    Each signal is sent to a process at most once, and never to a process that has been reaped: its number may already
    belong to another process.
    """

    def __init__(self) -> None:
        self.lock, self.running = threading.Lock(), set[int]()
        self.stopped: signal.Signals | None = None

    def start(self, command: Sequence[str]) -> subprocess.Popen[str] | None:
        """Start a process; ``None`` where :meth:`stop` has been called already."""
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
                start_new_session=True,  # a terminal sends Ctrl-C to its whole session; here we pass it on, once
            )
            self.running.add(process.pid)
            return process

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to all running processes."""
        with self.lock:
            if self.stopped != number:
                self.stopped = number
                for pid in self.running:
                    os.kill(pid, number)

    def reap(self, process: subprocess.Popen[str]) -> float:
        """Wait until a process has ended, and return its processor time in seconds."""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self.lock:
            self.running.remove(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime


def _run(cell: Cell, scratch: Path, children: _Children, watcher: Watcher) -> str | None:
    """Play one run from its start or its checkpoint, and return its error, or ``None``."""
    if children.stopped is not None:
        return None
    before = {"seconds": 0.0, "cpu_seconds": 0.0} | (cost(cell.folder) if cell.begun else {})
    command, start = _command(cell, scratch), time.perf_counter()
    process = children.start(command)
    if process is None:
        return None
    watcher.begin(cell)
    output = []  # the lines that are not progress: warnings, an error, a traceback
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            try:
                watcher.round(cell, json.loads(line))
            except ValueError:
                output.append(line)
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
        write_atomic(log, "".join(output).encode())
        last = output[-1].strip().removeprefix("error: ") if output else f"exit code {process.returncode}"
        error = last if process.returncode == 2 else f"{last} (see {log})"
    watcher.end(cell, error)
    return error


def _command(cell: Cell, scratch: Path) -> list[str]:
    """The command that starts or resumes a run. Writes the configuration that it reads, and clears its folder."""
    command = [sys.executable, "-m", "perfedrec", "train", "--json", "--output", str(cell.folder)]
    if cell.begun:
        write_atomic(cell.folder / "config.toml", cell.config.to_toml().encode())  # the data may have moved since
        return [*command, "--resume", "--previous"]
    shutil.rmtree(cell.folder, ignore_errors=True)  # left by a run that stopped before its first checkpoint
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    file = scratch / f"{threading.get_ident()}.toml"
    file.write_text(cell.config.to_toml(), encoding="utf-8")
    return [*command, "--config", str(file)]


def cost(folder: Path) -> dict[str, float]:
    """``seconds`` and ``cpu_seconds`` of a run's processes, from their start to their end; empty where not recorded."""
    try:
        found: dict[str, float] = json.loads((folder / COST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
