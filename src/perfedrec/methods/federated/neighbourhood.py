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

from perfedrec.core.keys import Key, normal, uniform
from perfedrec.core.mapped import set_aside
from perfedrec.core.memory import give_back
from perfedrec.core.sampling import choose
from perfedrec.methods.federated import spectral
from perfedrec.methods.federated.settings import NeighbourhoodSettings
from perfedrec.nn.propagation import HALVES, Adjacency, Bipartite, diffusion_steps

PASSES, WIDTH = 4, 64
"""The passes of :func:`low_rank`, and the columns of each."""

LONG_LISTS = 16
"""The mean number of items of a user from which on :func:`diffused` divides by a user's whole degree. Where lists are
short, the longer ones say most of what there is to say (docs/results.md)."""

HOLDERS = 3
"""The least number of users who have both items of a pair that the factor of :func:`low_rank` may show. Everybody gets
this factor: one of the holders knows the own list, and two others have the pair besides."""


def tokens(n_items: int, key: Key) -> Tensor:
    """[m] the token of each item."""
    return choose(n_items, n_items, key.fold("tokens"))


def limited(edges: Tensor, most: int, n_items: int, key: Key) -> Tensor:
    """The ``edges`` [E, 3] (view, user, token) of users who have at most ``most`` in a view, and as many of each other
    user's, chosen at random."""
    groups = edges[:, 1] * (int(edges[:, 0].max()) + 1) + edges[:, 0] if edges.numel() else edges[:, 1]
    order = uniform(key.fold("limited").spread(groups * n_items + edges[:, 2]), 1).squeeze(1).argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    counts = groups[order].unique_consecutive(return_counts=True)[1]
    ranks = torch.arange(order.numel(), device=edges.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return edges[order[ranks < most].sort().values]


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


def counted(bipartite: Bipartite, alike: float | None, block_size: int = 512) -> Tensor | None:
    """[n] for how many users each user of the graph counts where pairs of items are counted: 1 divided by the number of
    users, this one included, whose lists have at least the share ``alike`` in common with this one's (Jaccard).
    ``None``: all count alike.

    Clients that one adversary controls bring an item into many lists most easily with one list for all.
    """
    if alike is None:
        return None
    by_user = _incidence(bipartite.by_user, bipartite.by_item.starts.numel()).astype(np.float32)
    sizes, by_item, counts = np.diff(by_user.indptr), sparse.csr_array(by_user.T), []
    for start in range(0, by_user.shape[0], block_size):
        common = sparse.coo_array(by_user[start : start + block_size] @ by_item)
        either = sizes[start + common.row] + sizes[common.col] - common.data
        near = common.row[common.data >= alike * either]
        counts.append(np.bincount(near, minlength=min(block_size, by_user.shape[0] - start)))
    found = torch.from_numpy(np.concatenate(counts)) if counts else torch.zeros(0)
    return 1.0 / found.clamp(min=1).to(torch.float32)  # who has no item is like nobody


def model(
    bipartite: Bipartite, key: Key, given: NeighbourhoodSettings, least: int, counts: Tensor | None, lists: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The neighbourhood model: the users' tokens and scores of :func:`diffused`, ``None`` unless ``lists`` are wanted,
    and the factor of :func:`low_rank`. ``least`` and ``counts`` are those of these functions."""
    near = nearness = None
    if lists:
        found = diffused(bipartite, given.alpha, given.beta, given.list_length, counts, given.gamma)
        near, nearness = (set_aside(each, "users' lists") for each in found)
        del found
        give_back()  # each step takes much memory
    factor = low_rank(bipartite, key, least, counts)
    give_back()
    return near, nearness, factor


def diffused(
    bipartite: Bipartite,
    alpha: float,
    beta: float,
    length: int,
    counts: Tensor | None = None,
    gamma: float | None = None,
    at_once: int = 1 << 22,
) -> tuple[Tensor, Tensor]:
    """For each user of the graph, the ``length`` items that diffusion ranks best among those that the user does not
    have: their tokens [n, k] int32, ascending, and their scores [n, k]. Unused places have token -1 and score 0.

    Diffusion takes three steps, from a user's items to their users and on to the items of these:
    ``s_uj = sum_i sum_v d_i^-alpha d_v^-gamma / d_j^beta`` over the user's items i and the users v who have both i and
    j. Unless ``gamma`` is given it is 1, and ``alpha`` where users have fewer than :data:`LONG_LISTS` items on average.
    RP3beta (Paudel et al., ACM TiiS 2016) has ``alpha``. With 1/2, 1 and 1/2 it is the linear filter of GF-CF (Shen et
    al., CIKM 2021), and what :func:`low_rank` comes near to. Users v count as ``counts`` [n] says (:func:`counted`).
    ``at_once`` scores are in memory together.
    """
    by_user = _incidence(bipartite.by_user, bipartite.by_item.starts.numel())
    if gamma is None:
        gamma = 1.0 if by_user.nnz >= LONG_LISTS * (np.diff(by_user.indptr) > 0).sum() else alpha
    back, forth = diffusion_steps(by_user, alpha, beta, gamma)
    forth = _times(counts, forth)
    near = np.full((by_user.shape[0], min(length, by_user.shape[1])), -1, dtype=np.int32)
    scores = np.zeros(near.shape, dtype=np.float32)
    block_size = max(at_once // by_user.shape[1], 1)
    for start in range(0, by_user.shape[0], block_size):
        own = by_user[start : start + block_size]
        found = (own @ back @ forth).toarray()
        found[own.nonzero()] = 0
        for row, each in enumerate(found):
            best = np.flatnonzero(each)
            if best.size > length:  # of equal ones at the end the first
                last = np.partition(each[best], -length)[-length]
                kept = each[best] > last
                kept[np.flatnonzero(each[best] == last)[: length - int(kept.sum())]] = True
                best = best[kept]
            near[start + row, : best.size], scores[start + row, : best.size] = best, each[best]
    return torch.from_numpy(near), torch.from_numpy(scores)


def _times(counts: Tensor | None, by_user: sparse.csr_array) -> sparse.csr_array:
    """The rows of a matrix [n, m] times ``counts`` [n]; as they are without counts."""
    return by_user if counts is None else sparse.csr_array(sparse.diags_array(counts.numpy()) @ by_user)


def _incidence(adjacency: Adjacency, n_columns: int) -> sparse.csr_array:
    """The entries of an adjacency, each 1. Places are numbers of 32 bits, as far as they can be, and so are those of
    products."""
    columns = adjacency.columns.cpu().numpy()
    offsets = np.append(adjacency.starts.cpu().numpy(), columns.size)
    if max(columns.size, n_columns) <= np.iinfo(np.int32).max:
        columns, offsets = columns.astype(np.int32), offsets.astype(np.int32)
    return sparse.csr_array((np.ones(columns.size), columns, offsets), shape=(offsets.size - 1, n_columns))


def leading(
    bipartite: Bipartite,
    width: int,
    passes: int,
    key: Key,
    exponents: tuple[float, float] = HALVES,
    least: int = HOLDERS,
    counts: Tensor | None = None,
) -> Tensor:
    """[m, ``width``] a basis near the leading eigenvectors of the matrix of :func:`shared` with ``exponents``,
    ``least`` and ``counts``: a number of ``passes`` of subspace iteration from random columns.

    Rare pairs are left out for privacy, and they are noise: with all pairs, as in the passes of clients, the basis
    recommends much worse (docs/results.md).
    """
    matrix = shared(bipartite, least, exponents, counts)
    return _bases(matrix, width, passes, key, bipartite.by_item.starts.device)[-1]


def low_rank(bipartite: Bipartite, key: Key, least: int = HOLDERS, counts: Tensor | None = None) -> Tensor:
    """[m, r] a factor ``F`` of the graph: ``F F^T`` is the part with positive eigenvalues of the matrix of
    :func:`shared` with ``least`` and ``counts``, by the Rayleigh-Ritz method in a block Krylov basis of :data:`PASSES`
    times :data:`WIDTH` columns.

    Without pairs of few users the matrix has negative eigenvalues, with which Nystroem's approximation is unstable.
    """
    n_items, device = bipartite.by_item.starts.numel(), bipartite.by_item.starts.device
    matrix = shared(bipartite, least, counts=counts)
    if not matrix.nnz:
        return torch.zeros(n_items, 1, device=device)

    basis = spectral.orthonormal(torch.cat(_bases(matrix, WIDTH, PASSES - 1, key.fold("low rank"), device), dim=1))
    return spectral.positive(basis, _image(matrix, basis))


def _bases(matrix: sparse.csr_array, width: int, passes: int, key: Key, device: torch.device) -> list[Tensor]:
    """Random columns [m, ``width``] and the bases after each of a number of ``passes`` of subspace iteration with a
    ``matrix`` [m, m]."""
    bases = [spectral.orthonormal(normal(key.spread(torch.arange(matrix.shape[0], device=device)), width))]
    for _ in range(passes):
        bases.append(spectral.orthonormal(_image(matrix, bases[-1])))
    return bases


def _image(matrix: sparse.csr_array, basis: Tensor) -> Tensor:
    """[m, w] the product of a ``matrix`` [m, m] with a ``basis`` [m, w]."""
    return torch.from_numpy(matrix @ basis.cpu().numpy()).to(basis.device)


def shared(
    bipartite: Bipartite,
    least: int = HOLDERS,
    exponents: tuple[float, float] = HALVES,
    counts: Tensor | None = None,
    block_size: int = 512,
) -> sparse.csr_array:
    """[m, m] the entries of ``N^T N``, with ``N = D_u^-a R D_i^-b`` for ``exponents`` a and b, of pairs of items that
    at least ``least`` users have both, with 0 for all other pairs. An entry on the diagonal belongs to the users of one
    item.

    An entry is the sum of ``1 / (d_u^2a d_i^b d_j^b)`` over the users u who have both items. With a single such user it
    would say that somebody has both, and how many items this person has; for an item that one person has, the row
    would be this person's list. Users count as ``counts`` [n] says (:func:`counted`), in both.
    """
    by_user = _incidence(bipartite.by_user, bipartite.by_item.starts.numel()).astype(np.float32)
    back, forth = diffusion_steps(by_user, exponents[1], exponents[1], gamma=2 * exponents[0])
    forth, holding = _times(counts, forth), _times(counts, by_user)
    by_item, rows = sparse.csr_array(by_user.T), []
    for start in range(0, by_item.shape[0], block_size):
        block = slice(start, start + block_size)
        entries = ((by_item[block] @ holding) >= least).multiply(back[block] @ forth)
        rows.append(sparse.csr_array(entries, dtype=np.float32))
    return sparse.csr_array(sparse.vstack(rows))
