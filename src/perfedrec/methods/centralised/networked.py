"""Methods that learn vectors of users and items, and the weights of a network that works on them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, ProductMethod, Vectors, batches
from perfedrec.nn.flat import Flat


@dataclass(frozen=True)
class NetworkVectors(Vectors):
    """Vectors, and the ``weights`` [w, d] of a network: its flat weights in rows as long as a vector, the last one
    filled up with zeros. Adam's moments are those of users, items and weights, [n + m + w, d]."""

    weights: Tensor | None = None


@dataclass(frozen=True)
class Learned:
    """What a step of training changes: vectors of ``users`` [n, d] and ``items`` [m, d], and the network's ``weights``,
    each in its shape."""

    users: Tensor
    items: Tensor
    weights: list[Tensor]


class NetworkMethod(ProductMethod):
    """Trains :meth:`loss` with Adam over batches of interactions, each with one negative. Scores are inner products of
    the vectors of :meth:`encode`. Both receive the weights of the :meth:`network` as well."""

    @abstractmethod
    def network(self) -> tuple[Flat, list[float]]:
        """The shapes of the weights, and the standard deviation of the first weights of each (0 for biases)."""

    @abstractmethod
    def encode(self, learned: Learned, data: Training) -> tuple[Tensor, Tensor]:
        """Final vectors of users and of items, [n, e] and [m, e], of any length e."""

    @abstractmethod
    def loss(self, learned: Learned, batch: Batch, data: Training) -> Tensor:
        """The loss of a batch, a scalar."""

    def after(self, learned: Learned, batch: Batch, data: Training) -> None:
        """Called after the step of each batch, with what it led to, detached."""

    def learned(self, users: Tensor, items: Tensor, rows: Tensor) -> Learned:
        """The weights in their shapes, from their ``rows`` [w, d]."""
        flat, _ = self.network()
        return Learned(users, items, flat.unpack(rows.flatten()[: flat.size]))

    def init(self, data: Training, key: Key) -> NetworkVectors:
        start, d = super().init(data, key), self.settings.embedding_dim
        flat, scales = self.network()
        weights = flat.init(key.fold("network"), scales).to(start.users.device)
        rows = functional.pad(weights, (0, -flat.size % d)).view(-1, d)
        zeros = torch.zeros(data.n_users + data.n_items + rows.shape[0], d, device=rows.device)
        return NetworkVectors(start.users, start.items, zeros, zeros.clone(), weights=rows)

    def epoch(self, state: NetworkVectors, data: Training, key: Key) -> tuple[NetworkVectors, float]:
        assert state.weights is not None
        self.begin(state.users, state.items, data, key.fold("epoch"))
        parts = [(batch.users.numel(), batch) for batch in batches(data, self.settings.batch_size, key)]
        done = descend(
            [state.users, state.items, state.weights],
            state,
            self.settings.step_of_epoch(state.steps, len(parts)),
            parts,
            lambda leaves, batch: self.loss(self.learned(*leaves), batch, data),
            lambda leaves, batch: self.after(self.learned(*leaves), batch, data),
        )
        users, items, rows = done.parameters
        after = replace(state, users=users, items=items, weights=rows, first=done.first, second=done.second)
        return replace(after, steps=done.steps), done.loss

    def serving(self, state: NetworkVectors, data: Training) -> Vectors:
        assert state.weights is not None
        return Vectors(*self.encode(self.learned(state.users, state.items, state.weights), data))
