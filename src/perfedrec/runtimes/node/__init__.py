"""A node's file: the interactions and client states of the users it hosts, in SQLite, and recommending from it."""

from perfedrec.runtimes.node.database import StoreError
from perfedrec.runtimes.node.model import Served
from perfedrec.runtimes.node.rounds import RoundError
from perfedrec.runtimes.node.serving import LocalRecommender, serving_broadcast
from perfedrec.runtimes.node.store import Store

__all__ = ["LocalRecommender", "RoundError", "Served", "Store", "StoreError", "serving_broadcast"]
