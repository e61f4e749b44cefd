"""A node's own file: the interactions and private memories of the users it hosts, in SQLite."""

from perfedrec.runtimes.node.database import StoreError
from perfedrec.runtimes.node.serving import LocalRecommender, serving_broadcast
from perfedrec.runtimes.node.store import RoundError, Served, Store

__all__ = ["LocalRecommender", "RoundError", "Served", "Store", "StoreError", "serving_broadcast"]
