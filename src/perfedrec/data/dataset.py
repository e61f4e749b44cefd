"""A data set: training, validation and test interactions over one id map, with what the split left out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.errors import DataError
from perfedrec.data.interactions import Ids, Interactions, Ints


@dataclass(frozen=True)
class Encoding:
    """How attributes become numbers: ``names`` [F], each a column of numbers or ``column=category``, and the
    ``ranges`` [F] of these numbers, which become [0, 1]."""

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Attributes:
    """Attributes of users or items: ``values`` float32 [rows, len(names)], one-hot, multi-hot or scaled to [0, 1] from
    the ``ranges`` of the numbers (none given: they were there)."""

    names: tuple[str, ...]
    values: NDArray[np.float32]
    ranges: tuple[tuple[float, float], ...] = ()

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.names, self.ranges or ((0.0, 1.0),) * len(self.names))

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float32).view()
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise DataError(f"attribute values must be [rows, {len(self.names)}], got {values.shape}")
        if not np.isfinite(values).all():
            raise DataError("attribute values must be finite numbers")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, eq=False)
class SyntheticTruth:
    """What was planted in synthetic data.

    ``user_clusters`` int64 [n] and ``item_clusters`` int64 [m]: the taste cluster of each; ``popularity`` float64 [m]:
    the weight of each item within its cluster.
    """

    user_clusters: Ints
    item_clusters: Ints
    popularity: NDArray[np.float64]

    def take(self, users: Ints, items: Ints) -> SyntheticTruth:
        """The truth about the given users and items, in their order."""
        return SyntheticTruth(self.user_clusters[users], self.item_clusters[items], self.popularity[items])


def counted(number: int, noun: str) -> str:
    """``1 user``, ``5,224 users``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class HeldOut:
    """What happened to one held-out part: ``interactions`` were given, ``left_out`` of them cannot be evaluated.

    Left out are interactions of ``unknown_users`` and with ``unknown_items``, which never occur in training, and
    ``known_pairs``, which an earlier part holds as well: training items are never recommended, and validation items are
    left out of the lists that are tested.
    """

    interactions: int = 0
    unknown_users: int = 0
    unknown_items: int = 0
    known_pairs: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class SplitReport:
    """How a data set came about and what it leaves out.

    ``duplicates``: rows that repeat a pair within their part; ``short_users``: users with too few interactions for
    one to be held out; ``remarks``: further sentences, on preparation and attributes.
    """

    how: str
    valid: HeldOut
    test: HeldOut
    duplicates: int = 0
    short_users: int = 0
    remarks: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The report in sentences, one for each count that is not zero."""
        lines = [f"split: {self.how}"]
        if self.duplicates:
            verb = "was" if self.duplicates == 1 else "were"
            lines.append(f"{counted(self.duplicates, 'repeated interaction')} {verb} counted once")
        if self.short_users:
            verb = "is" if self.short_users == 1 else "are"
            lines.append(f"{counted(self.short_users, 'user')} with fewer than 3 interactions {verb} in training only")
        for name, part in (("validation", self.valid), ("test", self.test)):
            if part.left_out:
                lines.append(
                    f"{name}: {part.left_out:,} of {part.interactions:,} interactions are left out of evaluation "
                    f"({part.unknown_users:,} users and {part.unknown_items:,} items never occur in training, "
                    f"{part.known_pairs:,} interactions occur in an earlier part too)"
                )
        if not any(part.interactions - part.left_out for part in (self.valid, self.test)):
            lines.append("nobody can be evaluated: nothing is held out for validation or test")
        return lines + list(self.remarks)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test interactions over the users and items that occur in training.

    ``user_attributes`` has one row per user and ``item_attributes`` one per item; ``truth`` is known for synthetic
    data only; ``notes`` tells what was left out and why.
    """

    name: str
    train: Interactions
    valid: Interactions
    test: Interactions
    notes: SplitReport
    user_attributes: Attributes | None = None
    item_attributes: Attributes | None = None
    truth: SyntheticTruth | None = None

    def __post_init__(self) -> None:
        for part in (self.valid, self.test):
            for mine, theirs in ((part.user_ids, self.train.user_ids), (part.item_ids, self.train.item_ids)):
                if mine is not theirs and not np.array_equal(mine, theirs):
                    raise DataError("training, validation and test must share their user and item ids")
        for attributes, rows in ((self.user_attributes, self.n_users), (self.item_attributes, self.n_items)):
            if attributes is not None and attributes.values.shape[0] != rows:
                raise DataError(f"attributes must have {rows} rows, got {attributes.values.shape[0]}")

    @property
    def n_users(self) -> int:
        return self.train.n_users

    @property
    def n_items(self) -> int:
        return self.train.n_items

    def without_test(self) -> Dataset:
        """The same data with an empty test part: for selection, which has no use for one."""
        nothing = np.empty(0, dtype=np.int64)
        empty = Interactions.from_rows(self.train.user_ids, self.train.item_ids, nothing, nothing, None)
        return replace(self, test=empty)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any id, interaction or attribute, and with nothing else."""
        digest = hashlib.sha256()

        def add(array: NDArray[Any]) -> None:
            data = "\0".join(array.tolist()).encode() if array.dtype == object else array.tobytes()
            digest.update(f"{array.dtype.str}{array.shape}{len(data)};".encode())
            digest.update(data)

        add(self.train.user_ids)
        add(self.train.item_ids)
        for part in (self.train, self.valid, self.test):
            add(part.offsets)
            add(part.items)
        for kind, attributes in (("user", self.user_attributes), ("item", self.item_attributes)):
            if attributes is not None:
                digest.update(kind.encode())
                add(np.array(attributes.names, dtype=object))
                add(attributes.values)
        return digest.hexdigest()[:16]


class Rows(NamedTuple):
    """Interactions of one part, before the universe is known: indices into a joint id map."""

    users: Ints
    items: Ints
    timestamps: Ints | None


def assemble(name: str, user_ids: Ids, item_ids: Ids, parts: Sequence[Rows], how: str, short_users: int = 0) -> Dataset:
    """A data set over the users and items of the first of the three ``parts`` (train, valid, test).

    ``user_ids`` and ``item_ids`` are the joint id maps that the rows of all parts index. Raises :class:`DataError` when
    there is nothing to train on.
    """
    train, *held_out = parts
    if not train.users.size:
        raise DataError(f"{name}: the training part holds no interactions")
    users, items = _occurring(train.users, user_ids.size), _occurring(train.items, item_ids.size)
    new_user, new_item = _renumbering(users, user_ids.size), _renumbering(items, item_ids.size)
    ids = user_ids[users], item_ids[items]
    fitted = Interactions.from_rows(*ids, new_user[train.users], new_item[train.items], train.timestamps)
    ids = fitted.user_ids, fitted.item_ids  # shared, so that equality is cheap to see
    duplicates = train.users.size - fitted.n_interactions
    pairs = fitted.users_of_rows() * fitted.n_items + fitted.items
    evaluated: list[Interactions] = []
    reports: list[HeldOut] = []
    for part in held_out:
        row_users, row_items = new_user[part.users], new_item[part.items]
        in_universe = (row_users >= 0) & (row_items >= 0)
        known = in_universe & _among(row_users * fitted.n_items + row_items, pairs)
        keep = in_universe & ~known
        times = None if part.timestamps is None else part.timestamps[keep]
        evaluated.append(Interactions.from_rows(*ids, row_users[keep], row_items[keep], times))
        duplicates += int(keep.sum()) - evaluated[-1].n_interactions
        pairs = np.union1d(pairs, row_users[keep] * fitted.n_items + row_items[keep])
        reports.append(
            HeldOut(
                interactions=part.users.size,
                unknown_users=_occurring(part.users[row_users < 0], user_ids.size).size,
                unknown_items=_occurring(part.items[row_items < 0], item_ids.size).size,
                known_pairs=int(known.sum()),
                left_out=int((~keep).sum()),
            )
        )
    notes = SplitReport(how, reports[0], reports[1], duplicates, short_users)
    return Dataset(name, fitted, evaluated[0], evaluated[1], notes)


def _occurring(indices: Ints, size: int) -> Ints:
    """The distinct ones of ``indices``, all below ``size``, ascending."""
    return np.flatnonzero(np.bincount(indices, minlength=size))


def _among(values: Ints, ascending: Ints) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = ascending[np.minimum(np.searchsorted(ascending, values), ascending.size - 1)] == values
    return found


def _renumbering(kept: Ints, size: int) -> Ints:
    """New index of each old one, -1 for those that are not kept."""
    numbers = np.full(size, -1, dtype=np.int64)
    numbers[kept] = np.arange(kept.size)
    return numbers
