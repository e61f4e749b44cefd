"""FedGNN, or FedPerGNN: a graph network with anonymous neighbours (Wu et al., Nature Communications 2022; 2021)."""

from __future__ import annotations

from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.settings import FedGNNSettings
from perfedrec.methods.federated.state import GraphBroadcast, GraphClient, GraphState


class FedGNN(GraphMethod[GraphState, GraphBroadcast, GraphClient]):
    """Each client propagates on its star graph, expanded by its items' anonymous neighbours, which a third party
    matches by item tokens; changes are protected by decoys, clip and Laplace noise.

    Departs from the paper: the third party publishes the sum of the neighbours' protected vectors for each item, the
    same propagation in one vector an item, from the first round on; LightGCN takes the place of graph attention; BPR
    that of ratings; the server's optimiser is an option, SGD in the paper.
    """

    Options = FedGNNSettings
