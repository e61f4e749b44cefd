"""A node's file: the interactions and client states of the users it hosts, in SQLite, and recommending from it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfedrec.runtimes.node.database import StoreError
    from perfedrec.runtimes.node.journal import Entry, Stated
    from perfedrec.runtimes.node.model import Served
    from perfedrec.runtimes.node.rounds import RoundError
    from perfedrec.runtimes.node.scorer import Scorer
    from perfedrec.runtimes.node.serving import LocalRecommender, serving_broadcast
    from perfedrec.runtimes.node.store import Store

__all__ = [
    "Entry",
    "LocalRecommender",
    "RoundError",
    "Scorer",
    "Served",
    "Stated",
    "Store",
    "StoreError",
    "serving_broadcast",
]

_HOMES = {
    "Entry": "journal",
    "Stated": "journal",
    "LocalRecommender": "serving",
    "RoundError": "rounds",
    "Scorer": "scorer",
    "Served": "model",
    "Store": "store",
    "StoreError": "database",
    "serving_broadcast": "serving",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: what scores without torch does not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
