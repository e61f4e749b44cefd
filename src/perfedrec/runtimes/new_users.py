"""New users, who were not in training: they are served with the shared model and a part of their own.

Their own part starts from the shared model and is trained for a few rounds on their own interactions, where these are.
The result is neither stored nor sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Embedding, Rows
from perfedrec.evaluation import RandomOrder, Recommender
from perfedrec.runtimes.population import Population


def finetuned(algorithm: Algorithm[Any, B, C], broadcast: B, rows: Rows, client_state: C, seed: int) -> C:
    """The client states after local training, without decoys, masking and noise: no update leaves the client.

    It takes :attr:`perfedrec.core.algorithm.Algorithm.finetune_rounds` rounds; its draws follow from ``seed``.
    """
    local, key = algorithm.without_privacy(), Key(seed).fold("alone")
    for number in range(algorithm.finetune_rounds):
        _, client_state = local.client("train", broadcast, rows, client_state, key.fold(number))
    return client_state


class NewUserRecommender(Recommender, Generic[S, B, C]):
    """A served state alone: it recommends to the users of a ``population`` as to new users.

    The draws of their local training follow from ``seed``; ``order`` is that of :class:`Recommender`.
    """

    def __init__(
        self,
        algorithm: Algorithm[S, B, C],
        state: S,
        population: Population[C],
        seed: int,
        order: RandomOrder | None = None,
    ) -> None:
        super().__init__(population.offsets, population.items, population.n_items, order)
        self.algorithm, self.state, self.population, self.seed = algorithm, state, population, seed

    def raw_scores(self, users: Tensor) -> Tensor:
        return self.algorithm.scores(*self._given(users))

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return self.algorithm.explain(*self._given(users))

    def for_new_users(
        self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None
    ) -> NewUserRecommender[S, B, C]:
        others = unknown(self.population, offsets, items)
        return NewUserRecommender(self.algorithm, self.state, others, self.seed, order)

    def embedding(self, users: Tensor) -> Embedding | None:
        return self.algorithm.embedding(*self._given(users))

    def _given(self, users: Tensor) -> tuple[B, Rows, C]:
        """Broadcast, rows and client states of ``users`` [B]."""
        rows, _ = self.population.rows(users)
        broadcast = self.algorithm.broadcast(self.state, torch.full_like(users, NEWCOMER))
        first = self.algorithm.init_clients(rows, Key(self.seed).fold("memory"))
        started = self.algorithm.init_new_user(broadcast, rows, first)
        return broadcast, rows, finetuned(self.algorithm, broadcast, rows, started, self.seed)

    def records(self) -> dict[str, Any]:
        return {"state": self.state}

    def with_records(self, records: Mapping[str, Any]) -> NewUserRecommender[S, B, C]:
        return NewUserRecommender(self.algorithm, records["state"], self.population, self.seed, self.order)


class Unnumbered(Population[C]):
    """Users without numbers: all draw as user 0, so that what one gets depends neither on others nor on the place."""

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        rows, positions = super().rows(users)
        return replace(rows, users=torch.zeros_like(users)), positions


def unknown(like: Population[C], offsets: Tensor, items: Tensor) -> Population[C]:
    """Users with the interactions ``offsets`` [n + 1] and ``items``, who are described ``like`` others. Attributes of
    new users are not known, and are 0."""
    size = offsets.numel() - 1
    attributes = None if like.attributes is None else like.attributes.new_zeros(size, like.attributes.shape[1])
    return Unnumbered(offsets, items, like.n_items, attributes)
