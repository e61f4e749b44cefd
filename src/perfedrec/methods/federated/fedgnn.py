"""FedGNN, also FedPerGNN: a graph network with anonymous neighbours (Wu et al., Nature Communications 2022; 2021)."""

from __future__ import annotations

from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.settings import FedGNNSettings
from perfedrec.methods.federated.state import GraphBroadcast, GraphClient, GraphState


class FedGNN(GraphMethod[GraphState, GraphBroadcast, GraphClient]):
    """Each client propagates on its star graph, expanded by the anonymous neighbours of its items. A third party finds
    these neighbours by item tokens. Decoys, clipping and Laplace noise protect the changes.

    Departs from the paper: for each item the third party publishes the sum of the neighbours' protected vectors, from
    the first round on (the same propagation, with one vector per item); LightGCN replaces graph attention; BPR replaces
    the loss on ratings; the server's optimiser is an option, SGD in the paper.
    """

    Options = FedGNNSettings
    settings: FedGNNSettings
    leaves_rows_unread = True
    scored_in_numpy = True
