"""PFedRec: dual personalisation (Zhang et al., IJCAI 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.types import Embedding, Rows
from perfedrec.methods.federated.base import B, C, Federated, S
from perfedrec.nn.segments import dot


class PFedRec(Federated[S, B, C]):
    """There are no user vectors. Each client has a score function of its own, ``s_ui = w_u . q_i + b_u``, and
    fine-tunes the shared item vectors with it; the server averages the fine-tuned vectors (section 4).

    Departs from the paper: score function and item vectors take their local steps together instead of one after the
    other; of the fine-tuned rows only those of a client's own items are kept, and they are not used in scores; the
    server's optimiser is an option, FedAvg in the paper; one negative per label instead of four.
    """

    def n_private(self) -> int:
        return int(self.settings.model.embedding_dim) + 1

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        own = private[segments]
        return dot(own[:, :-1], rows) + own[:, -1]

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return torch.addmm(private[:, -1:], private[:, :-1], items.T)

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        return Embedding(client_state.private[:, :-1], broadcast.items)
