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
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows
from perfedrec.methods.federated.contrastive import Contrastive
from perfedrec.methods.federated.settings import FedMFSettings, NeighbourSettings, PretrainingSettings
from perfedrec.methods.federated.state import GraphBroadcast, GraphClient, GraphState
from perfedrec.methods.federated.tables import means, over_tables
from perfedrec.nn.propagation import Star


class TrustedSettings(Settings):
    """The trusted nodes."""

    n_nodes: int = Field(10, ge=1, description="trusted nodes between the clients and the server")
    threshold: float = Field(3.5, gt=0, description="robust z of a node's change above which it is left out")


class FastModelSettings(NeighbourSettings):
    """Vectors and their propagation to users."""

    refresh_every: int = Field(10, ge=1, description="rounds between two full propagations")


class FastPFRecSettings(FedMFSettings):
    """Options of FastPFRec."""

    model: FastModelSettings = FastModelSettings()
    nodes: TrustedSettings = TrustedSettings()
    pretraining: PretrainingSettings = PretrainingSettings()

    @model_validator(mode="after")
    def _node_by_node(self) -> FastPFRecSettings:
        if self.privacy.sums:
            raise ValueError("fastpfrec sums at its trusted nodes; expected privacy.aggregation = sparse")
        if self.pretraining.kind == "spectral":
            raise ValueError("fastpfrec is pre-trained by contrast; expected pretraining.kind = contrastive or none")
        return self


@dataclass(frozen=True)
class TrustedNodes:
    """The mean over trusted nodes of the mean change that each hands over, without nodes that stand out."""

    threshold: float
    separate: ClassVar[bool] = False

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """See :class:`perfedrec.core.aggregate.Aggregator`; a group is a node."""
        total = Sum().combine(phase, parts, empty)
        return averaged(total, self.threshold) if phase == TRAIN.name and total.clients else total


class FastPFRec(Contrastive[GraphState, GraphBroadcast, GraphClient]):
    """Contrastive pre-training, then LightGCN whose item vectors are their own (FastGNN); a client's protected change
    goes to its trusted node, which averages those it is sent, and the server averages the nodes, without those whose
    mean change is much longer or shorter than the others' (robust z, from median and median deviation).

    We had the abstract and the authors' public code, not the full text, so that none of the paper's equations could be
    checked: not FastGNN's propagation and local update, not the loss of its pre-training, not the aggregation by
    trusted nodes, not the test for nodes that stand out. All four follow the code.

    Departs from the code: users have a trusted node each instead of being dealt out anew in every round; a node is
    judged by the mean that it hands over and not by its clients' single changes, which nobody but it needs to see; item
    vectors are not propagated in every tenth round either, but the users' neighbours are refreshed then; layer 0 counts
    in the users' means; noise is added by the clients, not by the server after averaging.
    """

    Options = FastPFRecSettings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.aggregator = TrustedNodes(self.settings.nodes.threshold)

    def n_groups(self, state: GraphState) -> int:
        return int(self.settings.nodes.n_nodes) if self.phase(state) == TRAIN.name else 1

    def groups(self, state: GraphState, users: Tensor) -> Tensor:
        return users % self.n_groups(state)

    def star(self, broadcast: GraphBroadcast, rows: Rows) -> Star:
        return to_users(super().star(broadcast, rows))


def to_users(star: Star) -> Star:
    """Users are propagated to, items keep their own vectors (the paper's FastGNN, between full propagations)."""
    return replace(star, scale=1.0, shift=None)


def averaged(aggregate: Aggregate, threshold: float) -> Aggregate:
    """The mean of the nodes' means, as the sum of one client, without nodes that stand out by their mean's length."""
    n_items, weights = aggregate.n_items, from_fixed(aggregate.weights)
    nodes = torch.div(aggregate.keys, n_items, rounding_mode="floor")
    changes = means(aggregate, weights)
    lengths = torch.zeros_like(weights).index_add_(0, nodes, changes.square().sum(1)).sqrt()
    heard = weights > 0
    median = lengths[heard].quantile(0.5)
    apart = (lengths - median).abs()
    usual = apart[heard].quantile(0.5).clamp(min=float(median) / 100)  # nodes that agree to 1 % are all the same
    kept = heard & (0.6745 * apart <= threshold * usual)
    rows = kept[nodes]
    items, sums = over_tables(aggregate.keys[rows], changes[rows] / kept.sum(), n_items)
    fixed = sums.to(torch.float64) * FIXED_POINT
    return replace(aggregate, keys=items, sums=fixed, weights=weights.new_full((1,), FIXED_POINT, dtype=torch.float64))
