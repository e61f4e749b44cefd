"""The records of federated methods: the server's state, what clients receive, and the client's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from perfedrec.core.lookup import put
from perfedrec.methods.federated.tables import Average, Moments, Tables
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class OptimizerState:
    """The moments of the server's optimiser for each of its tables; ``None`` if the optimiser has none (FedAvg) or the
    table does not exist."""

    items: Moments | None = field(default=None, metadata={"was": "items_moments"})
    offsets: Moments | None = field(default=None, metadata={"was": "offsets_moments"})
    dense: Moments | None = field(default=None, metadata={"was": "dense_moments"})


@dataclass(frozen=True)
class ServerState:
    """The server's state of a method with one shared item table.

    ``round`` number of rounds played, phases before training included; ``n_users`` number of users; ``items`` [m, d]
    the global table; ``dense`` [D] the weights of a shared network; ``offsets`` [K m, d] further tables as differences
    from the global one; ``optimizer`` the optimiser's moments; ``average`` the running average of the global table;
    ``bank`` [max(K, 1) m, d] the mean changes that wait, where ``defence.sparse`` applies the largest ones alone.

    Where sums are of low rank (:mod:`perfedrec.methods.federated.subspace`): ``degrees`` [m] of the items; ``basis``
    [m, r] int16; for a method without spectral pre-training ``probe`` [m, w], the columns of the next pass, and
    ``factor`` [m, w'] with ``N^T N ~ F F^T``.
    """

    round: int
    n_users: int = field(metadata={"missing": lambda tensors: tensors["service.reports"].shape[0]})
    items: Tensor
    dense: Tensor | None = None
    offsets: Tensor | None = None
    optimizer: OptimizerState = OptimizerState()
    average: Average | None = None
    degrees: Tensor | None = None
    basis: Tensor | None = None
    probe: Tensor | None = None
    factor: Tensor | None = None
    bank: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """What clients receive: the global table ``items`` [m, d], the weights ``dense`` [D] of the shared network, and
    ``groups`` [B] the number of each user's group, -1 for new users if groups are made from data. ``degrees``,
    ``probe`` and ``basis`` are those of the server's state, where sums are of low rank."""

    items: Tensor
    dense: Tensor | None = None
    groups: Tensor = field(metadata={"per": "user"})
    degrees: Tensor | None = None
    probe: Tensor | None = None
    basis: Tensor | None = None

    @property
    def tables(self) -> Tables:
        """The item tables of which clients train their rows."""
        return Tables(self.items)

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives, or a node for all its users ``together``: here both are the same."""
        tables = (self.items, self.dense, self.degrees, self.probe, self.basis)
        return sum(each.element_size() * each.numel() for each in tables if each is not None)


@dataclass(frozen=True)
class ClientState:
    """What never leaves a client: its ``private`` parameters [B, p] with Adam's moments ``first`` and ``second`` [B, p]
    and number of ``steps`` [B]; the last ``loss`` [B] per positive; a ``secret`` word [B] from which sticky decoys are
    drawn; the number of training rounds ``participations`` [B]; and offsets ``rows`` [R, d] of its own item rows after
    local training."""

    private: Tensor = field(metadata={"was": "vectors"})
    first: Tensor
    second: Tensor
    steps: Tensor
    loss: Tensor
    secret: Tensor
    participations: Tensor = field(metadata={"was": "taken"})
    rows: Tensor = field(metadata={"per": "row"})


# --- methods that propagate on a graph ---


@dataclass(frozen=True)
class Service:
    """The state of a neighbourhood service: ``reports`` [n, L, d] the last protected vectors of each user (layers 0
    and 1); the ``graph`` of all users and tokens; ``start`` [n, d] pre-trained vectors for users who have not
    trained yet; and the neighbourhood model's lists, ``near`` [n, k] int32 tokens with their ``nearness`` [n, k] (see
    :func:`perfedrec.methods.federated.neighbourhood.diffused`).

    Where the service knows a sample of the users alone, n is their number, ``users`` [n] are these users, ascending,
    and ``share`` is the share of all users that was asked."""

    reports: Tensor
    graph: Bipartite | None = None
    start: Tensor | None = field(default=None, metadata={"constant": True})
    near: Tensor | None = field(default=None, metadata={"constant": True})
    nearness: Tensor | None = field(default=None, metadata={"constant": True})
    users: Tensor | None = None
    share: float = field(default=1.0, metadata={"missing": lambda tensors: 1.0})

    def places(self, users: Tensor) -> Tensor:
        """[B] the rows of ``users`` [B] in the service's tables, -1 for users that it does not know."""
        if self.users is None:
            return users
        if not self.users.numel():
            return torch.full_like(users, -1)
        found = torch.searchsorted(self.users, users).clamp_(max=self.users.numel() - 1)
        return found.masked_fill(self.users[found] != users, -1)

    def keep(self, users: Tensor, reports: Tensor) -> None:
        """Store the ``reports`` [B, L, d] of those of ``users`` [B] whom the service knows. A single layer, of a method
        that reports no more, counts for all."""
        places = self.places(users)
        if self.users is not None:
            known = places >= 0
            places, reports = places[known], reports[known]
        put(self.reports, places, reports.expand(-1, *self.reports.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class GraphState(ServerState):
    """The server's state of a method whose clients propagate vectors: coordinator and neighbourhood service.

    ``degrees`` [m] of the items; ``neighbours`` [2, m, d] the neighbour sums published last, in item order; ``service``
    the neighbourhood service's state; ``tokens`` [m] the items' tokens at the service. If clients contribute only to
    sums there is no service, and ``summed`` [L, m, d] are the neighbour sums of the users' layers.
    """

    degrees: Tensor
    service: Service
    neighbours: Tensor | None = None
    tokens: Tensor | None = None
    summed: Tensor | None = field(default=None, metadata={"was": "gathered"})


@dataclass(frozen=True, kw_only=True)
class GraphBroadcast(Broadcast):
    """Adds the items' ``degrees`` [m] and ``tokens`` [m], the ``neighbours`` sums [2, m, d] for users and for items,
    and ``start`` [B, d] pre-trained vectors for users who have not trained yet."""

    degrees: Tensor
    tokens: Tensor | None = None
    neighbours: Tensor | None = None
    start: Tensor | None = field(default=None, metadata={"per": "user"})

    def download_bytes(self, together: bool = False) -> int:
        """The bytes of whole tables: asking for single rows would show which items a client has."""
        size = super().download_bytes(together) + 4 * (0 if self.neighbours is None else self.neighbours.numel())
        if self.start is not None:
            size += 4 * (self.start.numel() if together else self.start.shape[1])
        return size


@dataclass(frozen=True, kw_only=True)
class GraphClient(ClientState):
    """Adds ``sent`` [B, L, d], the layers that a client last contributed to neighbour sums."""

    sent: Tensor


S = TypeVar("S", bound=GraphState)
B = TypeVar("B", bound=GraphBroadcast)
C = TypeVar("C", bound=GraphClient)


# --- PerFedRec ---


@dataclass(frozen=True)
class Clusters:
    """Clusters of users: ``centroids`` [K, d], ``None`` before the first clustering, and ``labels`` [n] the users'
    clusters.

    If clients contribute only to sums there are no labels; ``stats`` [K, d + 1] are each cluster's sum of unit vectors
    and count since the last clustering, and ``shares`` [K] the clusters' shares of the clients.
    """

    centroids: Tensor | None = field(default=None, metadata={"was": "centroids"})
    labels: Tensor | None = field(default=None, metadata={"was": "labels"})
    stats: Tensor | None = field(default=None, metadata={"was": "tally"})
    shares: Tensor | None = field(default=None, metadata={"was": "shares"})


@dataclass(frozen=True)
class Pretrained:
    """The result of spectral pre-training: its ``table`` [m, d] of singular vectors, if this model also recommends, and
    ``user_init_scale``, the factor of ``sum_i c_ui q_i`` that gives a user's first vector. Between passes with noise
    there are the ``images`` [m, w] of all passes so far."""

    table: Tensor | None = field(default=None, metadata={"was": "pretrained", "constant": True})
    user_init_scale: float | None = field(default=None, metadata={"was": "lift"})
    images: Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """The neighbourhood model of low rank: ``factor`` [m, r] with ``N^T N ~ F F^T``. Until the last pass of spectral
    pre-training there are its ``probes`` [m, w] and their ``images`` [m, w] instead."""

    factor: Tensor | None = field(default=None, metadata={"constant": True})
    probes: Tensor | None = None
    images: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PerFedRecState(GraphState):
    """Adds the ``clusters``, whose models are the state's ``offsets``, the ``pretrained`` model, the neighbourhood
    model of ``low_rank``, the ``item_attributes`` [m, F], and ``served``, whether the state is for recommending:
    training does not send the neighbourhood model; ``mix`` [models], the weights of the models, and ``beta``, the
    exponent of the neighbourhood model, that held-out items have chosen in a number of turns (``turn``)."""

    clusters: Clusters = Clusters()
    pretrained: Pretrained = Pretrained()
    low_rank: LowRank = LowRank()
    item_attributes: Tensor | None = None
    served: bool = False
    mix: Tensor | None = None
    beta: float | None = None
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class PerFedRecBroadcast(GraphBroadcast):
    """Adds the cluster models ``offsets`` [K m, d] as differences from the global table (a client receives only its own
    cluster's); ``item_attributes`` [m, F]; ``pretrained`` [m, d] and ``user_init_scale`` of :class:`Pretrained`;
    ``low_rank`` [m, r], the factor of :class:`LowRank`; ``near`` [B, k] and ``nearness`` [B, k], the lists of the
    neighbourhood service with items in place of tokens, -1 for unused places and for new users;
    ``trained``, whether a round of training was played (before it the pre-trained model recommends alone); ``mix``
    [models] and ``beta`` as in :class:`PerFedRecState`, and the number of the ``turn`` in which others are compared;
    ``centroids`` [K, d] by which new users assign themselves to clusters, and all clients if their vectors stay with
    them; and ``cluster_stats``, whether clients contribute to the clusters' sums."""

    offsets: Tensor | None = field(default=None, metadata={"per": "group"})
    item_attributes: Tensor | None = None
    pretrained: Tensor | None = None
    user_init_scale: float | None = field(default=None, metadata={"was": "lift"})
    low_rank: Tensor | None = None
    near: Tensor | None = field(default=None, metadata={"per": "user"})
    nearness: Tensor | None = field(default=None, metadata={"per": "user"})
    trained: bool = True
    mix: Tensor | None = None
    beta: float | None = None
    turn: int | None = None
    centroids: Tensor | None = None
    cluster_stats: bool = field(default=False, metadata={"was": "tally"})

    @property
    def tables(self) -> Tables:
        return Tables(self.items, self.offsets)

    def download_bytes(self, together: bool = False) -> int:
        """The bytes of whole tables; those of all clusters if nobody may know which cluster a client has."""
        shared = (self.item_attributes, self.pretrained, self.low_rank)
        size = super().download_bytes(together) + 4 * sum(each.numel() for each in shared if each is not None)
        for own in (self.near, self.nearness):
            if own is not None:
                size += 4 * (own.numel() if together else own.shape[1])
        if self.centroids is not None and self.offsets is not None:
            size += 4 * (self.offsets.numel() + self.centroids.numel())
        elif self.offsets is not None:
            size += 4 * self.items.numel() * (self.groups.unique().numel() if together else 1)
        return size


@dataclass(frozen=True, kw_only=True)
class PerFedRecClient(GraphClient):
    """Adds ``mix`` [B, 4], the logits of the user's weights for the local, cluster, global and pre-trained model; [B,
    5] with the neighbourhood model."""

    mix: Tensor
