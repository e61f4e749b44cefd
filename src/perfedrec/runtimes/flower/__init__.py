"""The Flower runtime: the rounds of :mod:`perfedrec.runtimes.round`, between a coordinator and nodes that host users.

Flower is imported in this package only. A node hosts any number of users. Its ``ClientApp`` runs the same client
functions as the simulator, and answers with one sum. The same keys give the same tables, bit for bit.

A deployment is a :class:`Coordinator` over the grid of a :class:`SuperLink`, and nodes that call :func:`run_node`.

Names are imported when they are first asked for: a node needs neither the coordinator's part of Flower nor its
database.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfedrec.runtimes.flower.codec import REASONS, BroadcastLayout, Setup, Task, UploadError, counted
    from perfedrec.runtimes.flower.connection import AwayError, Endpoint, RefusedError
    from perfedrec.runtimes.flower.control import Control
    from perfedrec.runtimes.flower.coordinator import Coordinator
    from perfedrec.runtimes.flower.diary import Owner
    from perfedrec.runtimes.flower.evaluation import Answers
    from perfedrec.runtimes.flower.exchange import Rejection
    from perfedrec.runtimes.flower.fleet import Fleet
    from perfedrec.runtimes.flower.gate import Apart
    from perfedrec.runtimes.flower.grid import attached
    from perfedrec.runtimes.flower.keys import public_key
    from perfedrec.runtimes.flower.node_app import NodeApp
    from perfedrec.runtimes.flower.node_loop import Activity, run_node
    from perfedrec.runtimes.flower.rates import Rates, Refused
    from perfedrec.runtimes.flower.rounds import Directory, Federation, Seen, play_round
    from perfedrec.runtimes.flower.sealing import Bundle, public_of
    from perfedrec.runtimes.flower.service import needs_service
    from perfedrec.runtimes.flower.service_app import ServiceApp
    from perfedrec.runtimes.flower.service_client import ServiceClient
    from perfedrec.runtimes.flower.superlink_process import Certificates, SuperLink

__all__ = [
    "REASONS",
    "Activity",
    "Answers",
    "Apart",
    "AwayError",
    "BroadcastLayout",
    "Bundle",
    "Certificates",
    "Control",
    "Coordinator",
    "Directory",
    "Endpoint",
    "Federation",
    "Fleet",
    "NodeApp",
    "Owner",
    "Rates",
    "Refused",
    "RefusedError",
    "Rejection",
    "Seen",
    "ServiceApp",
    "ServiceClient",
    "Setup",
    "SuperLink",
    "Task",
    "UploadError",
    "attached",
    "counted",
    "needs_service",
    "play_round",
    "public_key",
    "public_of",
    "run_node",
]

_HOMES = {
    "REASONS": "codec",
    "BroadcastLayout": "codec",
    "Setup": "codec",
    "Task": "codec",
    "UploadError": "codec",
    "counted": "codec",
    "AwayError": "connection",
    "Endpoint": "connection",
    "RefusedError": "connection",
    "Control": "control",
    "Coordinator": "coordinator",
    "Owner": "diary",
    "Answers": "evaluation",
    "Rejection": "exchange",
    "Fleet": "fleet",
    "Apart": "gate",
    "attached": "grid",
    "public_key": "keys",
    "NodeApp": "node_app",
    "Activity": "node_loop",
    "run_node": "node_loop",
    "Rates": "rates",
    "Refused": "rates",
    "Directory": "rounds",
    "Seen": "rounds",
    "Federation": "rounds",
    "play_round": "rounds",
    "Bundle": "sealing",
    "public_of": "sealing",
    "needs_service": "service",
    "ServiceApp": "service_app",
    "ServiceClient": "service_client",
    "Certificates": "superlink_process",
    "SuperLink": "superlink_process",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
