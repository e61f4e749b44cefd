"""A node's own file: the interactions and private memories of the users it hosts, in SQLite."""

from perfedrec.runtimes.node.database import StoreError
from perfedrec.runtimes.node.store import RoundError, Store

__all__ = ["RoundError", "Store", "StoreError"]
