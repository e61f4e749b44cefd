"""A node's own file: the interactions and private memories of the users it hosts, in SQLite."""

from perfedrec.runtimes.node.database import StoreError
from perfedrec.runtimes.node.serving import Advisor, serving_view
from perfedrec.runtimes.node.store import RoundError, Served, Store

__all__ = ["Advisor", "RoundError", "Served", "Store", "StoreError", "serving_view"]
