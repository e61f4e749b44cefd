"""Clients that report: the server sees single uploads, and a neighbourhood service receives users' protected vectors
and edges.

Its counterpart is :mod:`perfedrec.methods.federated.summing`: the same computation without any single user's vector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import Phase
from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, Spec, Update
from perfedrec.methods.federated import cohort, neighbourhood
from perfedrec.methods.federated.state import B, C, GraphClient, S
from perfedrec.privacy.labels import Labels

if TYPE_CHECKING:
    from perfedrec.methods.federated.graph import GraphMethod


class Reporting(Generic[S, B, C]):
    """How the clients of ``method`` send what is not a change of the model: as reports and edges."""

    phases: tuple[Phase, ...] = ()
    n_summed = 0
    n_kept = 0

    def __init__(self, method: GraphMethod[S, B, C]) -> None:
        self.method = method

    def n_groups(self, state: S) -> int:
        """The number of tables of a round: one per model."""
        return self.method.n_models(state)

    def labelled(self, rows: Rows, n_items: int, client_state: GraphClient, key: Key) -> Rows:
        """The items that clients show: their own items and decoys, without masked items."""
        return self.method.protection.label(rows, n_items, 0, key, client_state.secret).rows

    def tokens(self, spec: Spec, key: Key) -> Tensor | None:
        """[m] the tokens that stand for the items at the service; ``None`` if clients send it no edges."""
        return neighbourhood.tokens(spec.n_items, key) if self.method.joins else None

    def join(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """The work of the phase "join": protected edges for the neighbourhood service, and a first protected report."""
        tokens, n_items = broadcast.tokens, broadcast.items.shape[0]
        assert tokens is not None
        views = [
            self.labelled(rows, n_items, client_state, key.fold("edges", number))
            for number in range(self.method.n_views)
        ]
        edges = [
            torch.stack([torch.full_like(each.items, number), each.segments, tokens[each.items]], dim=1)
            for number, each in enumerate(views)
        ]
        client_state = self.method.init_new_user(broadcast, views[0], client_state)
        update = Update(
            users=rows.users,
            groups=broadcast.groups,
            weights=cohort.weights(rows, self.method.settings.server),
            reports=self.method.layers(broadcast, views[0], client_state.private),
            edges=torch.cat(edges),
        )
        return update, client_state

    def hand_over(self, update: Update, broadcast: B, rows: Rows, labels: Labels, client_state: C) -> tuple[Update, C]:
        """The update with a report of the users' vectors, made of the items that they trained on."""
        if self.method.reports_vectors:
            layers = self.method.layers(broadcast, labels.rows, client_state.private)
            update = replace(update, reports=layers)
        return update, client_state

    def take_sums(self, state: S, phase: str, aggregate: Aggregate) -> tuple[S, Aggregate]:
        """State and aggregate unchanged: there are no neighbour sums."""
        return state, aggregate

    def publish(self, state: S, key: Key) -> S:
        """The state unchanged: neighbour sums and clusters come from the service."""
        return state
