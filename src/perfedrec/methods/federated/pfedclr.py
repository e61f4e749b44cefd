"""PFedCLR: calibration by a personal low-rank matrix (Chen et al., 2025, arXiv 2506.09525)."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import fold_in, normal
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows
from perfedrec.methods.federated.base import B, C, Federated, LocalBatch, S
from perfedrec.methods.federated.local import Loss, Parameters
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.nn.segments import dot


class BufferSettings(Settings):
    """Options of the personal matrix."""

    rank: int = Field(4, ge=1, description="r, the rank of a client's own matrix A B, with A [d, r] and B [r, d]")
    weight: float = Field(1.0, ge=0, description="weight of the loss of the personal scores")


class PFedCLRSettings(FederatedSettings):
    """Options of PFedCLR."""

    buffer: BufferSettings = BufferSettings()


class PFedCLR(Federated[S, B, C]):
    """A client has a user vector ``p_u`` and a matrix ``W_u = A_u B_u`` of low rank, both its own. It trains and
    uploads item vectors by the plain scores ``p_u . q_i``, and recommends by ``p_u . (q_i + W_u^T q_i)``, which is
    ``(p_u + W_u p_u) . q_i``. So one matrix has both functions: it fits the shared item vectors to the client, and
    corrects the client's user vector for what averaging changed in them. It is trained on the item vectors as received,
    and no change of item vectors comes from it.

    We had the paper's abstract and summaries of it, not the full text: a buffer matrix ``W_u`` of low rank calibrates
    the user vector and personalises the item vectors, after the upload. The equations could not be checked. In
    particular, ``W_u`` may have been a matrix [m, d] that is added to the item vectors. Such a matrix, with
    ``A_u^T q_i`` in place of r free numbers for each item, is the one used here.

    Departs from these summaries: the steps before and after the upload are taken together. The server's optimiser is an
    option; one negative per label.
    """

    Options = PFedCLRSettings
    settings: PFedCLRSettings

    def n_private(self) -> int:
        return int(self.settings.model.embedding_dim * (1 + 2 * self.settings.buffer.rank))

    def init_private(self, keys: Tensor) -> Tensor:
        """The first user vector; ``A`` random, so that ``A^T q`` has about the length of ``q``; and ``B`` 0."""
        model, rank = self.settings.model, self.settings.buffer.rank
        vector = normal(keys, model.embedding_dim) * model.init_scale
        left = normal(fold_in(keys, torch.ones_like(keys)), model.embedding_dim * rank) * rank**-0.5
        return torch.cat([vector, left, torch.zeros_like(left)], dim=1)

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(self.calibrated(private)[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return self.calibrated(private) @ items.T

    def calibrated(self, private: Tensor) -> Tensor:
        """[B, d] ``p_u + A_u B_u p_u``."""
        dim, rank = self.settings.model.embedding_dim, self.settings.buffer.rank
        vector, left, right = private.split([dim, dim * rank, rank * dim], dim=1)
        inner = dot(right.unflatten(1, (rank, dim)), vector[:, None])
        own: Tensor = vector + dot(left.unflatten(1, (dim, rank)), inner[:, None])
        return own

    def local_loss(self, batch: LocalBatch[B], parameters: Parameters) -> Tensor:
        """The loss of the plain scores, which alone changes item vectors, plus ``weight`` times that of the personal
        scores of the received item vectors."""
        labels, private = batch.labels, parameters.private
        dim = self.settings.model.embedding_dim
        plain = functional.pad(private[:, :dim], (0, private.shape[1] - dim))
        shared = super().local_loss(batch, replace(parameters, private=plain))
        positives = self.table_rows(batch.broadcast, labels.rows.items, labels.rows.segments)
        negatives = self.table_rows(batch.broadcast, labels.negatives, labels.owners)
        personal: Tensor = super().local_loss(batch, replace(parameters, positives=positives, negatives=negatives))
        return shared + self.settings.buffer.weight * personal

    def loss_name(self) -> Loss | None:
        return None

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        return Embedding(self.calibrated(client_state.private), broadcast.items)

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        return client_state.private[:, : self.settings.model.embedding_dim]
