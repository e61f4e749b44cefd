"""The neighbourhood service (the papers' "third party"): it holds protected edges under item tokens, and protected user
vectors.

It never sees item numbers. Items are sent as tokens: their images under a permutation whose key the clients share and
the service does not have. The service publishes sums by token, and each client translates them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.nn.propagation import Bipartite


def tokens(n_items: int, key: Key) -> Tensor:
    """[m] the token of each item."""
    return choose(n_items, n_items, key.fold("tokens"))


def graph(edges: Tensor, view: int, n_users: int, n_items: int, kept: Tensor | None = None) -> Bipartite:
    """The graph of one protected ``view`` of ``edges`` [E, 3] (view, user, token), restricted to the users with
    ``kept`` [n] true."""
    of_view = edges[:, 0] == view
    _, users, items = edges[of_view if kept is None else of_view & kept[edges[:, 1]]].unbind(1)
    return Bipartite.of(users, items, n_users, n_items)


def neighbour_sums(bipartite: Bipartite, reports: Tensor, n_layers: int) -> Tensor:
    """[2, m, d] what LightGCN's final user and item vectors take from the neighbours, by token.

    Item layers are ``i^(k+1) = sum_v v^(k) / sqrt(|N_i| |I_v|)``. Users report their layers 0 and 1; higher user layers
    follow from the item layers, which the service has. The two tables are the sums of item layers 1 to K - 1 and of
    item layers 1 to K, both divided by ``K + 1`` (see :func:`perfedrec.nn.propagation.lightgcn_star`).
    """
    items = list(bipartite.to_items(reports.flatten(1)).unflatten(1, (-1, reports.shape[2])).unbind(1))
    while len(items) < n_layers:
        items.append(bipartite.to_items(bipartite.to_users(items[len(items) - 2])))
    return published(items)


def published(items: list[Tensor]) -> Tensor:
    """[2, m, d] the two tables of :func:`neighbour_sums`, from item layers 1 to K, each [m, d]."""
    below = torch.stack(items[:-1]).sum(0) if len(items) > 1 else torch.zeros_like(items[0])
    return torch.stack([below, below + items[-1]]).div_(len(items) + 1)
