"""FedNCF: federated neural collaborative filtering (Perifanis and Efraimidis, Knowledge-Based Systems 2022)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from perfedrec.core.keys import Key, normal
from perfedrec.methods.federated.base import Federated
from perfedrec.nn.segments import by_length

WIDTHS = (32, 16)


class FedNCF(Federated):
    """``s_ui = h . relu(W_2 relu(W_1 [p_u; q_i] + b_1) + b_2)``: user vectors stay on the clients, item vectors and the
    network's weights are shared and averaged.

    Departs from the paper: widths 32 and 16 of the hidden layers, no second, multiplicative branch (its variant MLP),
    no masks (secure aggregation is ``privacy.aggregation``), one negative for each label instead of four; the server's
    optimiser is an option, FedAvg in the paper.
    """

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weights for user and item vectors, the bias, the second layer with its bias, and ``h``."""
        dim, (wide, narrow) = self.settings.model.embedding_dim, WIDTHS
        return [(dim, wide), (dim, wide), (wide,), (wide, narrow), (narrow,), (narrow,)]

    def init_dense(self, key: Key) -> Tensor:
        parts = []
        for number, shape in enumerate(self.shapes):
            draws = normal(key.fold(number).spread(torch.zeros((), dtype=torch.int64)), prod(shape))
            bias = number in (2, 4)
            parts.append(draws * (0.0 if bias else (2 / shape[0]) ** 0.5))
        return torch.cat(parts)

    def _pieces(self, dense: Tensor) -> list[Tensor]:
        """The weights [..., *shape] out of flat ones [..., D]."""
        sizes = [prod(shape) for shape in self.shapes]
        parts = zip(dense.split(sizes, dim=-1), self.shapes, strict=True)
        return [part.unflatten(-1, shape) for part, shape in parts]

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        assert dense is not None
        scores, places = [], []  # padded, because each client has weights of its own within a round
        for members, where, owner, slot in by_length(segments, private.shape[0]):
            user, item, bias, second, second_bias, head = self._pieces(dense[members])
            padded = rows.new_zeros(members.numel(), int(slot.max()) + 1, rows.shape[1])
            padded = padded.index_put((owner, slot), rows[where])
            hidden = torch.relu(padded @ item + (private[members, None] @ user) + bias[:, None])
            hidden = torch.relu(hidden @ second + second_bias[:, None])
            scores.append((hidden @ head[..., None]).squeeze(-1)[owner, slot])
            places.append(where)
        return torch.cat(scores)[torch.cat(places).argsort()]

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        assert dense is not None
        user, item, bias, second, second_bias, head = self._pieces(dense)
        of_items, of_users = items @ item + bias, private @ user
        # User by user: all hidden units of a block leave the processor's cache, which takes five times as long.
        scores = [torch.relu(torch.relu(of_items + own) @ second + second_bias) @ head for own in of_users]
        return torch.stack(scores)
