"""FedNCF: federated neural collaborative filtering (Perifanis and Efraimidis, Knowledge-Based Systems 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.flat import Flat, apply_per_client

WIDTHS = (32, 16)


class FedNCF(Federated[ServerState, Broadcast, ClientState]):
    """``s_ui = h . relu(W_2 relu(W_1 [p_u; q_i] + b_1) + b_2)``. User vectors stay on the clients; item vectors and the
    network's weights are shared and averaged.

    Departs from the paper: hidden layers of 32 and 16 units; no second, multiplicative branch (its variant MLP); no
    masks (secure aggregation is ``privacy.aggregation``); one negative per label instead of four; the server's
    optimiser is an option, FedAvg in the paper.
    """

    @property
    def network(self) -> Flat:
        """The shared weights, in this order: ``W_1`` for user and for item vectors, ``b_1``, ``W_2``, ``b_2`` and
        ``h``."""
        dim, (wide, narrow) = self.settings.model.embedding_dim, WIDTHS
        return Flat(((dim, wide), (dim, wide), (wide,), (wide, narrow), (narrow,), (narrow,)))

    def init_dense(self, key: Key) -> Tensor:
        biases = (2, 4)
        scales = [0.0 if n in biases else (2 / shape[0]) ** 0.5 for n, shape in enumerate(self.network.shapes)]
        return self.network.init(key, scales)

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        assert dense is not None
        weights = dense

        def score(clients: Tensor, padded: Sequence[Tensor]) -> Tensor:
            user, item, bias, second, second_bias, head = self.network.unpack(weights[clients])
            hidden = torch.relu(padded[0] @ item + (private[clients, None] @ user) + bias[:, None])
            hidden = torch.relu(hidden @ second + second_bias[:, None])
            return (hidden @ head[..., None]).squeeze(-1)

        return apply_per_client(score, [rows], segments, private.shape[0])

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        assert dense is not None
        user, item, bias, second, second_bias, head = self.network.unpack(dense)
        of_items, of_users = items @ item + bias, private @ user
        # User by user: the hidden units of a whole block do not fit the processor's cache and take five times as long.
        scores = [torch.relu(torch.relu(of_items + own) @ second + second_bias) @ head for own in of_users]
        return torch.stack(scores)
