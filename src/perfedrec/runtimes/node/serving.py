"""Recommending on a node, without anybody else: the served model, and what the node's users keep to themselves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Algorithm, Rows
from perfedrec.runtimes.node.store import Store


def serving_view(algorithm: Algorithm[Any, Any, Any], state: Any, users: Tensor) -> Any:
    """What a node of ``users`` [B] needs to recommend, for :meth:`Store.receive`: their view of the state that is
    served, with one more row, for newcomers."""
    return algorithm.view(algorithm.serving(state), torch.cat([users, users.new_tensor([NEWCOMER])]))


class Advisor:
    """Recommends to the users of a store, with the same scores as the simulator for the same state.

    Who has interactions that no round of training has worked on is trained for a few rounds here (see
    :attr:`perfedrec.core.types.Algorithm.catching_up`); nothing of that is stored or handed over.
    """

    def __init__(self, store: Store, algorithm: Any) -> None:
        self.store, self.algorithm = store, algorithm
        store.consult(algorithm)

    def scores(self, users: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, m] scores of all items for ``users`` [B], minus infinity for their own items; and their parts [B, m]."""
        view, rows, memory = self._given(users)
        scores = self.algorithm.scores(view, rows, memory)
        scores[rows.segments, rows.items] = -torch.inf
        return scores, self.algorithm.explain(view, rows, memory)

    def _given(self, users: Tensor) -> tuple[Any, Rows, Any]:
        rows, _ = self.store.rows(users)
        view = self.store.view(self.algorithm.Received, users)
        memory, known, changed = self.store.recall_all(users)
        if not bool(known.all()):
            memory = chosen(known, rows, memory, self.algorithm.arrive(view, rows, memory))
        if bool((changed | ~known).any()):
            memory = chosen(known & ~changed, rows, memory, self._caught_up(view, rows, memory))
        return view, rows, memory

    def _caught_up(self, view: Any, rows: Rows, memory: Any) -> Any:
        alone, key = self.algorithm.unprotected(), Key(self.store.seed).fold("alone")
        for number in range(self.algorithm.catching_up):
            _, memory = alone.client("train", view, rows, memory, key.fold(number))
        return memory


def chosen(first: Tensor, rows: Rows, a: Any, b: Any) -> Any:
    """The memories ``a`` of those users for whom ``first`` [B] holds, and ``b`` of the others."""

    def pick(name: str, per_row: bool) -> Tensor:
        left, right = getattr(a, name), getattr(b, name)
        which = first[rows.segments] if per_row else first
        return torch.where(which.view(-1, *[1] * (left.dim() - 1)), left, right)

    return type(a)(**{field.name: pick(field.name, field.metadata.get("per") == "row") for field in fields(a)})
