"""What a node's process and the neighbourhood service's process have in common."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from perfedrec.core.address import Address
from perfedrec.core.errors import ConfigError
from perfedrec.runtimes.flower import Endpoint, Fleet


@dataclass(frozen=True)
class Connection:
    """How a process works for a coordinator: at which ``address`` (HOST:PORT) it is, the certificate ``ca`` of the
    authority that vouches for it, the private ``key`` of this process, and how many ``threads`` it computes with.

    Raises :class:`ConfigError` for an address or a number of threads that is not possible.
    """

    address: str
    ca: Path
    key: Path
    threads: int = 1

    def __post_init__(self) -> None:
        Address.parse(self.address, "--coordinator")
        if self.threads < 1:
            raise ConfigError(f"--threads {self.threads}: expected at least 1")

    def prepare(self, stop: threading.Event) -> None:
        """Set the number of threads, and let SIGTERM and SIGINT set ``stop``."""
        torch.set_num_threads(self.threads)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())

    def open(self) -> Fleet:
        """A connection to the coordinator's SuperLink."""
        return Fleet(Endpoint(Address.parse(self.address, "--coordinator"), self.ca), self.key)
