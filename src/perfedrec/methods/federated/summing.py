"""What clients contribute to sums where their vectors do not leave them: clusters and neighbour sums.

Both are the computations of :mod:`perfedrec.methods.federated.cohort` and :mod:`perfedrec.methods.federated.neighbourhood`, written so
that nobody but the client itself needs its vector or its items.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.types import Rows
from perfedrec.methods.federated import cohort
from perfedrec.nn.propagation import edge_weights
from perfedrec.nn.segments import dot

SHARE = 0.25  # length of a client's part in the clusters' sums, as a share of the bound on all that it sends
FEWEST = 0.01  # share of the clients; the sums of a cluster with less tell nothing, under noise


def first_centroids(items: Tensor, n_clusters: int, key: Key) -> Tensor:
    """[K, d] centroids of the item table, which is public: a user's vector is a sum of item vectors."""
    _, centroids = cohort.cluster(items, n_clusters, None, key)
    return centroids


def assign(centroids: Tensor, vectors: Tensor) -> Tensor:
    """[B] the nearest of ``centroids`` [K, d] to the direction of each of ``vectors`` [B, d]."""
    unit = functional.normalize(vectors, dim=1)
    nearness: Tensor = dot(unit[:, None], centroids[None]) - 0.5 * dot(centroids, centroids)
    return nearness.argmax(1)


def tallies(vectors: Tensor, groups: Tensor, n_clusters: int, length: float) -> Tensor:
    """[B, K (d + 1)] each client's part in its cluster's sums: its direction and a count, together of that length."""
    own: Tensor = functional.pad(functional.normalize(vectors, dim=1), (0, 1), value=1.0) * (length * 0.5**0.5)
    table = own.new_zeros(own.shape[0], n_clusters, own.shape[1])
    table[torch.arange(own.shape[0], device=own.device), groups] = own
    return table.flatten(1)


def recentre(centroids: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
    """The means [K, d] of the clusters' sums ``tally`` [K, d + 1], and the clusters' shares [K] of the clients.

    A cluster with hardly a member keeps its centroid (one step of Lloyd's algorithm on the clients heard since the
    last one).
    """
    counts = tally[:, -1].clamp(min=0)
    shares = counts / counts.sum().clamp(min=1e-12)
    heard = shares > FEWEST
    means = tally[:, :-1] / torch.where(heard, counts, 1.0)[:, None]
    return torch.where(heard[:, None], means, centroids), shares.clamp(min=FEWEST)


def neighbour_rows(rows: Rows, degrees: Tensor, change: Tensor) -> Tensor:
    """[R L, d] what the rows' users add to their items' neighbour sums, ``c_ui x_u``, layer by layer.

    ``change`` [B, L, d]: by how much their layers have changed since they last contributed. Sums of changes are sums of
    everybody's last layers.
    """
    weights = edge_weights(rows, degrees)[:, None]
    return torch.cat([weights * layer.index_select(0, rows.segments) for layer in change.unbind(1)])
