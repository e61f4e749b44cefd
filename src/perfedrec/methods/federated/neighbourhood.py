"""The neighbourhood service (the papers' "third party"): it holds protected edges under item tokens, and protected user
vectors.

It never sees item numbers. Items are sent as tokens: their images under a permutation whose key the clients share and
the service does not have. The service publishes sums by token, and each client translates them back.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key, normal
from perfedrec.core.sampling import choose
from perfedrec.methods.federated import spectral
from perfedrec.nn.propagation import Adjacency, Bipartite, diffusion_steps

PASSES, WIDTH = 4, 64
"""The passes of :func:`low_rank`, and the columns of each."""


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


def diffused(
    bipartite: Bipartite, alpha: float, beta: float, length: int, block_size: int = 512
) -> tuple[Tensor, Tensor]:
    """For each user of the graph, the ``length`` items that diffusion ranks best among those that the user does not
    have: their tokens [n, k] int32, ascending, and their scores [n, k]. Unused places have token -1 and score 0.

    Diffusion takes three steps, from a user's items to their users and on to the items of these:
    ``s_uj = sum_i sum_v d_i^-alpha / (d_v d_j^beta)`` over the user's items i and the users v who have both i and j.
    RP3beta (Paudel et al., ACM TiiS 2016) has ``d_v^alpha``. With 1/2 and 1/2 it is the linear filter of GF-CF (Shen et
    al., CIKM 2021), and in any case what :func:`low_rank` comes near to.
    """
    by_user = _incidence(bipartite.by_user, bipartite.by_item.starts.numel())
    back, forth = diffusion_steps(by_user, alpha, beta, gamma=1.0)
    near = np.full((by_user.shape[0], min(length, by_user.shape[1])), -1, dtype=np.int32)
    scores = np.zeros(near.shape, dtype=np.float32)
    for start in range(0, by_user.shape[0], block_size):
        own = by_user[start : start + block_size]
        found = (own @ back @ forth).toarray()
        found[own.nonzero()] = 0
        for row, each in enumerate(found):
            known = np.flatnonzero(each)
            best = np.sort(known[np.argsort(-each[known], kind="stable")[:length]])
            near[start + row, : best.size], scores[start + row, : best.size] = best, each[best]
    return torch.from_numpy(near), torch.from_numpy(scores)


def _incidence(adjacency: Adjacency, n_columns: int) -> sparse.csr_array:
    """The entries of an adjacency, each 1."""
    columns = adjacency.columns.cpu().numpy()
    offsets = np.append(adjacency.starts.cpu().numpy(), columns.size)
    return sparse.csr_array((np.ones(columns.size), columns, offsets), shape=(offsets.size - 1, n_columns))


def passes(bipartite: Bipartite, width: int, number: int, key: Key) -> tuple[list[Tensor], list[Tensor]]:
    """A ``number`` of passes of subspace iteration over the graph, from random columns: the bases [m, ``width``] that
    are multiplied by ``N^T N``, and the products [m, ``width``]."""
    every = torch.arange(bipartite.by_item.starts.numel(), device=bipartite.by_item.starts.device)
    probe, probes, images = spectral.orthonormal(normal(key.spread(every), width)), [], []
    for _ in range(number):
        probes.append(probe)
        images.append(bipartite.to_items(bipartite.to_users(probe)))
        probe = spectral.orthonormal(images[-1])
    return probes, images


def low_rank(bipartite: Bipartite, key: Key) -> Tensor:
    """[m, r] a factor ``F`` of the graph, ``N^T N ~ F F^T``, from :data:`PASSES` passes with :data:`WIDTH` columns
    each."""
    probes, images = passes(bipartite, WIDTH, PASSES, key.fold("low rank"))
    return spectral.nystroem(torch.cat(probes, dim=1), torch.cat(images, dim=1))
