"""The users of a simulation: their private rows and client states in flat arrays, read and written block by block."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Generic, Protocol

import torch
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, block_rows


class Users(Protocol[C]):
    """Access to users' rows and client states, as far as a round needs it."""

    n_items: int

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""

    def load_client_states(self, users: Tensor, positions: Tensor) -> C:
        """The client states of ``users`` [B], as a record."""

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C) -> None:
        """Store the client states of ``users`` [B]."""


class Population(Generic[C]):
    """All users' interactions (``offsets`` [n + 1], ``items``), ``attributes`` [n, F] and client states.

    It stands for the clients' own devices: an algorithm sees only the block that it asks for.
    """

    client_state: C
    """The client states of all users; :meth:`init_clients` sets them."""

    def __init__(self, offsets: Tensor, items: Tensor, n_items: int, attributes: Tensor | None = None) -> None:
        self.offsets, self.items, self.n_items, self.attributes = offsets, items, n_items, attributes

    @property
    def n_users(self) -> int:
        return self.offsets.numel() - 1

    def everyone(self) -> Tensor:
        """[n] all users."""
        return torch.arange(self.n_users, device=self.offsets.device)

    def n_rows(self, users: Tensor) -> int:
        """The number of interactions of ``users`` [B]."""
        return int((self.offsets[users + 1] - self.offsets[users]).sum())

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""
        return block_rows(self.offsets, self.items, users, self.attributes)

    def init_clients(self, algorithm: Algorithm[S, B, C], seed: int) -> None:
        """Set every user's first client state."""
        rows, _ = self.rows(self.everyone())
        self.client_state = algorithm.init_clients(rows, Key(seed).fold("memory"))

    def load_client_states(self, users: Tensor, positions: Tensor) -> C:
        """The client states of ``users`` [B], as a record."""
        parts = {
            name: getattr(self.client_state, name).index_select(0, positions if per_row else users)
            for name, per_row in self._layout()
        }
        return replace(self.client_state, **parts)

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C) -> None:
        """Store the client states of ``users`` [B]."""
        for name, per_row in self._layout():
            getattr(self.client_state, name).index_copy_(
                0, positions if per_row else users, getattr(client_state, name)
            )

    def _layout(self) -> list[tuple[str, bool]]:
        """Each field of the client state, and whether it has one row per interaction."""
        return [(field.name, field.metadata.get("per") == "row") for field in fields(self.client_state)]
