"""EASE: embarrassingly shallow autoencoders (Steck, WWW 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.linalg import lapack
from torch import Tensor
from torch.nn import functional

from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.memory import check_memory
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import ROWS_AT_ONCE

PARTS = 1.5
"""Memory of a fit, in dense matrices between items: the matrix itself, and the sparse one that it starts as."""


class EASESettings(Settings):
    """Options of EASE."""

    l2: float = Field(500.0, gt=0, description="L2 on the weights between items")


@dataclass(frozen=True)
class Weights:
    """``between`` [m, m] the weights of items (rows) for the scores of items (columns), 0 on the diagonal."""

    between: Tensor


class EASE(Method):
    """``B_ij = -P_ij / P_jj`` with ``P = (R^T R + l2 I)^-1``, 0 on the diagonal, and ``score_u = r_u B``: the linear
    model of all items by all other items that reconstructs the interactions best.

    It needs a dense matrix between items: 4 m^2 bytes. Does not depart from the paper, but for numbers of 32 bits.
    """

    Options = EASESettings
    seedless = True
    settings: EASESettings
    item_based = True

    def init(self, data: Training, key: Key) -> Weights:
        m = data.n_items
        check_memory(
            int(PARTS * 4 * m * m),
            f"EASE with its dense matrix between {m:,} items",
            "a machine with more memory, fewer items (data.k_core), or a method with a sparse matrix, such as slim",
        )
        matrix = data.matrix.astype(np.float32)
        between = inverse((matrix.T @ matrix).toarray(order="F"), self.settings.l2)
        between /= -between.diagonal()
        np.fill_diagonal(between, 0.0)
        return Weights(torch.from_numpy(between).to(data.rows.items.device))

    def scores(self, state: Weights, data: Training, users: Tensor) -> Tensor:
        rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
        return functional.embedding_bag(rows.items, state.between, rows.offsets[:-1], mode="sum")


def inverse(gram: NDArray[np.float32], l2: float) -> NDArray[np.float32]:
    """``(gram + l2 I)^-1`` of a symmetric float32 matrix [m, m] in Fortran order, whose memory it takes.

    Raises :class:`ConfigError` where ``l2`` is too small for numbers of 32 bits.
    """
    diagonal = np.arange(gram.shape[0])
    gram[diagonal, diagonal] += l2
    with one_thread():
        factor, failed = lapack.spotrf(gram, lower=1, clean=0, overwrite_a=1)
        if failed:
            raise ConfigError(f"method.l2 = {l2:g} is too small: the matrix between items cannot be inverted")
        lower, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    whole: NDArray[np.float32] = lower.T  # in C order, with the result above the diagonal
    for start in range(0, whole.shape[0], ROWS_AT_ONCE):
        end = start + ROWS_AT_ONCE
        block = np.triu(whole[start:end, start:end])
        whole[start:end, start:end] = block + np.triu(block, 1).T
        whole[end:, start:end] = whole[start:end, end:].T
    return whole
