"""A node's process: its file, its key, and the coordinator that it works for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from perfedrec import __version__
from perfedrec.experiment.node import build
from perfedrec.runtimes.flower import Fleet, Station, run_node
from perfedrec.runtimes.node import Store


def work_for(
    store: Path,
    address: str,
    ca: Path,
    key: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    threads: int = 1,
) -> None:
    """Work for the coordinator at ``address`` until SIGTERM, SIGINT or ``stop``, after the work at hand."""
    torch.set_num_threads(threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Store.open(store) as users:
        run_node(lambda: Fleet(address, ca, key), Station(users, build, __version__), stop, tell)
