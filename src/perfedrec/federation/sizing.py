"""What a federation needs for its number of items: memory of each process, and bytes of a round.

The factors are fitted to what ``docs/deployment.md`` measured, with profile ``secure`` and few users on each node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError
from perfedrec.runs.progress import size

MB = 10**6


@dataclass(frozen=True)
class Needs:
    """What a federation of ``items`` with vectors of ``dim`` numbers needs: bytes of memory for a node and for the
    coordinator with its SuperLink, and bytes that a round sends to a node and back, at most.

    ``fixed`` and ``fixed_here`` are the part of the memory that does not depend on the items, most of it libraries.
    """

    items: int
    dim: int
    fixed: int = 500 * MB
    fixed_here: int = 640 * MB

    @property
    def node(self) -> int:
        return self.fixed + 130 * self.items * self.dim

    @property
    def coordinator(self) -> int:
        return self.fixed_here + 230 * self.items * self.dim

    @property
    def down(self) -> int:
        return 36 * self.items * self.dim

    @property
    def up(self) -> int:
        return 8 * self.items * self.dim

    def line(self) -> str:
        """The figures as a sentence."""
        return (
            f"{counted(self.items, 'item')} of {self.dim} dimensions: expect about {size(self.node)} of memory for "
            "each node "
            f"and {size(self.coordinator)} here; "
            f"a round sends up to {size(self.down)} to a node and {size(self.up)} back"
        )

    def check_memory(self, nodes: int) -> None:
        """Raise :class:`ConfigError` where this machine has clearly too little memory for ``nodes`` nodes and their
        coordinator: less than the tables alone, without the libraries, which processes on one machine share."""
        tables = nodes * (self.node - self.fixed) + self.coordinator - self.fixed_here
        if (total := memory()) is not None and tables > total:
            raise ConfigError(
                f"{counted(nodes, 'node')} with {counted(self.items, 'item')} of {self.dim} dimensions need about "
                f"{size(tables)} of "
                f"memory, and this machine has {size(total)}; expected fewer nodes (--nodes), shorter vectors "
                "(--set model.embedding_dim=N) or fewer items"
            )


def needs(algorithm: Algorithm[Any, Any, Any], n_items: int) -> Needs | None:
    """What a federation with a method needs; ``None`` for a method whose vectors have no stated length."""
    dim = getattr(getattr(algorithm.settings, "model", None), "embedding_dim", None)
    return None if dim is None else Needs(n_items, dim)


def memory() -> int | None:
    """The bytes of memory of this machine; ``None`` where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
