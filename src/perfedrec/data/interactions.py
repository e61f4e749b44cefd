"""Implicit feedback as immutable CSR arrays, with the ids of the data."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing, quoted

Ids = NDArray[Any]  # int64, or object holding str
Ints = NDArray[np.int64]

ROWS_AT_ONCE = 1 << 20
"""Interactions that are worked on together, where all of them would take much memory."""


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    """Implicit feedback as CSR rows: user ``u`` took ``items[offsets[u]:offsets[u + 1]]``, ascending and unique.

    ``user_ids`` [n] and ``item_ids`` [m] are the ids of the data (int64, or objects of str); the position of an id is
    its internal index. ``offsets`` int64 [n + 1], ``items`` int64 [nnz], ``timestamps`` int64 [nnz] since 1970,
    in one unit (see :func:`.times.time_unit`), aligned with ``items``, or None. ``positions`` int64 [nnz] are the
    places of the interactions in their file, where its order is the order in time, or None. The arrays are read-only.
    Raises :class:`DataError` where the arrays do not fit together.
    """

    user_ids: Ids
    item_ids: Ids
    offsets: Ints
    items: Ints
    timestamps: Ints | None = None
    positions: Ints | None = None

    def __post_init__(self) -> None:
        for name in ("user_ids", "item_ids"):
            object.__setattr__(self, name, _frozen_ids(getattr(self, name), name))
        for name in ("offsets", "items", "timestamps", "positions"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _frozen_ints(getattr(self, name), name))
        offsets, items = self.offsets, self.items
        if offsets.shape != (self.n_users + 1,) or offsets[0] != 0 or offsets[-1] != items.size:
            raise DataError(f"offsets must run from 0 to {items.size} in {self.n_users + 1} steps")
        if np.any(offsets[1:] < offsets[:-1]):
            raise DataError("offsets must not decrease")
        if items.size and (items.min() < 0 or items.max() >= self.n_items):
            raise DataError(f"items must be indices from 0 to {self.n_items - 1}")
        rising = items[1:] > items[:-1]
        rising[offsets[(offsets > 0) & (offsets < items.size)] - 1] = True  # a new user may start anywhere
        if not rising.all():
            raise DataError("the items of a user must be ascending and unique")
        for name, values in (("timestamps", self.timestamps), ("positions", self.positions)):
            if values is not None and values.shape != items.shape:
                raise DataError(f"{name} must be given for each of the {items.size} interactions")

    @property
    def n_users(self) -> int:
        return int(self.user_ids.size)

    @property
    def n_items(self) -> int:
        return int(self.item_ids.size)

    @property
    def n_interactions(self) -> int:
        return int(self.items.size)

    @property
    def degrees(self) -> Ints:
        """int64 [n] the number of interactions of each user."""
        return np.diff(self.offsets)

    @cached_property
    def item_degrees(self) -> Ints:
        """int64 [m] the number of interactions of each item; read-only."""
        return _frozen_ints(np.bincount(self.items, minlength=self.n_items), "item_degrees")

    def in_order(self) -> Ints | None:
        """int64 [nnz] the rows in the order of time, user by user: by ``positions`` or else by ``timestamps``; None
        where neither is known. Rows of a user at the same time are in random order, which is always the same."""
        along = self.timestamps if self.positions is None else self.positions
        if along is None:
            return None
        chance = np.random.default_rng(0).random(self.n_interactions)
        return ordering(self.users_of_rows(), along, chance)

    def from_last(self) -> Ints | None:
        """int64 [nnz] the place of each row among those of its user, counted from the last one, which is 0, to -1, -2
        and so on; None where the order is not known."""
        order = self.in_order()
        if order is None:
            return None
        places = np.empty_like(order)
        places[order] = np.arange(order.size) - self.offsets[1:][self.users_of_rows()] + 1
        return places

    def users_of_rows(self) -> Ints:
        """int64 [nnz] the user index of each row."""
        return np.repeat(np.arange(self.n_users), self.degrees)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Consecutive blocks of users, and their rows: :data:`ROWS_AT_ONCE` rows or fewer, or a single user."""
        first = 0
        while first < self.n_users:
            begin = int(self.offsets[first])
            last = int(np.searchsorted(self.offsets, begin + ROWS_AT_ONCE, side="right")) - 1
            last = min(max(last, first + 1), self.n_users)
            yield slice(first, last), slice(begin, int(self.offsets[last]))
            first = last

    def without(self, users: Sequence[int]) -> Interactions:
        """The same with no interactions of the users with these numbers, who stay in the list of users."""
        kept = ~np.isin(self.users_of_rows(), np.asarray(users, dtype=np.int64))
        degrees = self.degrees.copy()
        degrees[list(users)] = 0
        offsets = np.append(0, np.cumsum(degrees))
        more = {name: getattr(self, name) for name in ("timestamps", "positions")}
        rows = {name: None if values is None else values[kept] for name, values in more.items()}
        return Interactions(self.user_ids, self.item_ids, offsets, self.items[kept], **rows)

    def user_index(self, external_id: int | str) -> int:
        """The internal index of a user id, given as int or str. Raises :class:`DataError` for an unknown id."""
        return _index_of(self.user_ids, external_id, "user")

    def item_index(self, external_id: int | str) -> int:
        """The internal index of an item id, given as int or str. Raises :class:`DataError` for an unknown id."""
        return _index_of(self.item_ids, external_id, "item")

    def frame(self) -> pl.DataFrame:
        """A frame with columns user, item and, where known, timestamp and position, with external ids."""
        columns = {"user": id_series(self.user_ids).gather(self.users_of_rows())}
        columns["item"] = id_series(self.item_ids).gather(self.items)
        if self.timestamps is not None:
            columns["timestamp"] = pl.Series(self.timestamps)
        if self.positions is not None:
            columns["position"] = pl.Series(self.positions)
        return pl.DataFrame(columns)

    @classmethod
    def from_rows(
        cls,
        user_ids: Ids,
        item_ids: Ids,
        users: Ints,
        items: Ints,
        timestamps: Ints | None = None,
        positions: Ints | None = None,
    ) -> Interactions:
        """Build from rows in any order: ``users`` and ``items`` int64 [rows] are internal indices.

        Of the rows that repeat a pair of user and item, the earliest is kept.
        """
        keys = users.astype(np.int64) * max(len(item_ids), 1) + items
        if not np.all(keys[1:] > keys[:-1]):
            order = ordering(keys, *(each for each in (timestamps, positions) if each is not None))
            first = order[np.concatenate([[True], np.diff(keys[order]) > 0])]
            keys, timestamps = keys[first], None if timestamps is None else timestamps[first]
            positions = None if positions is None else positions[first]
        rows, columns = np.divmod(keys, max(len(item_ids), 1))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(user_ids)))])
        return cls(user_ids, item_ids, offsets, columns, timestamps, positions)

    def __repr__(self) -> str:
        times = "" if self.timestamps is None else ", with times"
        return (
            f"<Interactions: {counted(self.n_users, 'user')}, {counted(self.n_items, 'item')}, "
            f"{counted(self.n_interactions, 'pair')}{times}>"
        )

    @classmethod
    def from_frame(
        cls, frame: pl.DataFrame, *, user_ids: Ids | None = None, item_ids: Ids | None = None
    ) -> Interactions:
        """Build from a frame with columns user, item and optionally timestamp and position; others are ignored.

        ``user_ids`` and ``item_ids`` give the ids and their order; without them, the ids are those of the frame in
        ascending order. Of the rows that repeat a pair, the earliest is kept. Raises :class:`DataError` where a column
        is missing, or an id is not among the given ones.
        """
        for name in ("user", "item"):
            if name not in frame.columns:
                raise DataError(f"a frame of interactions needs the column {name!r}, got {listing(frame.columns)}")
        user_ids = unique_ids(frame["user"]) if user_ids is None else user_ids
        item_ids = unique_ids(frame["item"]) if item_ids is None else item_ids
        codes = []
        for name, ids in (("user", user_ids), ("item", item_ids)):
            code = encode(frame[name], ids)
            if (code < 0).any():
                unknown = frame[name][int(np.argmax(code < 0))]
                raise DataError(f"unknown {name} {unknown!r}: it is not among the {len(ids)} given {name} ids")
            codes.append(code)
        times, positions = (
            frame[name].cast(pl.Int64).to_numpy() if name in frame.columns else None
            for name in ("timestamp", "position")
        )
        return cls.from_rows(user_ids, item_ids, codes[0], codes[1], times, positions)

    @classmethod
    def from_file(
        cls, path: str | Path, format: str = "auto", columns: Mapping[str, str | int] | None = None
    ) -> Interactions:
        """Read a file in any known format; arguments and errors are those of :func:`perfedrec.data.formats.read`."""
        from perfedrec.data.formats import read

        return cls.from_frame(read(path, format, columns))

    @classmethod
    def from_csv(cls, path: str | Path, columns: Mapping[str, str | int] | None = None) -> Interactions:
        """Read a file separated by commas, semicolons or tabs: see :func:`perfedrec.data.formats.read`."""
        return cls.from_file(path, "csv", columns)


