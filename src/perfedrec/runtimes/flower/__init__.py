"""The Flower runtime: the rounds of :mod:`perfedrec.runtimes.round` between a server and nodes that hold users' data.

Flower is imported in this package alone. A node hosts any number of users; its ``ClientApp`` runs the same client
functions as the simulator and answers with one sum. The same keys give the same tables, bit for bit.

A deployment is a :class:`Coordinator` over the grid of a :class:`SuperLink`, and nodes that :func:`run_node`.
"""

from perfedrec.runtimes.flower.client_app import Hosted, client_app
from perfedrec.runtimes.flower.codec import REASONS, BroadcastLayout, Setup, Task, counted
from perfedrec.runtimes.flower.connection import AwayError, RefusedError
from perfedrec.runtimes.flower.control import Control
from perfedrec.runtimes.flower.coordinator import Coordinator, Directory
from perfedrec.runtimes.flower.fleet import Fleet
from perfedrec.runtimes.flower.grid import attached
from perfedrec.runtimes.flower.keys import public_key
from perfedrec.runtimes.flower.node_app import NodeApp, Work, run_node
from perfedrec.runtimes.flower.rounds import Rejection, play_round
from perfedrec.runtimes.flower.sealing import Bundle, public_of
from perfedrec.runtimes.flower.service import ServiceClient
from perfedrec.runtimes.flower.service import needed as needs_service
from perfedrec.runtimes.flower.service_app import ServiceApp
from perfedrec.runtimes.flower.superlink_process import Certificates, SuperLink

__all__ = [
    "REASONS",
    "AwayError",
    "BroadcastLayout",
    "Bundle",
    "Certificates",
    "Control",
    "Coordinator",
    "Directory",
    "Fleet",
    "Hosted",
    "NodeApp",
    "RefusedError",
    "Rejection",
    "ServiceApp",
    "ServiceClient",
    "Setup",
    "SuperLink",
    "Task",
    "Work",
    "attached",
    "client_app",
    "counted",
    "needs_service",
    "play_round",
    "public_key",
    "public_of",
    "run_node",
]
