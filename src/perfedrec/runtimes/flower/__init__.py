"""The Flower runtime: the rounds of :mod:`perfedrec.runtimes.round` between a server and nodes that hold users' data.

Flower is imported in this package alone. A node hosts any number of users (:class:`Hosted`); its ``ClientApp`` runs the
same client functions as the simulator and answers with one sum. The same keys give the same tables, bit for bit.
"""

from perfedrec.runtimes.flower.client_app import Hosted, client_app
from perfedrec.runtimes.flower.codec import ViewLayout
from perfedrec.runtimes.flower.server_app import play_round

__all__ = ["Hosted", "ViewLayout", "client_app", "play_round"]