def is_numbered(interactions: Interactions) -> bool:
    """Whether users and items have numbers as ids, in ascending order, and each user has an item."""
    ids = interactions.user_ids, interactions.item_ids
    numbered = all(each.dtype.kind == "i" and bool(np.all(each[1:] > each[:-1])) for each in ids)
    return numbered and bool((interactions.degrees > 0).all())


def ordering(*keys: NDArray[Any]) -> Ints:
    """int64 [rows] the order that sorts rows by the first of ``keys`` [rows], then by the second, and so on."""
    first = list(takewhile(lambda key: key.dtype.kind == "i", keys))
    packed, rest = _packed(first), keys[len(first) :]
    if packed is None:
        return _sorting(*keys)
    order = stable_order(packed)
    if rest and packed.size:
        tied, equal = np.zeros(packed.size, dtype=bool), np.diff(packed[order]) == 0
        tied[1:] |= equal
        tied[:-1] |= equal
        rows = order[tied]
        order[tied] = rows[_sorting(packed[rows], *(key[rows] for key in rest))]
    return order


def _sorting(*keys: NDArray[Any]) -> Ints:
    table = pl.DataFrame({str(i): key for i, key in enumerate(keys)})
    return table.select(pl.arg_sort_by(table.columns).cast(pl.Int64)).to_series().to_numpy()


