"""The recommendation network on a client: attribute crossing, propagation on the star graph, and ranking loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.sampling import paired, ranks
from perfedrec.core.types import Rows, Spec
from perfedrec.methods.federated.local import Parameters
from perfedrec.methods.federated.settings import ClientSettings
from perfedrec.methods.federated.state import GraphBroadcast
from perfedrec.nn import losses
from perfedrec.nn.crossing import Crossing
from perfedrec.nn.flat import apply_per_client
from perfedrec.nn.propagation import Star, lightgcn_star, spectral_star
from perfedrec.nn.segments import dot, expand, segment_sum
from perfedrec.privacy.labels import Labels

Finish = Callable[[Tensor], Tensor]
"""Brings vectors [..., d] to the form whose inner products are scores."""


def finish(vectors: Tensor, similarity: Literal["inner", "cosine"]) -> Tensor:
    """The vectors with unit length if scores are cosines, else unchanged."""
    return functional.normalize(vectors, dim=-1) if similarity == "cosine" else vectors


@dataclass(frozen=True)
class Network:
    """Layer 0 with attributes, and propagation over ``n_layers`` layers, for any number of clients at once.

    ``crossing``: whether attributes are embedded and crossed (PerFedRec, section 3.2).
    """

    embedding_dim: int
    n_layers: int
    encoder: Literal["lightgcn", "spectral"] = "lightgcn"
    crossing: bool = False

    def init(self, spec: Spec, key: Key, scale: float) -> Tensor | None:
        """[D] the first weights of the attribute networks, ``None`` without attributes."""
        nets = self._nets(spec.n_user_attributes, spec.item_attributes)
        weights = [net.init(key.fold(side), scale) for side, net in enumerate(nets) if net is not None]
        return torch.cat(weights) if weights else None

    def _nets(self, n_user_attributes: int, item_attributes: Tensor | None) -> tuple[Crossing | None, Crossing | None]:
        if not self.crossing:
            return None, None
        user = Crossing(n_user_attributes, self.embedding_dim) if n_user_attributes else None
        item = Crossing(item_attributes.shape[1], self.embedding_dim) if item_attributes is not None else None
        return user, item

    def users0(self, rows: Rows, vectors: Tensor, dense: Tensor | None) -> Tensor:
        """[B, d] the users' layer-0 vectors. ``dense`` is [B, D] if each client has its own weights, and [1, D] if all
        share them."""
        net, _ = self._nets(0 if rows.attributes is None else rows.attributes.shape[1], None)
        if dense is None or net is None or rows.attributes is None:
            return vectors
        weights = dense[:, : net.size].expand(rows.n_users, -1)
        return net(weights, vectors[:, None], rows.attributes[:, None]).squeeze(1)

    def items0(
        self,
        attributes: Tensor | None,
        table: Tensor,
        items: Tensor,
        dense: Tensor | None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """[T, d] layer-0 vectors of items. ``table`` [T, d] holds the rows of ``items`` [T]. If each client has its own
        weights ``dense`` [B, D], ``segments`` [T] are the clients of the rows; otherwise ``dense`` is [1, D]."""
        _, net = self._nets(0, attributes)
        if dense is None or net is None or attributes is None:
            return table
        weights, own = dense[:, -net.size :], attributes[items]
        if segments is None:
            return net(weights, table[None], own[None]).squeeze(0)

        def cross(clients: Tensor, padded: Sequence[Tensor]) -> Tensor:
            return net(weights[clients], padded[0], padded[1])

        return apply_per_client(cross, [table, own], segments, weights.shape[0]) if items.numel() else table

    def star(self, broadcast: GraphBroadcast, rows: Rows) -> Star:
        """The propagation for a block of users, with the degrees and neighbour sums that they received."""
        if self.encoder == "spectral":
            return spectral_star(rows, broadcast.degrees)
        return lightgcn_star(rows, broadcast.degrees, broadcast.neighbours, self.n_layers)


def ranking_loss(
    client: ClientSettings,
    labels: Labels,
    finish: Finish,
    parameters: Parameters,
    user: Tensor,
    context: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    """[B] each client's ranking loss, with the squared norms of ``parameters`` as L2 term.

    All vectors are those before ``finish``: ``user`` [B, d]; ``context`` [P, d] the user vector that each positive is
    scored against; ``up`` [P, d] and ``down`` [N, d] the vectors of positive and negative items.
    """
    rows, owners = labels.rows, labels.owners
    up, down, context = finish(up), finish(down), finish(context)
    positive = dot(context, up)
    if client.loss == "bpr":
        segments = rows.segments
        if owners.numel() < rows.items.numel():  # a user has nearly all items: fewer negatives than positives
            pairs, others = paired(rows, owners)
            context, positive, down = context[pairs], positive[pairs], expand(down, others)
            segments = segments[pairs]
        result = losses.bpr(positive, dot(context, down), segments, rows.n_users)
    else:
        flat, places = dot(expand(finish(user), owners), down), (owners, ranks(owners, rows.n_users))
        shared = flat.new_full((rows.n_users, client.n_negatives), -torch.inf).index_put(places, flat)
        result = losses.sampled_softmax(positive, shared, rows.segments, client.temperature)
    if client.l2:
        squares = segment_sum(parameters.positives.square().sum(1), rows.segments, rows.n_users)
        squares = squares + parameters.private.square().sum(1)
        squares = squares + segment_sum(parameters.negatives.square().sum(1), owners, rows.n_users)
        result = result + 0.5 * client.l2 * squares
    return result
