"""FedGNN, or FedPerGNN: a graph network with anonymous neighbours (Wu et al., Nature Communications 2022; 2021)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perfedrec.methods.federated.fedmf import FactorSettings, FedMF, FedMFSettings


class NeighbourSettings(FactorSettings):
    """Vectors and their propagation over the expanded graph."""

    n_layers: int = Field(2, ge=1, description="K, propagation layers")
    refresh_every: int = Field(5, ge=1, description="rounds between two expansions of the graph")
    neighbours: Literal[True] = Field(True, description="neighbour expansion, which is the method")


class FedGNNSettings(FedMFSettings):
    """Options of FedGNN."""

    model: NeighbourSettings = NeighbourSettings()


class FedGNN(FedMF):
    """Each client propagates on its star graph, expanded by its items' anonymous neighbours, which a third party
    matches by item tokens; changes are protected by decoys, clip and Laplace noise.

    Departs from the paper: the third party publishes the sum of the neighbours' protected vectors for each item, the
    same propagation in one vector an item, from the first round on; LightGCN takes the place of graph attention; BPR
    that of ratings; the server's optimiser is an option, SGD in the paper.
    """

    Options = FedGNNSettings
