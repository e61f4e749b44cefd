"""The users of a simulation: their private rows and memories in flat arrays, cut into blocks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, block_rows


class Users(Protocol):
    """Where users' rows and memories are: what a round needs of it."""

    n_items: int

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""

    def load_client_states(self, users: Tensor, positions: Tensor) -> Any:
        """The memories of ``users`` [B] as a record of their own."""

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: Any) -> None:
        """Write the memories of ``users`` [B] back."""


class Population:
    """All users' interactions (``offsets`` [n + 1], ``items``), ``attributes`` [n, F] and memories.

    The store plays the part of the clients' own devices: an algorithm only ever sees the block it asks for.
    """

    def __init__(self, offsets: Tensor, items: Tensor, n_items: int, attributes: Tensor | None = None) -> None:
        self.offsets, self.items, self.n_items, self.attributes = offsets, items, n_items, attributes
        self.client_state: Any = None

    @property
    def n_users(self) -> int:
        return self.offsets.numel() - 1

    def everyone(self) -> Tensor:
        """[n] all users."""
        return torch.arange(self.n_users, device=self.offsets.device)

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""
        return block_rows(self.offsets, self.items, users, self.attributes)

    def init_clients(self, algorithm: Algorithm[Any, Any, Any], seed: int) -> None:
        """Give every user the memory it starts with."""
        rows, _ = self.rows(self.everyone())
        self.client_state = algorithm.init_clients(rows, Key(seed).fold("memory"))

    def load_client_states(self, users: Tensor, positions: Tensor) -> Any:
        """The memories of ``users`` [B] as a record of their own."""
        parts = {
            name: getattr(self.client_state, name).index_select(0, positions if per_row else users)
            for name, per_row in self._layout()
        }
        return type(self.client_state)(**parts)

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: Any) -> None:
        """Write the memories of ``users`` [B] back."""
        for name, per_row in self._layout():
            getattr(self.client_state, name).index_copy_(
                0, positions if per_row else users, getattr(client_state, name)
            )

    def _layout(self) -> list[tuple[str, bool]]:
        return [(field.name, field.metadata.get("per") == "row") for field in fields(self.client_state)]
