"""FastPFRec: aggregation by trusted nodes (Yan et al., Expert Systems with Applications 2026, arXiv 2603.20283)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum, from_fixed
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.robust import alike
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows
from perfedrec.methods.federated.contrastive import Contrastive
from perfedrec.methods.federated.settings import FedMFSettings, NeighbourSettings, PretrainingSettings
from perfedrec.methods.federated.state import GraphBroadcast, GraphClient, GraphState
from perfedrec.methods.federated.tables import means, over_tables
from perfedrec.nn.propagation import Star


class TrustedSettings(Settings):
    """Options of the trusted nodes."""

    n_nodes: int = Field(10, ge=1, description="number of trusted nodes between the clients and the server")
    threshold: float = Field(
        3.5, gt=0, description="robust z-score of a node's mean change above which the node is left out"
    )


class FastModelSettings(NeighbourSettings):
    """Options of the vectors and their propagation."""

    refresh_every: int = Field(10, ge=1, description="number of rounds from one full propagation to the next")


class FastPFRecSettings(FedMFSettings):
    """Options of FastPFRec."""

    model: FastModelSettings = FastModelSettings()
    nodes: TrustedSettings = TrustedSettings()
    pretraining: PretrainingSettings = PretrainingSettings()

    @model_validator(mode="after")
    def _node_by_node(self) -> FastPFRecSettings:
        if self.privacy.sums:
            raise ValueError("fastpfrec sums updates at its trusted nodes; expected privacy.aggregation = sparse")
        if self.pretraining.kind == "spectral":
            raise ValueError("fastpfrec has no spectral pre-training; expected pretraining.kind = contrastive or none")
        return self


@dataclass(frozen=True)
class TrustedNodes:
    """The mean over trusted nodes of the mean change that each node sends, without outlier nodes."""

    threshold: float
    separate: ClassVar[bool] = False

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """See :class:`perfedrec.core.aggregate.Aggregator`. Each group is a trusted node."""
        total = Sum().combine(phase, parts, empty)
        return averaged(total, self.threshold) if phase == TRAIN.name and total.clients else total


class FastPFRec(Contrastive[GraphState, GraphBroadcast, GraphClient]):
    """FastPFRec: contrastive pre-training, then LightGCN that propagates only to users (FastGNN). A client sends its
    protected change to its trusted node, which averages the changes that it receives. The server averages the nodes and
    leaves out those whose mean change is much longer or shorter than that of the others (robust z-score, from median
    and median absolute deviation).

    We had the abstract and the authors' public code, not the full text. None of the paper's equations could be checked:
    not FastGNN's propagation and local update, not the loss of its pre-training, not the aggregation by trusted nodes,
    not the test for outlier nodes. All four follow the code.

    Departs from the code: each user has a fixed trusted node instead of a new one in every round; a node is judged by
    its mean change and not by its clients' single changes, which only the node needs to see; item vectors are not
    propagated in every tenth round either, but the users' neighbours are refreshed then; layer 0 counts in the users'
    means; clients add the noise, not the server after averaging.
    """

    Options = FastPFRecSettings
    settings: FastPFRecSettings

    @property
    def aggregator(self) -> TrustedNodes:  # type: ignore[override]  # it depends on the settings
        return TrustedNodes(self.settings.nodes.threshold)

    def n_groups(self, state: GraphState) -> int:
        return self.settings.nodes.n_nodes if self.phase(state) == TRAIN.name else 1

    def groups(self, state: GraphState, users: Tensor) -> Tensor:
        return users % self.n_groups(state)

    def star(self, broadcast: GraphBroadcast, rows: Rows) -> Star:
        return to_users(super().star(broadcast, rows))


def to_users(star: Star) -> Star:
    """The star without propagation to items: items keep their own vectors (the paper's FastGNN, between full
    propagations)."""
    return replace(star, scale=1.0, shift=None)


def averaged(aggregate: Aggregate, threshold: float) -> Aggregate:
    """The mean of the nodes' means, as the sum of one client, without nodes whose mean change has an outlying
    length."""
    n_items, weights = aggregate.n_items, from_fixed(aggregate.weights)
    nodes = torch.div(aggregate.keys, n_items, rounding_mode="floor")
    changes = means(aggregate, weights)
    lengths = torch.zeros_like(weights).index_add_(0, nodes, changes.square().sum(1)).sqrt()
    active = weights > 0
    kept = active.clone()
    kept[active] = alike(lengths[active], threshold)
    rows = kept[nodes]
    items, sums = over_tables(aggregate.keys[rows], changes[rows] / kept.sum(), n_items)
    fixed = sums.to(torch.float64) * FIXED_POINT
    return replace(aggregate, keys=items, sums=fixed, weights=weights.new_full((1,), FIXED_POINT, dtype=torch.float64))
