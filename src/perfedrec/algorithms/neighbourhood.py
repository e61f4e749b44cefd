"""The neighbourhood service (the papers' "third party"): protected edges under item tokens, protected user vectors.

It never sees true item ids: items travel as tokens, images under a permutation whose key the clients share and the
service does not hold. It publishes sums per token, which each client translates back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class Service:
    """What the service holds: ``reports`` [n, L, d] the last protected vectors of each user, layers 0 and 1;
    ``edges`` [E, 3] (view, user, token); ``start`` [n, d] pre-trained vectors on offer to the users."""

    reports: Tensor
    edges: Tensor | None = None
    start: Tensor | None = None


def tokens(n_items: int, key: Key) -> Tensor:
    """[m] the token of each item."""
    return choose(n_items, n_items, key.fold("tokens"))


def graph(service: Service, view: int, n_items: int) -> Bipartite:
    """The graph of one protected view, in tokens."""
    assert service.edges is not None
    edges = service.edges[service.edges[:, 0] == view]
    return Bipartite(edges[:, 1], edges[:, 2], service.reports.shape[0], n_items)


def neighbour_sums(bipartite: Bipartite, reports: Tensor, n_layers: int) -> Tensor:
    """[2, m, d] what LightGCN's final user and item vectors take from the neighbours, by token.

    Item layers are ``i^(k+1) = sum_v v^(k) / sqrt(|N_i| |I_v|)``: the users report layers 0 and 1, higher user layers
    follow from the item layers that the service has. The two tables are the sums of item layers 1 to K - 1 and 1 to K,
    over ``K + 1`` (see :func:`perfedrec.nn.propagation.lightgcn_star`).
    """
    items = [bipartite.to_items(reports[:, layer].contiguous()) for layer in range(min(n_layers, 2))]
    while len(items) < n_layers:
        items.append(bipartite.to_items(bipartite.to_users(items[len(items) - 2])))
    below, whole = sum(items[:-1], torch.zeros_like(items[0])), sum(items, torch.zeros_like(items[0]))
    return torch.stack([below, whole]) / (n_layers + 1)