def _packed(keys: Sequence[Ints]) -> Ints | None:
    """One number for each row in place of several ``keys``, if :func:`stable_order` can sort such numbers fast."""
    if not keys or not keys[0].size:
        return None
    low = [int(key.min()) for key in keys]
    bits = [(int(key.max()) - least).bit_length() for key, least in zip(keys, low, strict=True)]
    if sum(bits) + keys[0].size.bit_length() > 63:
        return None
    packed = np.zeros(keys[0].size, dtype=np.int64)
    for key, least, width in zip(keys, low, bits, strict=True):
        packed <<= width
        packed |= key - least
    return packed


def stable_order(keys: Ints) -> Ints:
    """The order that sorts ``keys``, which are not negative; equal ones stay as they are."""
    bits = keys.size.bit_length()
    if not keys.size or int(keys.max()).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    both = keys << bits  # numpy sorts numbers several times as fast as it finds their order
    both |= np.arange(keys.size)
    both.sort()
    both &= (1 << bits) - 1
    return both


def id_series(ids: Ids) -> pl.Series:
    """Ids as a polars series: Int64 or String."""
    return pl.Series(ids) if ids.dtype.kind == "i" else pl.Series(ids.tolist(), dtype=pl.String)


def unique_ids(column: pl.Series) -> Ids:
    """The distinct ids of a column in ascending order: int64 [k], or objects of str."""
    distinct = column.unique().sort()
    if distinct.dtype.is_integer():
        return distinct.cast(pl.Int64).to_numpy()
    return np.array(distinct.cast(pl.String).to_list(), dtype=object)


def encode(column: pl.Series, ids: Ids) -> Ints:
    """int64 [rows] the position of each value of ``column`` in ``ids``, or -1 where it does not occur there."""
    known = id_series(ids)
    left = pl.DataFrame({"id": column.cast(known.dtype, strict=False)})
    right = pl.DataFrame({"id": known, "index": np.arange(len(ids))})
    return left.join(right, on="id", how="left", maintain_order="left")["index"].fill_null(-1).to_numpy()


def _frozen_ints(values: Any, name: str) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{name} must be a flat array of integers, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64, copy=False).view()
    array.flags.writeable = False
    return array


def _frozen_ids(values: Any, name: str) -> Ids:
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        array = _frozen_ints(array, name)
    elif array.dtype.kind in "OTU" and array.ndim == 1 and all(isinstance(value, str) for value in array.tolist()):
        array = array.astype(object).view()
        array.flags.writeable = False
    else:
        raise DataError(f"{name} must be a flat array of integers or strings")
    ascending = array.dtype.kind == "i" and bool(np.all(array[1:] > array[:-1]))
    if not ascending and id_series(array).n_unique() != array.size:
        raise DataError(f"{name} must not repeat an id")
    return array


def _index_of(ids: Ids, wanted: int | str, kind: str) -> int:
    if ids.dtype.kind == "i":
        try:
            value: int | str = int(wanted)
        except ValueError:
            raise DataError(f"unknown {kind} {wanted!r}; expected a whole number, as all ids of {kind}s are") from None
    else:
        value = str(wanted)
    found = np.flatnonzero(ids == value)
    if found.size:
        return int(found[0])
    if not ids.size:
        raise DataError(f"unknown {kind} {wanted!r}: the data hold no {kind}s")
    if kind == "user":  # a message must not name anybody else
        raise DataError(
            f"unknown user {wanted!r}; expected "
            f"{'the only user' if ids.size == 1 else f'one of the {ids.size:,} users'} in the training data"
        )
    if isinstance(value, int):
        near = ids[np.argmin(np.abs(ids.astype(np.float64) - float(value)))]
    else:
        near = quoted(next(iter(difflib.get_close_matches(value, ids[:10_000].tolist(), n=1)), ids[0]))
    raise DataError(f"unknown {kind} {wanted!r}; expected an id of the {kind}s in the data, such as {near}")
