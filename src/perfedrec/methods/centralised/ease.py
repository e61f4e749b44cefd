"""EASE: embarrassingly shallow autoencoders (Steck, WWW 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.memory import check_memory
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows, block_rows
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import ROWS_AT_ONCE


class EASESettings(Settings):
    """Options of EASE."""

    l2: float = Field(500.0, gt=0, description="L2 on the weights between items")


@dataclass(frozen=True)
class BetweenItems:
    """``weights`` [m, m] of items (rows) for the scores of items (columns), 0 on the diagonal."""

    weights: Tensor


@dataclass(frozen=True)
class BetweenUsers:
    """The same model as a smaller matrix, where there are fewer users than items: ``inverse`` [n, n] is
    ``(R R^T + l2 I)^-1`` and ``diagonal`` [m] that of ``R^T inverse R``."""

    inverse: Tensor
    diagonal: Tensor


State = BetweenItems | BetweenUsers


class EASE(Method):
    """``score_u = r_u B`` with ``B_ij = -P_ij / P_jj``, ``P = (R^T R + l2 I)^-1``, and 0 on the diagonal: the linear
    model of each item by all other items with the least squared error.

    It needs a dense matrix between items or, if they are fewer, between users, because
    ``P = (I - R^T (R R^T + l2 I)^-1 R) / l2``: 4 bytes times the square of their number. Does not depart from the
    paper, but for numbers of 32 bits.
    """

    Options = EASESettings
    seedless = True
    settings: EASESettings
    item_based = True

    def init(self, data: Training, key: Key) -> State:
        few = min(data.n_users, data.n_items)
        check_memory(
            4 * few * few,
            f"EASE with a dense matrix between {few:,} {'users' if few < data.n_items else 'items'}",
            "a machine with more memory, fewer users or items (data.k_core), or a method such as gf_cf or rp3beta",
        )
        matrix, device = _interactions(data), data.rows.items.device
        if few == data.n_items:
            weights = inverse(sparse.csr_array(matrix.T), self.settings.l2)
            weights /= -weights.diagonal()
            np.fill_diagonal(weights, 0.0)
            return BetweenItems(torch.from_numpy(weights).to(device))
        users, items = inverse(matrix, self.settings.l2), sparse.csr_array(matrix.T)
        blocks = (items[start : start + ROWS_AT_ONCE] for start in range(0, items.shape[0], ROWS_AT_ONCE))
        diagonal = np.concatenate([block.multiply(block @ users).sum(1) for block in blocks])
        return BetweenUsers(torch.from_numpy(users).to(device), torch.from_numpy(diagonal).to(device))

    def scores(self, state: State, data: Training, users: Tensor) -> Tensor:
        rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
        if isinstance(state, BetweenItems):
            return functional.embedding_bag(rows.items, state.weights, rows.offsets[:-1], mode="sum")
        own = own_items(rows, data.n_items)
        # For users of the inverse, r_u R^T inverse is row u of I - l2 inverse.
        return _without_own(own - self.settings.l2 * _times(state.inverse[users], data), own, state)

    def scores_of_new_users(self, state: State, data: Training, rows: Rows) -> Tensor:
        if isinstance(state, BetweenItems):
            return super().scores_of_new_users(state, data, rows)
        own = own_items(rows, data.n_items)
        alike = torch.from_numpy((_interactions(data) @ own.cpu().numpy().T).T).to(own.device)
        return _without_own(_times(alike @ state.inverse, data), own, state)


def _interactions(data: Training) -> sparse.csr_array:
    return sparse.csr_array(data.matrix.astype(np.float32))


def own_items(rows: Rows, n_items: int) -> Tensor:
    """[B, m] with 1 for each interaction of B users."""
    own = torch.zeros(rows.n_users, n_items, device=rows.items.device)
    own[rows.segments, rows.items] = 1.0
    return own


def _times(users: Tensor, data: Training) -> Tensor:
    """[B, m] the product of ``users`` [B, n] with the interactions [n, m]."""
    return torch.from_numpy((_interactions(data).T @ users.cpu().numpy().T).T).to(users.device)


def _without_own(fitted: Tensor, own: Tensor, state: BetweenUsers) -> Tensor:
    """[B, m] ``r B`` from ``r A`` with ``A = R^T inverse R``: ``B_ij`` is ``A_ij / (1 - A_jj)``, and 0 for i = j."""
    return (fitted - own * state.diagonal) / (1 - state.diagonal)


def inverse(rows: sparse.csr_array, l2: float) -> NDArray[np.float32]:
    """``(rows rows^T + l2 I)^-1`` [r, r] of a float32 matrix [r, c], computed in the memory of the result.

    Raises :class:`ConfigError` where ``l2`` is too small for numbers of 32 bits.
    """
    from scipy.linalg import lapack  # 7 MB that only this needs

    r = rows.shape[0]
    blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, r, ROWS_AT_ONCE)]
    gram = np.empty((r, r), dtype=np.float32, order="F")
    for block in blocks:
        gram[:, block] = (rows @ rows[block].T).toarray()
    gram[np.arange(r), np.arange(r)] += l2
    with one_thread():
        factor, failed = lapack.spotrf(gram, lower=1, clean=0, overwrite_a=1)
        if failed:
            raise ConfigError(f"method.l2 = {l2:g} is too small: the matrix cannot be inverted; expected a larger one")
        lower, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    whole: NDArray[np.float32] = lower.T  # in C order, with the result above the diagonal
    for block in blocks:
        corner = np.triu(whole[block, block])
        whole[block, block] = corner + np.triu(corner, 1).T
        whole[block.stop :, block] = whole[block, block.stop :].T
    return whole
