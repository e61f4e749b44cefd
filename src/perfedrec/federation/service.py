"""The neighbourhood service's process: its folder with keys and states, and the coordinator that it works for."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfedrec import __version__
from perfedrec.core.errors import ConfigError
from perfedrec.core.records import copied, unflatten
from perfedrec.federation.bundles import KEYS, read_keys
from perfedrec.federation.metrics import Expose, nowhere, of_service
from perfedrec.federation.model_file import build
from perfedrec.federation.node import prepare
from perfedrec.runs import checkpoint
from perfedrec.runtimes.flower import Fleet, ServiceApp, run_node


@dataclass(frozen=True)
class StateStore:
    """The service's states in a ``folder``: checkpoints of the latest run, the last two of them."""

    folder: Path

    def get(self, run: str, played: int, like: Any) -> Any:
        """The state, a record like ``like``, after so many rounds of a run; ``None`` where it was not kept.

        Raises :class:`CheckpointError` where it is damaged.
        """
        folder = checkpoint.folder_of(self._of(run), played)
        if not folder.exists():
            return None
        return copied(unflatten(type(like), *checkpoint.load(folder, {"run": run}).records["service"]))

    def put(self, run: str, played: int, state: Any) -> None:
        """Keep a state, and drop those of other runs."""
        own = self._of(run)
        checkpoint.save(checkpoint.folder_of(own, played), {"service": state}, {"run": run}, {})
        checkpoint.prune(own)
        for other in self.folder.glob("run-*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)

    def _of(self, run: str) -> Path:
        return self.folder / f"run-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def serve_neighbours(
    folder: Path,
    address: str,
    ca: Path,
    key: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    threads: int = 1,
    expose: Expose = nowhere,
) -> None:
    """Work for the coordinator at ``address`` until SIGTERM, SIGINT or ``stop``, after the work at hand.

    ``folder`` has the service's keys, and gets its states. ``expose`` is given the source of metrics.
    """
    prepare(address, threads, stop)
    keys = read_keys(folder / KEYS)
    try:
        folder.chmod(0o700)  # it gets vectors of users
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made its owner's alone ({error.strerror})") from None
    station = ServiceApp(keys.private, keys.nodes, build, __version__, StateStore(folder))
    expose(lambda: of_service(station.done))
    run_node(lambda: Fleet(address, ca, key), station, stop, tell)
