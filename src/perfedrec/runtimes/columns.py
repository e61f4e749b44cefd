"""Client states in flat arrays that grow with the users who have written, and not with all users."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from perfedrec.core import mapped, memory
from perfedrec.core.lookup import Changed, Unread, put, take
from perfedrec.core.types import ranges


class Column:
    """One field of the client states of n users: the values of those who have written it, one after the other.

    ``like`` is a value of the field, with a row per user or per interaction. ``offsets`` [n + 1] are where each user's
    interactions begin and end; ``None`` for a field with one row per user. Where there are many values they are a file,
    which takes disk only as far as it is filled (:mod:`perfedrec.core.mapped`): a round writes its users' new states to
    its end, whatever their numbers.
    """

    def __init__(self, n_users: int, like: Tensor, offsets: Tensor | None, values: Tensor | None = None) -> None:
        self.offsets, self.n_users, device = offsets, n_users, like.device
        size = n_users if offsets is None else int(offsets[-1])
        # Users who share memory (torch.Tensor.expand) would write to each other's states.
        self.values = zeros((size, *like.shape[1:]), like) if values is None else values.contiguous()
        self.users = _room(n_users, torch.int64, device)
        """[n] the users who have written, in the order of their places."""
        self.starts = None if offsets is None else _room(n_users + 1, torch.int64, device)
        """[n + 1] where the rows at each place begin."""
        self.changed = _room(n_users, torch.bool, device)
        """[n] the places that were written since :meth:`changes` was asked last."""
        self.taken = 0
        if values is not None:
            self.changed.fill_(True)
            self.take(torch.arange(n_users, device=device))

    @property
    def size(self) -> int:
        """The bytes of what was written."""
        rows = self.taken if self.starts is None else int(self.starts[self.taken])
        return rows * prod(self.values.shape[1:]) * self.values.element_size()

    def take(self, users: Tensor) -> Tensor:
        """[B] places for ``users`` [B], who have none and occur once each."""
        places = torch.arange(self.taken, self.taken + users.numel(), device=users.device)
        if self.starts is not None and self.offsets is not None:
            ends = (self.offsets[users + 1] - self.offsets[users]).cumsum(0) + self.starts[self.taken]
            self.starts[self.taken + 1 : self.taken + 1 + users.numel()] = ends
        self.users[self.taken : self.taken + users.numel()] = users
        self.taken += users.numel()
        return places

    def rows(self, places: Tensor, positions: Tensor | None = None) -> Tensor:
        """The rows of the users at ``places`` [B]: [B], or [R] where a user has a row per interaction."""
        if self.starts is None:
            return places
        if positions is not None:
            return positions
        starts = self.starts[places]
        return ranges(starts, self.starts[places + 1] - starts)[2]

    def get(self, places: Tensor, positions: Tensor | None = None) -> Tensor:
        """The values of the users at ``places`` [B]. Where all have written, in the order of their numbers,
        ``positions`` [R] are those of their interactions, which need not be found again."""
        return take(self.values, self.rows(places, positions))

    def put(self, places: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Write the values of the users at ``places`` [B], like :meth:`get`. Raises :class:`ConfigError` where the disk
        is full."""
        self._check_room(values.nbytes)
        put(self.values, self.rows(places, positions), values)
        put(self.changed, places, True)

    def change(self, places: Tensor, changed: Changed, positions: Tensor) -> None:
        """Write what ``changed`` of the rows at ``positions`` [R] of the users at ``places`` [B], like :meth:`put`."""
        self._check_room(changed.values.nbytes)
        changed.write(Unread(self.values, positions))
        put(self.changed, places, True)

    def _check_room(self, size: int) -> None:
        if self.values.is_cpu and self.values.nbytes > mapped.IN_MEMORY:
            mapped.check_room(size, "client states")

    def changes(self) -> tuple[Tensor, Tensor | None] | None:
        """What was written since the last call, as a copy: like :meth:`stored`. ``None`` where nothing was."""
        places = self.changed[: self.taken].nonzero().squeeze(1)
        if not places.numel():
            return None
        self.changed[places] = False
        return self.stored(places)

    def stored(self, places: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The values of all who have written, or of those at ``places`` [k], by user; and these users, ``None`` where
        they are all n. It may share memory with the column."""
        users = self.users[: self.taken] if places is None else self.users[places]
        order = users.argsort()
        found = users[order]
        everyone = found.numel() == self.n_users
        if places is None and everyone and bool((users[1:] > users[:-1]).all()):
            return self.values, None
        return self.get(order if places is None else places[order]), None if everyone else found


class Columns:
    """The fields of the client states of n users, by name. ``offsets`` [n + 1] are where their interactions begin and
    end, and ``layout`` is each field with whether it has one row per interaction. With ``whole`` all users have written
    all fields, in the order of their numbers."""

    def __init__(self, like: dict[str, Tensor], layout: dict[str, bool], offsets: Tensor, whole: bool = False) -> None:
        n_users, self.whole = offsets.numel() - 1, whole
        self.fields = {
            name: Column(n_users, value, offsets if layout[name] else None, value if whole else None)
            for name, value in like.items()
        }
        self._numbers = {name: number for number, name in enumerate(like)}
        # A user's places in all columns lie side by side, so that they are found together; 0 stands for none.
        self._places = _room(n_users * len(like), torch.int32, offsets.device).view(n_users, len(like))
        if whole:
            self._places.copy_(torch.arange(1, n_users + 1, device=offsets.device)[:, None])

    def places(self, users: Tensor) -> dict[str, Tensor]:
        """[B] the places of ``users`` [B] in each column, -1 where a user has not written."""
        found = self._places[users].to(torch.int64).sub_(1)
        return dict(zip(self._numbers, found.unbind(1), strict=True))

    def take(self, name: str, users: Tensor, places: Tensor) -> Tensor:
        """The ``places`` [B] of ``users`` [B] in a column, with new ones for those who have none."""
        missing = (places < 0).nonzero().squeeze(1)
        if not missing.numel():
            return places
        others = users[missing]
        given = self.fields[name].take(others)
        self._places[others, self._numbers[name]] = (given + 1).to(torch.int32)
        return places.index_copy(0, missing, given)


def _room(size: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a processor they take memory only where they are written."""
    return memory.zeros(size, like=torch.empty(0, dtype=kind, device=device))


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type of ``like``. Many of them are a file, which takes disk only where it is written."""
    kind, size = like.dtype, prod(shape) * like.element_size()
    if like.device.type != "cpu" or size <= mapped.IN_MEMORY:
        return torch.zeros(shape, dtype=kind, device=like.device)
    return torch.frombuffer(mapped.sparse(size, "client states"), dtype=kind).view(shape)
