"""The neighbourhood service's process: its folder with keys and states, and the coordinator that it works for."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from perfedrec import __version__
from perfedrec.core.errors import ConfigError, reason
from perfedrec.core.records import copied, unflatten
from perfedrec.federation.agreement import build
from perfedrec.federation.bundles import KEYS, read_keys
from perfedrec.federation.metrics import Expose, nowhere, of_service
from perfedrec.federation.process import Connection
from perfedrec.runs import checkpoint
from perfedrec.runtimes.flower import ServiceApp, run_node

R = TypeVar("R")


@dataclass(frozen=True)
class StateStore:
    """The states of the service in a ``folder``: the last two checkpoints of the latest run."""

    folder: Path

    def get(self, run: str, played: int, like: R) -> R | None:
        """The state after ``played`` rounds of a run, as a record of the class of ``like``; ``None`` where it was not
        kept.

        Raises :class:`CheckpointError` where it is damaged.
        """
        folder = checkpoint.folder_of(self._folder_of(run), played)
        if not folder.exists():
            return None
        return copied(unflatten(type(like), *checkpoint.load(folder, {"run": run}).records["service"]))

    def put(self, run: str, played: int, state: object) -> None:
        """Store the state after ``played`` rounds of a run, and remove the states of other runs."""
        own = self._folder_of(run)
        checkpoint.save(checkpoint.folder_of(own, played), {"service": state}, {"run": run}, {})
        checkpoint.prune(own)
        for other in self.folder.glob("run-*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)

    def _folder_of(self, run: str) -> Path:
        return self.folder / f"run-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def serve_neighbours(
    connection: Connection,
    folder: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    expose: Expose = nowhere,
) -> None:
    """Work for a coordinator until SIGTERM, SIGINT or ``stop``; the current message is answered first.

    The ``folder`` has the service's keys and receives its states. ``tell`` receives lines about what changes,
    ``expose`` the source of metrics.
    """
    connection.prepare(stop)
    keys = read_keys(folder / KEYS)
    try:
        folder.chmod(0o700)  # it receives vectors of users
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be closed to other users ({reason(error)}); expected a folder of this user"
        ) from None
    app = ServiceApp(keys.private, keys.nodes, build, __version__, StateStore(folder))
    expose(lambda: of_service(app.activity))
    run_node(connection.open, app, stop, tell)
