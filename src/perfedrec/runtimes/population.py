"""The users of a simulation: their private rows and client states in flat arrays, read and written block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from math import prod
from typing import Any, Generic, Protocol, cast

import torch
from torch import Tensor

from perfedrec.core import mapped
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.errors import CheckpointError
from perfedrec.core.keys import Key
from perfedrec.core.records import old_names
from perfedrec.core.types import Rows, block_rows

LAZY_FROM = 1 << 30
"""Bytes of client states from which they are made one by one, when their users first change them. Below, all are made
at the start, so that rounds need not make them."""

USERS_OF = "users of "
"""Stored beside a field of client states: the users [k] whose values it holds, where these are not all users."""


class Users(Protocol[C]):
    """Access to users' rows and client states, as far as a round needs it."""

    n_items: int

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""

    def load_client_states(self, users: Tensor, positions: Tensor) -> C:
        """The client states of ``users`` [B], as a record."""

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        """Store the client states of ``users`` [B]. Fields that are the very tensors of the state ``before`` need not
        be stored."""


class Population(Generic[C]):
    """All users' interactions (``offsets`` [n + 1], ``items``), ``attributes`` [n, F] and client states.

    It stands for the clients' own devices: an algorithm sees only the block that it asks for.

    Where there are many users, a client state is made when its user first changes it. Until then it is the first state,
    which follows from the user's key. The arrays have room for all users. They are files that are mapped into memory
    and take disk only where they are written (:mod:`perfedrec.core.mapped`).
    """

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

    # --- client states ---

    def init_clients(self, algorithm: Algorithm[S, B, C], seed: int) -> None:
        """Let every user have its first client state."""
        self._algorithm, self._key = algorithm, Key(seed).fold("memory")
        first, _ = self._rows_at(torch.arange(min(self.n_users, 1), device=self.offsets.device))
        self._like = algorithm.init_clients(first, self._key)
        sizes = [prod(self._shape(name)) * getattr(self._like, name).element_size() for name, _ in self._layout()]
        if sum(sizes) < LAZY_FROM:
            self.client_state = algorithm.init_clients(self.rows(self.everyone())[0], self._key)
        else:
            self._create()

    def _rows_at(self, places: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the users at ``places`` [B] in the arrays, and the positions [R] of these rows."""
        rows, positions = block_rows(self.offsets, self.items, places, self.attributes)
        return replace(rows, users=self._numbers(places)), positions

    def _numbers(self, places: Tensor) -> Tensor:
        """[B] the numbers of the users at ``places`` [B] in the arrays, from which their draws follow."""
        return places

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of the array of a field."""
        size = self.items.numel() if dict(self._layout())[name] else self.n_users
        return (size, *getattr(self._like, name).shape[1:])

    def _create(self) -> None:
        """Room for all users' states, none of which is written."""
        self._is_mapped = self.offsets.device.type == "cpu"
        self._arrays: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}
        for name, _ in self._layout():
            like = getattr(self._like, name)
            self._arrays[name] = _zeros(self._shape(name), like)
            self._written[name] = torch.zeros(self.n_users, dtype=torch.bool, device=like.device)

    def with_client_states(self, stored: Mapping[str, Tensor]) -> Population[C]:
        """The same users with the client states that :meth:`stored` returned."""
        other: Population[C] = Population(self.offsets, self.items, self.n_items, self.attributes)
        other._algorithm, other._key, other._like = self._algorithm, self._key, self._like
        other.restore(stored)
        return other

    def stored(self) -> dict[str, Tensor]:
        """What was written of the client states: for each field its values, user by user, and the users [k] (see
        :data:`USERS_OF`) where they are not all. It may share memory with the population."""
        found = {}
        for name, per_row in self._layout():
            written = self._written[name]
            if bool(written.all()):
                found[name] = self._arrays[name]
            elif bool(written.any()):
                users = written.nonzero().squeeze(1)
                places = self._rows_at(users)[1] if per_row else users
                found[name], found[USERS_OF + name] = self._arrays[name].index_select(0, places), users
        return found

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Continue with the client states that :meth:`stored` returned, here or in an older version.

        Raises :class:`CheckpointError` where they are not those of these users and this method.
        """
        self._create()
        before = {new: old for old, new in old_names(type(cast(Any, self._like))).items()}
        for name, per_row in self._layout():
            values = stored.get(name, stored.get(before.get(name, name)))
            if values is None:
                continue
            array, users = self._arrays[name], stored.get(USERS_OF + name)
            users = torch.arange(self.n_users) if users is None else users
            users = users.to(array.device)
            places = self._rows_at(users)[1] if per_row else users
            if values.shape != (places.numel(), *array.shape[1:]) or values.dtype != array.dtype:
                raise CheckpointError(
                    f"the stored client states have {name} of {list(values.shape)}, {values.dtype}; expected "
                    f"{[places.numel(), *array.shape[1:]]}, {array.dtype}"
                )
            array.index_copy_(0, places, values.to(array.device))
            self._written[name][users] = True

    def load_client_states(self, users: Tensor, positions: Tensor) -> C:
        """The client states of ``users`` [B], as a record."""
        first, parts = None, {}
        for name, per_row in self._layout():
            places, known = positions if per_row else users, self._written[name][users]
            if bool(known.all()):
                parts[name] = self._arrays[name].index_select(0, places)
                continue
            if first is None:
                first = self._algorithm.init_clients(self._rows_at(users)[0], self._key)
            parts[name] = value = getattr(first, name).clone()  # which counts the changes in place from 0
            if bool(known.any()):
                if per_row:
                    known = torch.repeat_interleave(known, self.offsets[users + 1] - self.offsets[users])
                here = known.nonzero().squeeze(1)
                parts[name] = value.index_copy(0, here, self._arrays[name].index_select(0, places[here]))
        return cast(C, replace(cast(Any, self._like), **parts))

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        """Store the client states of ``users`` [B], but for the fields that are the very tensors of ``before``."""
        for name, per_row in self._layout():
            value = getattr(client_state, name)
            if before is None or value is not getattr(before, name) or value._version:  # changed in place
                if self._is_mapped:
                    mapped.check_room(2 * value.numel() * value.element_size(), "client states")
                self._arrays[name].index_copy_(0, positions if per_row else users, value)
                self._written[name][users] = True

    @property
    def client_state(self) -> C:
        """The client states of all users, which are written with that. Tests and small data alone have use for it."""
        places = torch.arange(self.n_users, device=self.offsets.device)
        positions = torch.arange(self.items.numel(), device=places.device)
        if not all(bool(each.all()) for each in self._written.values()):
            Population.save_client_states(
                self, places, positions, Population.load_client_states(self, places, positions)
            )
        return cast(C, replace(cast(Any, self._like), **self._arrays))

    @client_state.setter
    def client_state(self, record: C) -> None:
        self._like, self._is_mapped = record, False
        self._arrays = {name: getattr(record, name) for name, _ in self._layout()}
        everyone = torch.ones(self.n_users, dtype=torch.bool, device=self.offsets.device)
        self._written = {name: everyone.clone() for name in self._arrays}

    def _layout(self) -> list[tuple[str, bool]]:
        """Each field of the client state, and whether it has one row per interaction."""
        return [(field.name, field.metadata.get("per") == "row") for field in fields(cast(Any, self._like))]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type of ``like``. Many of them are a file, which takes disk only where it is written."""
    kind, size = like.dtype, prod(shape) * like.element_size()
    if like.device.type != "cpu" or size <= mapped.IN_MEMORY:
        return torch.zeros(shape, dtype=kind, device=like.device)
    return torch.frombuffer(mapped.sparse(size, "client states"), dtype=kind).view(shape)
