"""The recommendation network on a client: attribute crossing, propagation on the star graph, and its final vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, Spec
from perfedrec.methods.federated.settings import ClientSettings, ModelSettings
from perfedrec.nn.crossing import Crossing
from perfedrec.nn.propagation import Star, lightgcn_star, spectral_star
from perfedrec.nn.segments import by_length


@dataclass(frozen=True)
class Broadcast:
    """What clients receive.

    ``items`` [m, d] the global table; ``degrees`` [m]; ``groups`` [B] the users' clusters, -1 for newcomers;
    ``offsets`` [K m, d] the cluster models as differences from the global table (a client receives its own cluster's
    alone); ``dense`` [D] shared weights of the attribute networks; ``item_attributes`` [m, F]; ``tokens`` [m] names
    of the items towards the neighbourhood service; ``neighbours`` [2, m, d] neighbour sums for users and for items;
    ``start`` [B, d] pre-trained user vectors for those who have not trained yet; ``lift`` how much longer than
    ``sum_i c_ui q_i`` a user's vector starts, after spectral pre-training; ``pretrained`` [m, d] the singular vectors
    that it ended with; ``trained`` whether anything has been trained since: until then the pre-trained model
    recommends alone; ``centroids`` [K, d] to which newcomers assign themselves, and all clients where their vectors
    stay with them, and ``tally`` whether they contribute to them.
    """

    items: Tensor
    degrees: Tensor
    groups: Tensor = field(metadata={"per": "user"})
    offsets: Tensor | None = field(default=None, metadata={"per": "group"})
    dense: Tensor | None = None
    item_attributes: Tensor | None = None
    tokens: Tensor | None = None
    neighbours: Tensor | None = None
    start: Tensor | None = field(default=None, metadata={"per": "user"})
    lift: float | None = None
    pretrained: Tensor | None = None
    trained: bool = True
    centroids: Tensor | None = None
    tally: bool = False

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives: whole tables, because asking for rows would tell which items it has; or those
        that all users of the view receive ``together``, on one node."""
        shared = (self.items, self.degrees, self.dense, self.item_attributes, self.neighbours, self.pretrained)
        size = sum(4 * table.numel() for table in shared if table is not None)
        if self.centroids is not None and self.offsets is not None:  # nobody may know which cluster a client has
            size += 4 * (self.offsets.numel() + self.centroids.numel())
        elif self.offsets is not None:
            size += 4 * self.items.numel() * (self.groups.unique().numel() if together else 1)
        if self.start is not None:
            size += 4 * (self.start.numel() if together else self.start.shape[1])
        return size

    def table_rows(self, items: Tensor, groups: Tensor) -> Tensor:
        """[T, d] rows of ``items`` [T] in the models of the clusters ``groups`` [T]."""
        rows = self.items.index_select(0, items)
        if self.offsets is None:
            return rows
        return rows.add_(self.offsets.index_select(0, groups * self.items.shape[0] + items))


class Network:
    """Layer 0 with attributes, propagation, and normalisation, for any number of clients at once."""

    def __init__(self, model: ModelSettings, client: ClientSettings) -> None:
        self.model = model
        self.cosine = client.similarity == "cosine"

    def init(self, spec: Spec, key: Key) -> Tensor | None:
        """[D] first weights of the attribute networks, ``None`` where there are no attributes."""
        nets = self._nets(spec.n_user_attributes, spec.item_attributes)
        weights = [net.init(key.fold(side), self.model.init_scale) for side, net in enumerate(nets) if net is not None]
        return torch.cat(weights) if weights else None

    def _nets(self, n_user_attributes: int, item_attributes: Tensor | None) -> tuple[Crossing | None, Crossing | None]:
        if not self.model.attributes:
            return None, None
        dim = self.model.embedding_dim
        user = Crossing(n_user_attributes, dim) if n_user_attributes else None
        item = Crossing(item_attributes.shape[1], dim) if item_attributes is not None else None
        return user, item

    def layer0(
        self,
        broadcast: Broadcast,
        rows: Rows,
        vectors: Tensor,
        table: Tensor,
        items: Tensor,
        segments: Tensor | None,
        dense: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Layer-0 vectors of users [B, d] and of item rows [T, d].

        ``table`` [T, d] holds the rows of ``items`` [T]. ``dense`` is [B, D] where each client has weights of its own
        (``segments`` [T] then names the client of a row) and [1, D] where all share them.
        """
        n_user_attributes = 0 if rows.attributes is None else rows.attributes.shape[1]
        user_net, item_net = self._nets(n_user_attributes, broadcast.item_attributes)
        if dense is None:
            return vectors, table
        if user_net is not None and rows.attributes is not None:
            weights = dense[:, : user_net.size].expand(rows.n_users, -1)
            vectors = user_net(weights, vectors[:, None], rows.attributes[:, None]).squeeze(1)
        if item_net is not None and broadcast.item_attributes is not None:
            weights, attributes = dense[:, -item_net.size :], broadcast.item_attributes[items]
            if segments is None:
                table = item_net(weights, table[None], attributes[None]).squeeze(0)
            else:
                table = _per_client(item_net, weights, table, attributes, segments)
        return vectors, table

    def star(self, broadcast: Broadcast, rows: Rows) -> Star:
        """The propagation of the block's users, with what they were given."""
        if self.model.encoder == "spectral":
            return spectral_star(rows, broadcast.degrees)
        return lightgcn_star(rows, broadcast.degrees, broadcast.neighbours, self.model.n_layers)

    def finish(self, vectors: Tensor) -> Tensor:
        """Unit length where scores are cosines."""
        return functional.normalize(vectors, dim=-1) if self.cosine else vectors


def _per_client(net: Crossing, weights: Tensor, table: Tensor, attributes: Tensor, segments: Tensor) -> Tensor:
    """Apply each client's own network to its rows: jagged rows are padded to [C, L] and taken out again."""
    results, places = [], []
    for members, where, owner, slot in by_length(segments, weights.shape[0]):
        size = (members.numel(), int(slot.max()) + 1)
        padded = table.new_zeros(*size, table.shape[1]).index_put((owner, slot), table[where])
        given = attributes.new_zeros(*size, attributes.shape[1])
        given[owner, slot] = attributes[where]
        results.append(net(weights[members], padded, given)[owner, slot])
        places.append(where)
    return torch.cat(results)[torch.cat(places).argsort()] if results else table
