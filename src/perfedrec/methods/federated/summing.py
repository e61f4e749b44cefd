"""Clients that contribute only to sums: no vector and no edge leaves them.

They assign themselves to clusters, and add to their items' neighbour sums what has changed since their last
contribution. The computations are those of :mod:`perfedrec.methods.federated.cohort` and
:mod:`perfedrec.methods.federated.neighbourhood`, written so that only the client itself needs its vector and its items.
The counterpart is :mod:`perfedrec.methods.federated.reporting`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.algorithm import TRAIN, Phase
from perfedrec.core.keys import Key
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows, Spec, Update
from perfedrec.methods.federated import cohort, neighbourhood
from perfedrec.methods.federated.phases import DEGREES, JOIN
from perfedrec.methods.federated.state import B, C, GraphClient, S
from perfedrec.nn.propagation import edge_weights
from perfedrec.nn.segments import dot
from perfedrec.privacy.labels import Labels

if TYPE_CHECKING:
    from perfedrec.methods.federated.graph import GraphMethod

SHARE = 0.25  # length of a client's part of the clusters' sums, as a share of the bound on everything that it sends
FEWEST = 0.01  # share of the clients; with noise, the sums of a smaller cluster are useless


class Summing(Generic[S, B, C]):
    """How the clients of ``method`` send what is not a change of the model: as parts of sums."""

    phases: tuple[Phase, ...] = (DEGREES,)

    def __init__(self, method: GraphMethod[S, B, C]) -> None:
        self.method = method

    @property
    def n_summed(self) -> int:
        """L, the number of user layers whose neighbour sums clients contribute to."""
        return self.method.n_reported if self.method.neighbours else 0

    @property
    def n_kept(self) -> int:
        """The number of layers whose last contributed values a client keeps, because it sends changes of them."""
        return self.n_summed

    def n_groups(self, state: S) -> int:
        """The number of tables of a round: one per model, and one per layer of neighbour sums."""
        return self.method.n_models(state) + self.n_summed

    def first_table(self, broadcast: B) -> int:
        """The number of the first table of neighbour sums."""
        return self.method.n_models_of(broadcast)

    def labelled(self, rows: Rows, n_items: int, client_state: GraphClient, key: Key) -> Rows:
        """The clients' own items, unchanged, because nobody sees which items these are."""
        return rows

    def tokens(self, spec: Spec, key: Key) -> Tensor | None:
        """``None``: without a service no item needs a token."""
        return None

    def join(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """The work of the phase "join": a first part of the neighbour sums."""
        client_state = self.method.init_new_user(broadcast, rows, client_state)
        layers = self.method.layers(broadcast, rows, client_state.private)
        update = Update(
            users=rows.users,
            groups=broadcast.groups,
            weights=cohort.weights(rows, self.method.settings.server),
            segments=rows.segments.repeat(self.n_summed),
            items=rows.items.repeat(self.n_summed),
            deltas=neighbour_rows(rows, broadcast.degrees, layers),
            tables=self._tables(broadcast, rows),
        )
        return update, replace(client_state, sent=layers)

    def _tables(self, broadcast: B, rows: Rows) -> Tensor:
        """[R L] the table of each row of neighbour sums. These tables come after the models' tables."""
        first = self.first_table(broadcast)
        numbers = torch.arange(first, first + self.n_summed, device=rows.items.device)
        return numbers.repeat_interleave(rows.items.numel())

    def hand_over(self, update: Update, broadcast: B, rows: Rows, labels: Labels, client_state: C) -> tuple[Update, C]:
        """The update with parts of the clusters' sums and of the neighbour sums. A client that has already taken part
        in the maximum number of rounds sends zeros."""
        centroids = self.method.clustering(broadcast)
        if not self.n_summed and centroids is None:
            return update, client_state
        layers, cap = self.method.layers(broadcast, rows, client_state.private), self._cap(client_state)
        if self.n_summed and cap is not None:  # the part of an idle client does not change
            layers = torch.where(cap[:, None, None], layers, client_state.sent)
        if centroids is not None:
            length = SHARE * (self.method.settings.privacy.clip or 1.0)
            part = cluster_stats(layers.mean(1), broadcast.groups, centroids.shape[0], length)
            part = part if cap is None else part * cap[:, None].to(part.dtype)
            update = replace(update, dense=part if update.dense is None else torch.cat([update.dense, part], dim=1))
        if self.n_summed:
            update = self._with_neighbours(update, broadcast, rows, layers - client_state.sent)
            client_state = replace(client_state, sent=layers)
        return update, client_state

    def _cap(self, client_state: GraphClient) -> Tensor | None:
        """[B] whether each client may still take part; ``None`` without a limit."""
        cap = self.method.settings.selection.max_participations
        return None if cap is None else client_state.participations <= cap

    def _with_neighbours(self, update: Update, broadcast: B, rows: Rows, change: Tensor) -> Update:
        """The update with what a ``change`` [B, L, d] of the users' layers adds to the neighbour sums."""
        segments, items, deltas = update.segments, update.items, update.deltas
        assert segments is not None
        assert items is not None
        assert deltas is not None
        return replace(
            update,
            tables=torch.cat([update.groups[segments], self._tables(broadcast, rows)]),
            segments=torch.cat([segments, rows.segments.repeat(self.n_summed)]),
            items=torch.cat([items, rows.items.repeat(self.n_summed)]),
            deltas=torch.cat([deltas, neighbour_rows(rows, broadcast.degrees, change)]),
        )

    def take_sums(self, state: S, phase: str, aggregate: Aggregate) -> tuple[S, Aggregate]:
        """Move the neighbour sums from the aggregate's tables to the state, in place. Returns the state, and the
        aggregate without them."""
        if state.summed is None or phase not in (JOIN.name, TRAIN.name) or not aggregate.clients:
            return state, aggregate
        start = self.method.n_models(state) * aggregate.n_items
        place = int(torch.searchsorted(aggregate.keys, start))
        state.summed.flatten(0, 1).index_add_(0, aggregate.keys[place:] - start, from_fixed(aggregate.sums[place:]))
        return state, replace(aggregate, keys=aggregate.keys[:place], sums=aggregate.sums[:place])

    def publish(self, state: S, key: Key) -> S:
        """The state with new neighbour sums and clusters when they are due: what a service would publish otherwise."""
        trained = self.method.trained(state)
        if state.summed is not None and self.method.refreshes(trained):
            state = replace(state, neighbours=neighbourhood.published(list(state.summed.unbind(0))))
        return self.method.cluster_by_sums(state, trained, key)


class SummingOnce(Summing[S, B, C]):
    """How the clients of ``method`` send where sums are of low rank: changes of the item table in every round, and
    their parts of neighbour sums once, before training, if pre-training gave them vectors to start from.

    What changes in a user's vector later would show in the differences between rounds, and it improves nothing
    (docs/privacy.md). Without pre-training, users' first vectors are random. Then the neighbour sums are those that the
    server can compute itself: item vectors propagated over all users and back, ``F F^T Q`` (:class:`Subspace`).
    """

    n_kept = 0

    def join(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """The work of the phase "join": the only part of the neighbour sums that a client ever sends."""
        alone = replace(broadcast, groups=torch.zeros_like(broadcast.groups))
        update, joined = super().join(alone, rows, client_state, key)
        return update, replace(joined, sent=client_state.sent)

    def n_groups(self, state: S) -> int:
        return self.n_summed if self.method.phase(state) == JOIN.name else 1

    def first_table(self, broadcast: B) -> int:
        return 0

    def hand_over(self, update: Update, broadcast: B, rows: Rows, labels: Labels, client_state: C) -> tuple[Update, C]:
        """The update unchanged: a round of training sums changes of the item table only."""
        return update, client_state

    def take_sums(self, state: S, phase: str, aggregate: Aggregate) -> tuple[S, Aggregate]:
        """The aggregate by item, and the state with the neighbour sums that are in it."""
        aggregate = self.method.lift(state, phase, aggregate)
        if phase != JOIN.name or not aggregate.clients:
            return state, aggregate
        sums = state.items.new_zeros(self.n_summed * aggregate.n_items, state.items.shape[1])
        sums.index_copy_(0, aggregate.keys, from_fixed(aggregate.sums))
        layers = list(sums.view(self.n_summed, -1, sums.shape[1]).unbind(0))
        return replace(state, neighbours=neighbourhood.published(layers)), aggregate

    def publish(self, state: S, key: Key) -> S:
        """The state with neighbour sums that the server computes itself, where they are due."""
        factor, trained = state.factor, self.method.trained(state)
        if factor is None or not self.n_summed or not self.method.refreshes(trained):
            return state
        with one_thread():
            second = factor @ (factor.T @ state.items)
        layers = [torch.zeros_like(second), second]
        return replace(state, neighbours=neighbourhood.published(layers[: self.n_summed]))


def first_centroids(items: Tensor, n_clusters: int, key: Key) -> Tensor:
    """[K, d] first centroids: those of the item table, which is public. A user's vector is a sum of item vectors."""
    _, centroids = cohort.cluster(items, n_clusters, None, key)
    return centroids


def assign(centroids: Tensor, vectors: Tensor) -> Tensor:
    """[B] for each of ``vectors`` [B, d] the number of the centroid, of ``centroids`` [K, d], nearest to its
    direction."""
    unit = functional.normalize(vectors, dim=1)
    nearness: Tensor = dot(unit[:, None], centroids[None]) - 0.5 * dot(centroids, centroids)
    return nearness.argmax(1)


def cluster_stats(vectors: Tensor, groups: Tensor, n_clusters: int, length: float) -> Tensor:
    """[B, K (d + 1)] each client's part of the clusters' sums: in its own cluster, its direction and a count, with
    joint norm ``length``; elsewhere zeros."""
    own: Tensor = functional.pad(functional.normalize(vectors, dim=1), (0, 1), value=1.0) * (length * 0.5**0.5)
    table = own.new_zeros(own.shape[0], n_clusters, own.shape[1])
    table[torch.arange(own.shape[0], device=own.device), groups] = own
    return table.flatten(1)


def recentre(centroids: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """The new centroids [K, d], which are the means of the clusters' sums ``stats`` [K, d + 1], and the clusters'
    shares [K] of the clients.

    A cluster with hardly any members keeps its centroid. This is one step of Lloyd's algorithm on the clients that took
    part since the last clustering.
    """
    counts = stats[:, -1].clamp(min=0)
    shares = counts / counts.sum().clamp(min=1e-12)
    known = shares > FEWEST
    means = stats[:, :-1] / torch.where(known, counts, 1.0)[:, None]
    return torch.where(known[:, None], means, centroids), shares.clamp(min=FEWEST)


def neighbour_rows(rows: Rows, degrees: Tensor, change: Tensor) -> Tensor:
    """[R L, d] what users add to their items' neighbour sums, ``c_ui x_u``, layer by layer.

    ``change`` [B, L, d]: how much their layers have changed since they last contributed. The sum of all changes is the
    sum of everybody's current layers.
    """
    weights = edge_weights(rows, degrees)[:, None]
    return torch.cat([weights * layer.index_select(0, rows.segments) for layer in change.unbind(1)])
