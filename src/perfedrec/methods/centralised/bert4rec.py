"""BERT4Rec: sequential recommendation with a bidirectional encoder (Sun et al., CIKM 2019)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.sequences import Histories, SequenceMethod, SequenceSettings
from perfedrec.nn.attention import Dropout
from perfedrec.nn.linear import linear
from perfedrec.nn.losses import softmax_loss


class BERT4RecSettings(SequenceSettings):
    """Options of BERT4Rec."""

    width: int = Field(4, ge=1, description="units of the hidden layers, in multiples of d")
    mask: float = Field(0.2, gt=0, le=1, description="rho, chance of an item to be hidden in training")
    last: float = Field(0.1, ge=0, le=1, description="share of sequences of which the last item alone is hidden")


class BERT4Rec(SequenceMethod):
    """Hidden items are found from both sides: ``P(i) = softmax(GELU(h_t W + b) Q^T + c)_i`` with ``h_t``, what an
    encoder in which every place sees all others makes of the hidden place t (sections 3.3 to 3.5). It minimises the
    mean of ``-log P`` over hidden places (section 3.6). To recommend, a hidden item is put behind the last one.

    Departs from the paper: no dropout of the attention weights; a mean over the hidden places of a batch and not of
    each sequence; at least one item of a sequence is hidden, the last one where chance hides none; no decay of weights.
    """

    Options = BERT4RecSettings
    settings: BERT4RecSettings
    causal = False

    @property
    def width(self) -> int:
        return self.settings.width

    def head(self, n_items: int) -> list[tuple[int, ...]]:
        d = self.settings.embedding_dim
        return [(d, d), (d,), (n_items,)]

    def loss(self, weights: list[Tensor], users: Tensor, data: Training, key: Key) -> Tensor:
        own = Histories.of(data, users, self.settings.max_length)
        hidden = self.hidden(own, users, key)
        masked = Histories(own.items.masked_fill(hidden, data.n_items), own.counts)
        found, items = self.found(weights, self.encoded(weights, masked, self.dropout(users, key))[hidden])
        return softmax_loss(found, items, own.items[hidden])

    def hidden(self, own: Histories, users: Tensor, key: Key) -> Tensor:
        """bool [b, L] the places that are hidden in training."""
        length = own.items.shape[1]
        draws = uniform(key.fold("hidden").spread(users), length + 1)
        chosen = (draws[:, 1:] < self.settings.mask) & own.there
        alone = (draws[:, 0] < self.settings.last) | ~chosen.any(1)
        last = torch.zeros_like(chosen).index_put(own.last, torch.ones_like(alone))
        return torch.where(alone[:, None], last & own.there, chosen)

    def found(self, weights: list[Tensor], inner: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [T, d + 1] from what the encoder made of T hidden places, and of the items [m, d + 1], which end with
        their biases."""
        matrix, bias, of_items = weights[-3:]
        vectors = functional.gelu(linear(inner, matrix, bias))
        return functional.pad(vectors, (0, 1), value=1.0), torch.cat([weights[0][:-1], of_items[:, None]], dim=1)

    def read(self, data: Training, users: Tensor) -> Histories:
        own = Histories.of(data, users, self.settings.max_length - 1)
        items = functional.pad(own.items, (0, 1)).index_put(
            (own.last[0], own.counts), own.counts.new_tensor(data.n_items)
        )
        return Histories(items, own.counts + 1)

    def vectors(self, weights: list[Tensor], own: Histories) -> tuple[Tensor, Tensor]:
        return self.found(weights, self.encoded(weights, own, Dropout())[own.last])
