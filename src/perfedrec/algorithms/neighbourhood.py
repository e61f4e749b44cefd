"""The neighbourhood service (the papers' "third party"): protected edges under item tokens, protected user vectors.

It never sees true item ids: items travel as tokens, images under a permutation whose key the clients share and the
service does not hold. It publishes sums per token, which each client translates back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.core.keys import Key, permute
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class Service:
    """What the service holds: ``edges`` [E, 3] (view, user, token), ``reports`` [n, K, d] the last protected vectors of
    each user by layer, ``sums`` [K, m, d] the published neighbour sums by token, ``start`` [n, d] pre-trained vectors
    on offer to the users."""

    reports: Tensor
    edges: Tensor | None = None
    sums: Tensor | None = None
    start: Tensor | None = None


def tokens(n_items: int, key: Key) -> Tensor:
    """[m] the token of each item."""
    items = torch.arange(n_items)
    return permute(key.fold("tokens").spread(torch.zeros_like(items)), items, n_items)


def graph(service: Service, view: int, n_items: int) -> Bipartite:
    """The graph of one protected view, in tokens."""
    assert service.edges is not None
    edges = service.edges[service.edges[:, 0] == view]
    return Bipartite(edges[:, 1], edges[:, 2], service.reports.shape[0], n_items)


def neighbour_sums(bipartite: Bipartite, reports: Tensor) -> Tensor:
    """[K, m, d] sums ``sum_v v^(k) / sqrt(|N_i| |I_v|)`` of the reported vectors [n, K, d], by token."""
    return torch.stack([bipartite.to_items(reports[:, layer].contiguous()) for layer in range(reports.shape[1])])
