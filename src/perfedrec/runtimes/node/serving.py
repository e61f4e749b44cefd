"""Recommending on a node, without a network: from the served model, and from the client states of the node's users."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, cast

import torch
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.types import NEWCOMER, Rows
from perfedrec.runtimes.new_users import finetuned
from perfedrec.runtimes.node.rounds import fields_per, tensors_of
from perfedrec.runtimes.node.store import Store


def serving_broadcast(algorithm: Algorithm[S, B, C], state: S, users: Tensor) -> B:
    """What a node of ``users`` [B] needs in order to recommend, for :meth:`Store.receive`: their broadcast of the
    served state, with one more row, for new users."""
    return algorithm.broadcast(algorithm.serving(state), torch.cat([users, users.new_tensor([NEWCOMER])]))


class LocalRecommender(Generic[B, C]):
    """Recommends to the users of a store, with the scores that the simulator computes for the same state.

    A user with interactions that no round of training has used is fine-tuned on the node for a few rounds (see
    :attr:`perfedrec.core.algorithm.Algorithm.finetune_rounds`). The result is neither stored nor sent.

    Raises :class:`StoreError` if the node has received no model.
    """

    def __init__(self, store: Store, algorithm: Algorithm[Any, B, C]) -> None:
        self.store, self.algorithm = store, algorithm
        store.use_served_run(algorithm)

    def scores(self, users: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, m] scores of all items for ``users`` [B], minus infinity for the items that a user already has; and the
        named parts [B, m] that the scores are the sum of."""
        broadcast, rows, client_state = self._prepare(users)
        scores = self.algorithm.scores(broadcast, rows, client_state)
        scores[rows.segments, rows.items] = -torch.inf
        return scores, self.algorithm.explain(broadcast, rows, client_state)

    def item_vectors(self) -> Tensor | None:
        """[m, d] the vectors of items in the shared model, or the table of items that scores are computed from;
        ``None`` for a method without either."""
        nobody = torch.zeros(0, dtype=torch.int64)
        broadcast, (rows, _) = self.store.broadcast(self.algorithm.broadcast_type, nobody), self.store.rows(nobody)
        found = self.algorithm.embedding(broadcast, rows, self.store.find_client_states(nobody).client_state)
        table: Tensor | None = getattr(broadcast, "items", None) if found is None else found.items
        return table

    def _prepare(self, users: Tensor) -> tuple[B, Rows, C]:
        """What ``users`` [B] received, their rows, and the client states to recommend by."""
        rows, _ = self.store.rows(users)
        broadcast = self.store.broadcast(self.algorithm.broadcast_type, users)
        found = self.store.find_client_states(users)
        client_state: C = found.client_state
        if not bool(found.stored.all()):
            started = self.algorithm.init_new_user(broadcast, rows, client_state)
            client_state = select_states(found.stored, rows, client_state, started)
        if bool((found.outdated | ~found.stored).any()):
            tuned = finetuned(self.algorithm, broadcast, rows, client_state, self.store.seed)
            client_state = select_states(found.stored & ~found.outdated, rows, client_state, tuned)
        return broadcast, rows, client_state


def select_states(first: Tensor, rows: Rows, a: C, b: C) -> C:
    """The client states ``a`` of the users for whom ``first`` [B] is true, and ``b`` of the others."""
    per_row = fields_per(a, "row")

    def select(name: str, left: Tensor, right: Tensor) -> Tensor:
        which = first[rows.segments] if name in per_row else first
        return torch.where(which.view(-1, *[1] * (left.dim() - 1)), left, right)

    others = tensors_of(b)
    chosen = {name: select(name, tensor, others[name]) for name, tensor in tensors_of(a).items()}
    return cast(C, replace(cast(Any, a), **chosen))
