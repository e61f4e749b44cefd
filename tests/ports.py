"""Ports for tests that run at the same time on one machine."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path
from typing import IO

from perfedrec.federation import local

LOCKS = Path(tempfile.gettempdir()) / "perfedrec-test-ports"
_held: list[IO[bytes]] = []


def reserved_port() -> int:
    """A free port that no other process of these tests uses until this one ends."""
    LOCKS.mkdir(exist_ok=True)
    while True:
        port = local.free_port()
        lock = open(LOCKS / str(port), "wb")  # noqa: SIM115 - it is held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        return port
