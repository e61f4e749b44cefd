"""A method whose clients end their process in mid-round. It has a module of its own, because workers import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from perfedrec.methods.federated.fedmf import FedMF


class Mortal(FedMF[Any, Any, Any]):
    """FedMF that kills the first process, other than that which made it, that trains while the file ``fuse`` exists; it
    removes the file before."""

    def __init__(self, settings: Any, fuse: Path) -> None:
        super().__init__(settings)
        self.fuse, self.maker = fuse, os.getpid()

    def client(self, phase: str, broadcast: Any, rows: Any, client_state: Any, key: Any) -> Any:
        found = super().client(phase, broadcast, rows, client_state, key)
        if os.getpid() != self.maker:
            try:
                self.fuse.unlink()
            except FileNotFoundError:
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return found
