"""Sparse similarity matrices, with which neighbourhood methods score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Similarity:
    """A square matrix [r, r] in CSR form: the entries of row i are ``columns`` and ``values`` from ``offsets[i]`` to
    ``offsets[i + 1]``."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(matrix: sparse.csr_array) -> Similarity:
        parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data.astype(np.float32))
        return Similarity(*map(torch.from_numpy, parts))

    def matrix(self) -> sparse.csr_array:
        """The matrix as a scipy array."""
        parts = (self.values.cpu().numpy(), self.columns.cpu().numpy(), self.offsets.cpu().numpy())
        return sparse.csr_array(parts, shape=(self.offsets.numel() - 1,) * 2)


def nearest(
    left: sparse.csr_array,
    right: sparse.csr_array,
    k: int,
    lengths: NDArray[np.float64] | None = None,
    shrink: float = 0.0,
) -> sparse.csr_array:
    """The ``k`` largest entries of each row of ``left @ right`` [r, r], without the diagonal.

    With ``lengths`` [r] the entry (i, j) is divided by ``lengths_i lengths_j + shrink`` first.
    """
    blocks = []
    for start in range(0, left.shape[0], ROWS_AT_ONCE):
        block = (left[start : start + ROWS_AT_ONCE] @ right).toarray()
        places = np.arange(block.shape[0])
        if lengths is not None:
            block /= lengths[start : start + block.shape[0], None] * lengths[None, :] + shrink
        block[places, start + places] = 0.0
        blocks.append(sparse.csr_array(largest(block, k)))
    return sparse.csr_array(sparse.vstack(blocks))


def largest(block: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """The ``k`` largest entries of each row, in place of a ``block`` that has zeros elsewhere."""
    if k < block.shape[1]:
        # torch finds them in a tenth of the time that np.partition takes with that many zeros.
        smallest = torch.from_numpy(block).topk(k, dim=1, sorted=False).values.amin(dim=1)
        block[block < smallest.numpy()[:, None]] = 0.0
    return block


def product(left: sparse.csr_array, right: sparse.csr_array, device: torch.device) -> Tensor:
    """[B, m] the product ``left @ right`` as a dense float32 tensor."""
    return torch.from_numpy((left @ right).toarray().astype(np.float32)).to(device)
