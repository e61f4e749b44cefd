"""The users of a simulation: their private rows and client states in flat arrays, read and written block by block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import cached_property
from math import prod
from typing import Any, Generic, Protocol, cast

import torch
from torch import Tensor

from perfedrec.core import mapped
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.errors import CheckpointError
from perfedrec.core.keys import Key
from perfedrec.core.lookup import Changed, Unread
from perfedrec.core.records import Segment, old_names
from perfedrec.core.types import Rows, block_rows
from perfedrec.runtimes.columns import Columns

LAZY_FROM = 1 << 28
"""Bytes of client states from which they are made one by one, when their users first change them. Below, all are made
at the start, so that rounds need not make them."""

USERS_OF = "users of "
"""Stored beside a field of client states: the users [k] whose values it holds, where these are not all users."""


class Users(Protocol[C]):
    """Access to users' rows and client states, as far as a round needs it."""

    n_items: int

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and the positions [R] of these rows among all interactions."""

    def load_client_states(self, users: Tensor, positions: Tensor, unread: Collection[str] = ()) -> C:
        """The client states of ``users`` [B], as a record. Fields that are to stay ``unread`` may be
        :class:`~perfedrec.core.lookup.Unread`."""

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        """Store the client states of ``users`` [B]. Fields that are the very tensors of the state ``before`` need not
        be stored. Where there was :class:`~perfedrec.core.lookup.Unread` before, there may be
        :class:`~perfedrec.core.lookup.Changed`."""


class Population(Generic[C]):
    """All users' interactions (``offsets`` [n + 1], ``items``), ``attributes`` [n, F] and client states.

    It stands for the clients' own devices: an algorithm sees only the block that it asks for.

    Where there are many users, a client state is made when its user first changes it. Until then it is the first state,
    which follows from the user's key. The arrays have room for all users. They are files that are mapped into memory
    and take disk only where they are written (:mod:`perfedrec.core.mapped`).
    """

    def __init__(self, offsets: Tensor, items: Tensor, n_items: int, attributes: Tensor | None = None) -> None:
        self.offsets, self.items, self.n_items, self.attributes = offsets, items, n_items, attributes
        self._segments: tuple[Segment, ...] = ()

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
        vars(self).pop("_columns", None)
        self._segments = ()

    def _rows_at(self, places: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the users at ``places`` [B] in the arrays, and the positions [R] of these rows."""
        rows, positions = block_rows(self.offsets, self.items, places, self.attributes)
        return replace(rows, users=self._numbers(places)), positions

    def _numbers(self, places: Tensor) -> Tensor:
        """[B] the numbers of the users at ``places`` [B] in the arrays, from which their draws follow."""
        return places

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of the array of a field."""
        size = self.items.numel() if self._layout()[name] else self.n_users
        return (size, *getattr(self._like, name).shape[1:])

    @cached_property
    def _columns(self) -> Columns:
        """The columns of client states, at first with what is in the segments, and with the first states of all users
        where these are few."""
        sizes = [prod(self._shape(name)) * getattr(self._like, name).element_size() for name in self._layout()]
        whole, like = sum(sizes) < LAZY_FROM, self._like
        if whole:
            everyone = torch.arange(self.n_users, device=self.offsets.device)
            like = self._algorithm.init_clients(self._rows_at(everyone)[0], self._key)
        columns = Columns(self._fields(like), self._layout(), self.offsets, whole)
        for segment in self._segments:
            self._put(columns, segment.tensors)
        for column in columns.fields.values():  # what is in the segments, or follows from the users' keys
            column.changed[: column.taken] = False
        return columns

    def with_client_states(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> Population[C]:
        """The same users with the client states that :meth:`stored` or :meth:`segments` returned."""
        other: Population[C] = Population(self.offsets, self.items, self.n_items, self.attributes)
        other._algorithm, other._key, other._like = self._algorithm, self._key, self._like
        if isinstance(stored, tuple):
            other._segments = stored  # written to columns when a state is asked for
        else:
            other.restore(stored)
        return other

    def segments(self) -> tuple[Segment, ...]:
        """What was written of the client states, in the order of time. What changed since the last call is a segment of
        its own, so that the cost of a call, and of storing what it returns, is that of the changes.

        Each segment is as :meth:`stored` returns it. Where later segments have overwritten half of all, they become
        one.
        """
        if "_columns" in vars(self):  # else nothing has changed
            changes = {name: column.changes() for name, column in self._columns.fields.items()}
            if segment := _named({name: found for name, found in changes.items() if found is not None}):
                filed = {name: mapped.set_aside(each, "client states") for name, each in segment.items()}
                self._segments = (*self._segments, Segment(filed))
            kept = sum(_size(each.tensors) for each in self._segments)
            if len(self._segments) > 1 and kept > 2 * sum(each.size for each in self._columns.fields.values()):
                self._segments = (
                    Segment({name: mapped.set_aside(each, "client states") for name, each in self.stored().items()}),
                )
        return self._segments

    def stored(self) -> dict[str, Tensor]:
        """What was written of the client states: for each field its values, user by user, and the users [k] (see
        :data:`USERS_OF`) where they are not all. It may share memory with the population."""
        return _named({name: column.stored() for name, column in self._columns.fields.items() if column.taken})

    def restore(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> None:
        """Continue with the client states that :meth:`stored` or :meth:`segments` returned, here or in an older
        version.

        Raises :class:`CheckpointError` where they are not those of these users and this method.
        """
        vars(self).pop("_columns", None)
        self._segments = stored if isinstance(stored, tuple) else ()
        columns = self._columns
        if not isinstance(stored, tuple):
            self._put(columns, stored)

    def let_go(self) -> None:
        """Let go of all client states."""
        vars(self).pop("_columns", None)
        self._segments = ()

    def _put(self, columns: Columns, stored: Mapping[str, Tensor]) -> None:
        """Write what was ``stored`` to the columns."""
        before = {new: old for old, new in old_names(type(cast(Any, self._like))).items()}
        everyone = torch.arange(self.n_users, device=self.offsets.device)
        for name, column in columns.fields.items():
            values = stored.get(name, stored.get(before.get(name, name)))
            if values is None:
                continue
            users = stored.get(USERS_OF + name, everyone).to(everyone.device)
            size = users.numel() if column.starts is None else self.n_rows(users)
            expected = [size, *column.values.shape[1:]]
            if list(values.shape) != expected or values.dtype != column.values.dtype:
                raise CheckpointError(
                    f"the stored client states have {name} of {list(values.shape)}, {values.dtype}; expected "
                    f"{expected}, {column.values.dtype}"
                )
            places = columns.take(name, users, columns.places(users)[name])
            column.put(places, values.to(everyone.device))

    def written(self, users: Tensor) -> dict[str, Tensor]:
        """What was written of the client states of ``users`` [B], as a copy: for each field its values, and the users
        who have written it (see :data:`USERS_OF`), both in the order of ``users``."""
        found: dict[str, Tensor] = {}
        for name, places in self._columns.places(users).items():
            known = places >= 0
            if bool(known.any()):
                found[name] = self._columns.fields[name].get(places[known])
                found[USERS_OF + name] = users[known]
        return found

    def write(self, written: Mapping[str, Tensor]) -> None:
        """Write what :meth:`written` returned, here or elsewhere."""
        self._put(self._columns, written)

    def load_client_states(self, users: Tensor, positions: Tensor, unread: Collection[str] = ()) -> C:
        """The client states of ``users`` [B], as a record. Where all users have written, fields ``unread`` are
        :class:`~perfedrec.core.lookup.Unread`."""
        columns = self._columns
        if columns.whole:
            late = {name: Unread(columns.fields[name].values, positions) for name in unread}
            own = {name: each.get(users, positions) for name, each in columns.fields.items() if name not in late}
            return self._record({**own, **late})
        first, parts, found = None, {}, columns.places(users)
        for name, column in columns.fields.items():
            places = found[name]
            known = places >= 0
            if bool(known.all()):
                parts[name] = column.get(places)
                continue
            if first is None:
                first = self._algorithm.init_clients(self._rows_at(users)[0], self._key)
            parts[name] = value = getattr(first, name).clone()  # which counts the changes in place from 0
            if bool(known.any()):
                here = known
                if column.starts is not None:
                    here = torch.repeat_interleave(known, self.offsets[users + 1] - self.offsets[users])
                parts[name] = value.index_copy(0, here.nonzero().squeeze(1), column.get(places[known]))
        return self._record(parts)

    def _record(self, parts: Mapping[str, Tensor | Unread]) -> C:
        return cast(C, type(cast(Any, self._like))(**parts))

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        """Store the client states of ``users`` [B]. Fields that are the very tensors of the state ``before`` need not
        be stored. Of a field that was unread, what has changed is stored."""
        columns, found = self._columns, {}
        if not columns.whole:
            found = columns.places(users)
        for name, column in columns.fields.items():
            value = getattr(client_state, name)
            if isinstance(value, Unread):
                continue
            if isinstance(value, Changed):
                column.change(users, value, positions)
                continue
            if before is not None and value is getattr(before, name) and not value._version:  # nor changed in place
                continue
            if columns.whole:
                column.put(users, value, positions)
            else:
                column.put(columns.take(name, users, found[name]), value)

    @property
    def client_state(self) -> C:
        """The client states of all users, which are written with that. Tests and small data alone have use for it."""
        everyone = torch.arange(self.n_users, device=self.offsets.device)
        if any(column.stored()[0] is not column.values for column in self._columns.fields.values()):
            self.client_state = Population.load_client_states(self, everyone, everyone)
        return self._record({name: column.values for name, column in self._columns.fields.items()})

    @client_state.setter
    def client_state(self, record: C) -> None:
        self._like, self._segments = record, ()
        self._columns = Columns(self._fields(record), self._layout(), self.offsets, whole=True)

    def _fields(self, record: C) -> dict[str, Tensor]:
        return {name: getattr(record, name) for name in self._layout()}

    def _layout(self) -> dict[str, bool]:
        """Each field of the client state, and whether it has one row per interaction."""
        return {field.name: field.metadata.get("per") == "row" for field in fields(cast(Any, self._like))}


def _named(found: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """The values of each field under its name, and the users who have them beside it, where these are not all."""
    values = {name: each for name, (each, _) in found.items()}
    return values | {USERS_OF + name: users for name, (_, users) in found.items() if users is not None}


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all ``tensors``."""
    return sum(each.nbytes for each in tensors.values())
