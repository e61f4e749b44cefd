"""Graphs of users: who knows whom, who has friends in common, who has items in common.

Symbols: ``G`` [n, n] has 1 for two users who are related, in one direction or in both. ``R`` [n, m] are interactions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from perfedrec.nn.propagation import Adjacency, power, product

USERS_AT_ONCE = 1024
"""Users whose items are compared with those of all others at once: for each, a row of n numbers may be needed."""


@dataclass(frozen=True)
class UserGraph:
    """A weighted graph of users: a ``matrix`` [n, n] and its ``transpose``."""

    matrix: Adjacency
    transpose: Adjacency

    @staticmethod
    def of(weights: sparse.csr_array, exponents: tuple[float, float], device: torch.device) -> UserGraph:
        """``D^-a W D^-b`` for the ``weights`` W [n, n], with the sums of its rows in D and ``exponents`` a and b: (1/2,
        1/2) is the symmetric form, (1, 0) divides each row by its sum. Rows without entries stay empty."""
        sums = np.asarray(weights.sum(axis=1)).ravel()
        left, right = (sparse.diags_array(power(sums, -each) if each else np.ones(sums.size)) for each in exponents)
        found = sparse.csr_array(left @ weights @ right)
        found.eliminate_zeros()
        rows, columns = (torch.from_numpy(each.astype(np.int64)).to(device) for each in found.nonzero())
        values = torch.from_numpy(found.tocoo().data.astype(np.float32)).to(device)
        shape = (weights.shape[0], weights.shape[1])
        return UserGraph(Adjacency.of(rows, columns, values, shape), Adjacency.of(columns, rows, values, shape[::-1]))

    def spread(self, vectors: Tensor) -> Tensor:
        """The product with the users' ``vectors``, [n, d], or in several channels [c, n / c, d]."""
        return product(self.matrix, self.transpose, vectors.flatten(0, -2)).view_as(vectors)

    def propagated(self, vectors: Tensor, n_layers: int) -> Tensor:
        """The mean [n, d] of layers 0 to ``n_layers`` of a propagation; the users' ``vectors`` [n, d] are layer 0."""
        total = vectors
        for _ in range(n_layers):
            total = vectors + self.spread(total)
        return total / (n_layers + 1)


def related(n_users: int, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> sparse.csr_array:
    """``G`` [n, n] from directed relations ``sources`` [E] and ``targets`` [E]."""
    directed = sparse.csr_array((np.ones(sources.size), (sources, targets)), shape=(n_users, n_users))
    return sparse.csr_array(directed.maximum(directed.T))


def triangles(graph: sparse.csr_array) -> sparse.csr_array:
    """``(G G) o G`` [n, n]: for two related users, how many others both are related to.

    It is the sum of the seven triangular motifs of MHCN (Yu et al., WWW 2021), which tell the directions of the three
    relations apart, and the friend view of SEPT (Yu et al., KDD 2021).
    """
    return sparse.csr_array((graph @ graph) * graph)


def sharing(graph: sparse.csr_array, interactions: sparse.csr_array) -> sparse.csr_array:
    """``(R R^T) o G`` [n, n]: for two related users, how many items both have."""
    parts = [_common(interactions, rows) * graph[rows] for rows in _blocks(graph.shape[0])]
    return sparse.csr_array(sparse.vstack(parts))


def purchases(graph: sparse.csr_array, interactions: sparse.csr_array, fewest: int) -> sparse.csr_array:
    """``R R^T`` [n, n] without pairs of users who are related, and without those who have fewer than ``fewest`` items
    in common. A user is in a pair with itself."""
    parts = []
    for rows in _blocks(graph.shape[0]):
        common = _common(interactions, rows)
        common.data *= common.data >= fewest
        common.eliminate_zeros()
        common = sparse.csr_array(common - common * graph[rows])
        common.eliminate_zeros()
        parts.append(common)
    return sparse.csr_array(sparse.vstack(parts))


def _blocks(n: int) -> list[slice]:
    return [slice(first, min(first + USERS_AT_ONCE, n)) for first in range(0, n, USERS_AT_ONCE)]


def _common(interactions: sparse.csr_array, rows: slice) -> sparse.csr_array:
    return sparse.csr_array(interactions[rows] @ interactions.T)
