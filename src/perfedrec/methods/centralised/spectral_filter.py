"""Truncated spectral filter: an ideal low-pass filter on the interaction graph (Shen et al., CIKM 2021, GF-CF)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.scoring import Scoring
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Embedding, block_rows
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.nn.segments import segment_sum


class SpectralFilterSettings(Settings):
    """Options of the filter."""

    n_components: int = Field(64, ge=1, description="number of singular vectors that pass the filter")


@dataclass(frozen=True)
class Basis:
    """``down`` and ``up`` [m, k]: the singular vectors divided by, and multiplied by, the roots of the item degrees."""

    down: Tensor
    up: Tensor

    def embedding(self, data: Training, users: Tensor) -> Embedding:
        """Vectors whose products are the scores of ``users`` [B]."""
        rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
        return Embedding(segment_sum(self.down[rows.items], rows.segments, users.numel()), self.up)


def normalised(data: Training) -> sparse.csr_array:
    """``D_u^-1/2 R D_i^-1/2`` [n, m]."""
    users, items = (each.cpu().numpy().clip(min=1) for each in (data.rows.counts, data.item_degrees))
    return sparse.csr_array(sparse.diags_array(users**-0.5) @ data.matrix @ sparse.diags_array(1 / np.sqrt(items)))


class SpectralFilter(Method):
    """``score_u = r_u D_i^-1/2 V V^T D_i^1/2``, with ``V`` the leading right singular vectors of
    ``D_u^-1/2 R D_i^-1/2``.

    Departs from the paper: only the filter, without the added item-item similarity, which ``gf_cf`` has. It is the
    centralised counterpart of spectral pre-training.
    """

    Options = SpectralFilterSettings
    settings: SpectralFilterSettings
    item_based = True

    def init(self, data: Training, key: Key) -> Basis:
        from scipy.sparse.linalg import svds  # 7 MB that only this needs

        matrix, root = normalised(data), np.sqrt(data.item_degrees.cpu().numpy().clip(min=1))
        k, rng = min(self.settings.n_components, *(side - 1 for side in matrix.shape)), np.random.default_rng(key.value)
        with one_thread():
            vectors = svds(matrix, k=k, rng=rng, return_singular_vectors="vh")[2].T
        down, up = vectors / root[:, None], vectors * root[:, None]
        device = data.rows.items.device
        return Basis(*(torch.tensor(each, dtype=torch.float32, device=device) for each in (down, up)))

    def scores(self, state: Basis, data: Training, users: Tensor) -> Tensor:
        return self.scoring(state, data, users).dense()

    def scoring(self, state: Basis, data: Training, users: Tensor) -> Scoring:
        own = self.embedding(state, data, users)
        return Scoring.product(own.users, own.items)

    def embedding(self, state: Basis, data: Training, users: Tensor) -> Embedding:
        return state.embedding(data, users)
