"""Recommending on a node, without anybody else: the served model, and what the node's users keep to themselves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Rows
from perfedrec.runtimes.node.store import Store


def serving_broadcast(algorithm: Algorithm[Any, Any, Any], state: Any, users: Tensor) -> Any:
    """What a node of ``users`` [B] needs to recommend, for :meth:`Store.receive`: their view of the state that is
    served, with one more row, for newcomers."""
    return algorithm.broadcast(algorithm.serving(state), torch.cat([users, users.new_tensor([NEWCOMER])]))


class LocalRecommender:
    """Recommends to the users of a store, with the same scores as the simulator for the same state.

    Who has interactions that no round of training has worked on is trained for a few rounds here (see
    :attr:`perfedrec.core.types.Algorithm.catching_up`); nothing of that is stored or handed over.
    """

    def __init__(self, store: Store, algorithm: Any) -> None:
        self.store, self.algorithm = store, algorithm
        store.consult(algorithm)

    def scores(self, users: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, m] scores of all items for ``users`` [B], minus infinity for their own items; and their parts [B, m]."""
        broadcast, rows, client_state = self._given(users)
        scores = self.algorithm.scores(broadcast, rows, client_state)
        scores[rows.segments, rows.items] = -torch.inf
        return scores, self.algorithm.explain(broadcast, rows, client_state)

    def _given(self, users: Tensor) -> tuple[Any, Rows, Any]:
        rows, _ = self.store.rows(users)
        broadcast = self.store.broadcast(self.algorithm.broadcast_type, users)
        client_state, known, changed = self.store.recall_all(users)
        if not bool(known.all()):
            client_state = chosen(
                known, rows, client_state, self.algorithm.init_new_user(broadcast, rows, client_state)
            )
        if bool((changed | ~known).any()):
            client_state = chosen(known & ~changed, rows, client_state, self._caught_up(broadcast, rows, client_state))
        return broadcast, rows, client_state

    def _caught_up(self, broadcast: Any, rows: Rows, client_state: Any) -> Any:
        alone, key = self.algorithm.without_privacy(), Key(self.store.seed).fold("alone")
        for number in range(self.algorithm.finetune_rounds):
            _, client_state = alone.client("train", broadcast, rows, client_state, key.fold(number))
        return client_state


def chosen(first: Tensor, rows: Rows, a: Any, b: Any) -> Any:
    """The memories ``a`` of those users for whom ``first`` [B] holds, and ``b`` of the others."""

    def pick(name: str, per_row: bool) -> Tensor:
        left, right = getattr(a, name), getattr(b, name)
        which = first[rows.segments] if per_row else first
        return torch.where(which.view(-1, *[1] * (left.dim() - 1)), left, right)

    return type(a)(**{field.name: pick(field.name, field.metadata.get("per") == "row") for field in fields(a)})
