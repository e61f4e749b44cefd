"""Records of federated methods: the server's state, what clients receive, and what they keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from perfedrec.methods.federated.tables import Average, Moments
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class OptimizerState:
    """Moments of the server's optimiser for each of its tables; ``None`` where the rule has none (FedAvg) or there is
    no such table."""

    items: Moments | None = field(default=None, metadata={"was": "items_moments"})
    offsets: Moments | None = field(default=None, metadata={"was": "offsets_moments"})
    dense: Moments | None = field(default=None, metadata={"was": "dense_moments"})


@dataclass(frozen=True)
class ServerState:
    """The server side of a method with one shared item table.

    ``round`` rounds played, phases before training included; ``n_users``; ``items`` [m, d] the global table; ``dense``
    [D] weights of a network that all share; ``offsets`` [K m, d] further tables as differences from the global one;
    ``optimizer`` the optimiser's moments; ``average`` the running average of the global table.
    """

    round: int
    n_users: int = field(metadata={"missing": lambda tensors: tensors["service.reports"].shape[0]})
    items: Tensor
    dense: Tensor | None = None
    offsets: Tensor | None = None
    optimizer: OptimizerState = OptimizerState()
    average: Average | None = None


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """What clients receive: the global table ``items`` [m, d], weights ``dense`` [D] of the shared network, and
    ``groups`` [B] the table of each user's group, -1 for new users where groups are made from data."""

    items: Tensor
    dense: Tensor | None = None
    groups: Tensor = field(metadata={"per": "user"})

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives, or a node for all its users ``together``: here as many."""
        return 4 * sum(each.numel() for each in (self.items, self.dense) if each is not None)


@dataclass(frozen=True)
class ClientState:
    """What never leaves a client: its ``private`` parameters [B, p] with Adam's moments and ``steps`` [B]; the last
    ``loss`` [B] per positive; a ``secret`` word [B] from which sticky decoys follow; ``participations`` [B] in rounds of
    training; and offsets ``rows`` [R, d] of its own item rows as local training left them."""

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
    """What a neighbourhood service holds: ``reports`` [n, L, d] the last protected vectors of each user, layers 0 and 1;
    the ``graph`` of all users and tokens; ``start`` [n, d] pre-trained vectors on offer to the users."""

    reports: Tensor
    graph: Bipartite | None = None
    start: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GraphState(ServerState):
    """The server side of a method whose clients propagate vectors: coordinator and neighbourhood service.

    ``degrees`` [m] of the items; ``neighbours`` [2, m, d] the neighbour sums published last, in item order; ``service``
    what the neighbourhood service holds; ``tokens`` [m] names of the items towards it. Where clients contribute to sums
    alone there is no service, and ``summed`` [L, m, d] are the neighbour sums of the users' layers.
    """

    degrees: Tensor
    service: Service
    neighbours: Tensor | None = None
    tokens: Tensor | None = None
    summed: Tensor | None = field(default=None, metadata={"was": "gathered"})


@dataclass(frozen=True, kw_only=True)
class GraphBroadcast(Broadcast):
    """With the items' ``degrees`` [m] and ``tokens`` [m], ``neighbours`` [2, m, d] sums for users and for items, and
    ``start`` [B, d] pre-trained vectors for users who have not trained yet."""

    degrees: Tensor
    tokens: Tensor | None = None
    neighbours: Tensor | None = None
    start: Tensor | None = field(default=None, metadata={"per": "user"})

    def download_bytes(self, together: bool = False) -> int:
        """Whole tables, because asking for rows would tell which items a client has."""
        shared = (self.degrees, self.neighbours)
        size = super().download_bytes(together) + 4 * sum(each.numel() for each in shared if each is not None)
        if self.start is not None:
            size += 4 * (self.start.numel() if together else self.start.shape[1])
        return size


@dataclass(frozen=True, kw_only=True)
class GraphClient(ClientState):
    """With the layers ``sent`` [B, L, d] that a client last added to neighbour sums."""

    sent: Tensor


# --- PerFedRec ---


@dataclass(frozen=True)
class Clusters:
    """Clusters of users: ``centroids`` [K, d], ``None`` before the first clustering, and ``labels`` [n] of the users.

    Where clients contribute to sums alone there are no labels; ``stats`` [K, d + 1] are the clusters' sums of unit
    vectors and counts since the last clustering, and ``shares`` [K] the clusters' shares of the clients."""

    centroids: Tensor | None = field(default=None, metadata={"was": "centroids"})
    labels: Tensor | None = field(default=None, metadata={"was": "labels"})
    stats: Tensor | None = field(default=None, metadata={"was": "tally"})
    shares: Tensor | None = field(default=None, metadata={"was": "shares"})


@dataclass(frozen=True)
class Pretrained:
    """What spectral pre-training ended with: its ``table`` [m, d] of singular vectors, where that recommends as well,
    and ``user_init_scale``, how much longer than ``sum_i c_ui q_i`` a user's vector starts."""

    table: Tensor | None = field(default=None, metadata={"was": "pretrained"})
    user_init_scale: float | None = field(default=None, metadata={"was": "lift"})


@dataclass(frozen=True, kw_only=True)
class PerFedRecState(GraphState):
    """With the ``clusters``, whose models are the state's ``offsets``, with what pre-training left, and with the
    ``item_attributes`` [m, F]."""

    clusters: Clusters = Clusters()
    pretrained: Pretrained = Pretrained()
    item_attributes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PerFedRecBroadcast(GraphBroadcast):
    """With the cluster models ``offsets`` [K m, d] as differences from the global table (a client receives its own
    cluster's alone); ``item_attributes`` [m, F]; ``pretrained`` [m, d] and ``user_init_scale`` of
    :class:`Pretrained`; ``trained``: whether a round of training was played, before which the pre-trained model
    recommends alone; ``centroids`` [K, d] to which new users assign themselves, and all clients where their vectors
    stay with them; and whether these contribute to ``cluster_stats``."""

    offsets: Tensor | None = field(default=None, metadata={"per": "group"})
    item_attributes: Tensor | None = None
    pretrained: Tensor | None = None
    user_init_scale: float | None = field(default=None, metadata={"was": "lift"})
    trained: bool = True
    centroids: Tensor | None = None
    cluster_stats: bool = field(default=False, metadata={"was": "tally"})

    def download_bytes(self, together: bool = False) -> int:
        """Whole tables; those of all clusters where nobody may know which one a client has."""
        shared = (self.item_attributes, self.pretrained)
        size = super().download_bytes(together) + 4 * sum(each.numel() for each in shared if each is not None)
        if self.centroids is not None and self.offsets is not None:
            size += 4 * (self.offsets.numel() + self.centroids.numel())
        elif self.offsets is not None:
            size += 4 * self.items.numel() * (self.groups.unique().numel() if together else 1)
        return size

    def table_rows(self, items: Tensor, groups: Tensor) -> Tensor:
        """[T, d] rows of ``items`` [T] in the models of the clusters ``groups`` [T]."""
        rows = self.items.index_select(0, items)
        if self.offsets is None:
            return rows
        return rows.add_(self.offsets.index_select(0, groups * self.items.shape[0] + items))


@dataclass(frozen=True, kw_only=True)
class PerFedRecClient(GraphClient):
    """With the logits ``mix`` [B, 4] of its weights for the local, cluster, global and pre-trained model."""

    mix: Tensor
