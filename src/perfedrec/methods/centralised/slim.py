"""SLIM: sparse linear methods (Ning and Karypis, ICDM 2011)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.memory import check_memory
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import ROWS_AT_ONCE, Similarity, product

AT_ONCE = 1 << 24
"""Numbers in the matrices of the items that are fitted at once."""

MAX_SWEEPS = 100


class SLIMSettings(Settings):
    """Options of SLIM."""

    l1: float = Field(0.1, ge=0, description="L1 on the weights between items; more of it leaves fewer weights")
    l2: float = Field(300.0, gt=0, description="L2 on the weights between items")
    n_neighbours: int = Field(200, ge=1, description="number of most similar items that may have weights for an item")
    tolerance: float = Field(1e-4, gt=0, description="change of a weight below which an item's weights are final")


class SLIM(Method):
    """``score_u = r_u W``, with ``W >= 0``, 0 on the diagonal, that minimises
    ``1/2 |R - R W|^2 + l2/2 |W|^2 + l1 |W|_1``: each item's column is an elastic net on the items that are most similar
    to it by cosine (fsSLIM in the paper, SLIM with as many neighbours as there are items).

    Does not depart from the paper. Weights are found by coordinate descent. Between items that ``l1`` users or fewer
    have in common they are 0 for certain, because neither ``W`` nor ``R`` has numbers below 0, and are left out.
    """

    Options = SLIMSettings
    seedless = True
    settings: SLIMSettings
    item_based = True

    def init(self, data: Training, key: Key) -> Similarity:
        m, settings = data.n_items, self.settings
        check_memory(
            4 * m * m,
            f"SLIM with its dense matrix between {m:,} items",
            "a machine with more memory, fewer items (data.k_core), or a method such as gf_cf or rp3beta",
        )
        matrix = data.matrix.astype(np.float32)
        gram = (matrix.T @ matrix).toarray()
        nothing = np.zeros(0, dtype=np.int64)
        found = [(np.zeros(0, dtype=np.float32), nothing, nothing)]
        with one_thread():
            for items, others in _batches(most_similar(gram, settings.l1, settings.n_neighbours)):
                weights = elastic_net(gram, items, others, settings.l1, settings.l2, settings.tolerance)
                places, numbers = np.nonzero(weights)
                found.append((weights[places, numbers], others[places, numbers], items[places]))
        values, rows, columns = map(np.concatenate, zip(*found, strict=True))
        return Similarity.of(sparse.csr_array((values, (rows, columns)), shape=(m, m)))

    def scores(self, state: Similarity, data: Training, users: Tensor) -> Tensor:
        return product(data.matrix[users.cpu().numpy()], state.matrix(), users.device)


def most_similar(gram: NDArray[np.float32], l1: float, k: int) -> NDArray[np.int64]:
    """[m, k] for each item the others by cosine, the most similar first, of those that more than ``l1`` users have in
    common with it; -1 where there are fewer. ``gram`` [m, m] counts common users."""
    m, lengths = gram.shape[0], np.sqrt(gram.diagonal().clip(min=1))
    others = np.full((m, min(k, m)), -1, dtype=np.int64)
    for start in range(0, m, ROWS_AT_ONCE):
        block = gram[start : start + ROWS_AT_ONCE]
        cosines = np.where(block > l1, block / lengths, 0)  # not divided by the item's own length, the same for all
        cosines[np.arange(block.shape[0]), start + np.arange(block.shape[0])] = 0
        top = np.argpartition(cosines, -others.shape[1], axis=1)[:, -others.shape[1] :]
        values = np.take_along_axis(cosines, top, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        top, values = (np.take_along_axis(each, order, axis=1) for each in (top, values))
        others[start : start + ROWS_AT_ONCE] = np.where(values > 0, top, -1)
    return others


def _batches(others: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Items [b] that are fitted at once, with the ``others`` [b, s] of each: items with about as many of them."""
    counts = (others >= 0).sum(1)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    while order.size:
        s = int(counts[order[0]])
        items, order = np.split(order, [max(AT_ONCE // (s * s), 1)])
        yield items, others[items, :s]


def elastic_net(
    gram: NDArray[np.float32],
    items: NDArray[np.int64],
    others: NDArray[np.int64],
    l1: float,
    l2: float,
    tolerance: float,
) -> NDArray[np.float32]:
    """float32 [b, s] weights of ``others`` [b, s] (-1: none) for ``items`` [b], from ``gram`` ``R^T R`` [m, m]: cyclic
    coordinate descent for all items at once, until no weight changes by more than ``tolerance``."""
    there = torch.from_numpy(others >= 0)
    inner = torch.from_numpy(gram[others[:, :, None], others[:, None, :]])
    inner *= there[:, :, None] & there[:, None, :]
    rest = torch.from_numpy(gram[others, items[:, None]]) * there  # r = c - G w, of which w = 0 at first
    weights, diagonal = torch.zeros_like(rest), inner.diagonal(dim1=1, dim2=2)
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for k in range(others.shape[1]):
            old, size = weights[:, k], diagonal[:, k]
            new = ((rest[:, k] + size * old - l1) / (size + l2)).clamp_(min=0)
            change = new - old
            rest.addcmul_(inner[:, k], change[:, None], value=-1)
            weights[:, k] = new
            largest = max(largest, float(change.abs().max()))
        if largest <= tolerance:
            break
    return weights.numpy()
