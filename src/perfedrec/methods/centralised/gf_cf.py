"""GF-CF: graph filters without training (Shen et al., CIKM 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import product
from perfedrec.methods.centralised.spectral_filter import Basis, SpectralFilter, SpectralFilterSettings, normalised


class GFCFSettings(Settings):
    """Options of GF-CF."""

    n_components: int = Field(256, ge=1, description="number of singular vectors that pass the ideal low-pass filter")
    weight: float = Field(0.3, ge=0, description="weight of the ideal low-pass filter (alpha in the paper)")


@dataclass(frozen=True)
class Filters:
    """``basis``: the ideal low-pass filter. The linear filter is the normalised matrix [n, m] in CSR form, ``offsets``
    [n + 1], ``items`` and ``values``."""

    basis: Basis
    offsets: Tensor
    items: Tensor
    values: Tensor

    def linear(self, n_items: int) -> sparse.csr_array:
        """The normalised matrix as a scipy array."""
        parts = (each.cpu().numpy() for each in (self.values, self.items, self.offsets))
        return sparse.csr_array(tuple(parts), shape=(self.offsets.numel() - 1, n_items))


class GFCF(Method):
    """``score_u = r_u (R~^T R~ + weight D_i^-1/2 V V^T D_i^1/2)`` with ``R~ = D_u^-1/2 R D_i^-1/2`` and ``V`` its
    leading right singular vectors: a linear filter between items, and the ideal low-pass filter of ``spectral_filter``.

    Does not depart from the paper.
    """

    Options = GFCFSettings
    settings: GFCFSettings
    item_based = True

    def init(self, data: Training, key: Key) -> Filters:
        settings = SpectralFilterSettings(n_components=self.settings.n_components)
        matrix = normalised(data)
        parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data.astype(np.float32))
        return Filters(SpectralFilter(settings).init(data, key), *map(torch.from_numpy, parts))

    def scores(self, state: Filters, data: Training, users: Tensor) -> Tensor:
        linear = state.linear(data.n_items)
        own, filtered = data.matrix[users.cpu().numpy()].astype(np.float32), state.basis.embedding(data, users)
        similar = product(own @ linear.T, linear, users.device)
        return torch.addmm(similar, filtered.users, filtered.items.T, alpha=self.settings.weight)
