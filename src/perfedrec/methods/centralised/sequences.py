"""Methods that read the items of a user in the order of time, with an encoder by self-attention."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.core.scoring import Scoring
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.nn.attention import Dropout, Encoder
from perfedrec.nn.flat import Flat

VECTOR_SCALE = 0.02
"""Standard deviation of the first vectors of items and places."""


class SequenceSettings(Settings):
    """Options of every method that reads sequences."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of item vectors and of all inner ones")
    max_length: int = Field(50, ge=2, description="n, how many of a user's last items are read")
    n_blocks: int = Field(2, ge=1, description="blocks of self-attention")
    n_heads: int = Field(1, ge=1, description="heads of each self-attention; they divide embedding_dim")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of numbers set to 0 after each part of the network")
    learning_rate: float = Field(0.001, gt=0, description="step of Adam")
    batch_size: int = Field(128, ge=1, description="users per step")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.embedding_dim % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; expected a divisor of embedding_dim, which is {self.embedding_dim}"
            )
        return self


@dataclass(frozen=True)
class Network:
    """The flat ``weights`` [D], with Adam's moments ``first`` and ``second`` [D] and its number of ``steps``."""

    weights: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    steps: int = 0


@dataclass(frozen=True)
class Histories:
    """The last items of b users: ``items`` [b, L], oldest first, of which the first ``counts`` [b] of a row exist."""

    items: Tensor
    counts: Tensor

    @staticmethod
    def of(data: Training, users: Tensor, length: int) -> Histories:
        """At most ``length`` last items of ``users`` [b]; L is the number of the longest."""
        ends = data.rows.offsets[users + 1]
        counts = (ends - data.rows.offsets[users]).clamp(max=length)
        places = torch.arange(max(int(counts.max()), 1), device=users.device)
        rows = (ends - counts)[:, None] + places
        items = data.sequence[rows.clamp(max=data.sequence.numel() - 1)]
        return Histories(items.masked_fill(places >= counts[:, None], 0), counts)

    @property
    def there(self) -> Tensor:
        """bool [b, L] the places that exist."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.counts[:, None]

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """The row and the last place of each user, to index [b, L, ...] with."""
        return torch.arange(self.counts.numel(), device=self.counts.device), (self.counts - 1).clamp(min=0)


class SequenceMethod(Method):
    """Trains :meth:`loss` with Adam over batches of users. A user's vector is what :meth:`vectors` makes of its last
    items, and scores are its inner products with the item vectors.

    Places are counted from the last item, so that what came last is always at the same place.
    """

    Options: ClassVar[type[Settings]] = SequenceSettings
    settings: SequenceSettings
    trained = True
    item_based = True
    sequential = True

    causal: ClassVar[bool] = True
    """Whether a place sees earlier ones alone."""

    @property
    def width(self) -> int:
        """Units of the hidden layers of a block, in multiples of d."""
        return 1

    @property
    def encoder(self) -> Encoder:
        settings, d = self.settings, self.settings.embedding_dim
        return Encoder(d, settings.n_blocks, settings.n_heads, self.width * d, self.causal)

    def head(self, n_items: int) -> list[tuple[int, ...]]:
        """The shapes of further weights, which come last: matrices, and biases that begin with 0."""
        return []

    def network(self, n_items: int) -> tuple[Flat, list[float]]:
        """The weights for ``n_items`` items, and the size of the first ones: a vector for each item and one more, which
        stands for a hidden item; one for each place; those of the encoder, and of the :meth:`head`."""
        d, encoder, head = self.settings.embedding_dim, self.encoder, self.head(n_items)
        shapes = ((n_items + 1, d), (self.settings.max_length, d), *encoder.shapes, *head)
        ends = [(2 / sum(shape)) ** 0.5 if len(shape) == 2 else 0.0 for shape in head]
        return Flat(shapes), [VECTOR_SCALE, VECTOR_SCALE, *encoder.scales, *ends]

    def init(self, data: Training, key: Key) -> Network:
        flat, scales = self.network(data.n_items)
        weights = flat.init(key, scales).to(data.rows.items.device)
        return Network(weights, torch.zeros_like(weights), torch.zeros_like(weights))

    def epoch(self, state: Network, data: Training, key: Key) -> tuple[Network, float]:
        order = choose(data.n_users, data.n_users, key.fold("order")).to(state.weights.device)
        flat, _ = self.network(data.n_items)
        done = descend(
            [state.weights],
            state,
            self.settings.learning_rate,
            [(users.numel(), users) for users in order.split(self.settings.batch_size)],
            lambda learned, users: self.loss(flat.unpack(learned[0]), users, data, key),
        )
        return Network(done.parameters[0], done.first, done.second, done.steps), done.loss

    @abstractmethod
    def loss(self, weights: list[Tensor], users: Tensor, data: Training, key: Key) -> Tensor:
        """The loss of a batch of ``users`` [b], a scalar, with the ``weights`` of :meth:`network`."""

    @abstractmethod
    def vectors(self, weights: list[Tensor], own: Histories) -> tuple[Tensor, Tensor]:
        """The vectors of b users with the histories ``own``, and of the m items."""

    def encoded(self, weights: list[Tensor], own: Histories, dropout: Dropout) -> Tensor:
        """[b, L, d] what the encoder makes of the histories ``own``, in which the item m is a hidden one."""
        items, places, inner = weights[0], weights[1], weights[2 : 2 + len(self.encoder.shapes)]
        place = torch.arange(own.items.shape[1], device=own.items.device) + (places.shape[0] - own.counts)[:, None]
        x = items[own.items] * self.settings.embedding_dim**0.5 + places[place.clamp(max=places.shape[0] - 1)]
        return self.encoder(inner, dropout(x), own.there, dropout)

    def dropout(self, users: Tensor, key: Key) -> Dropout:
        return Dropout(self.settings.dropout, key, users)

    def serving(self, state: Network, data: Training) -> Network:
        return Network(state.weights)

    def embedding(self, state: Network, data: Training, users: Tensor) -> Embedding:
        weights = self.network(data.n_items)[0].unpack(state.weights)
        return Embedding(*self.vectors(weights, self.read(data, users)))

    def read(self, data: Training, users: Tensor) -> Histories:
        """What is read of ``users`` [b] to recommend to them."""
        return Histories.of(data, users, self.settings.max_length)

    def scoring(self, state: Network, data: Training, users: Tensor) -> Scoring:
        found = self.embedding(state, data, users)
        return Scoring.product(found.users, found.items)

    def scores(self, state: Network, data: Training, users: Tensor) -> Tensor:
        found = self.embedding(state, data, users)
        return found.users @ found.items.T
