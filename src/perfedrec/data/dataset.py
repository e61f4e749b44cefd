"""A data set: training, validation and test interactions with common ids, and a report of what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.data.interactions import Ids, Interactions, Ints
from perfedrec.data.relations import Relations


@dataclass(frozen=True)
class Encoding:
    """How attributes become numbers.

    ``names`` [F] are columns of numbers, or ``column=category``. ``ranges`` [F] are the lowest and the highest number
    of each; this range is scaled to [0, 1].
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Attributes:
    """Attributes of users or items.

    ``values`` are float32 [rows, len(names)]: one-hot, multi-hot, or numbers scaled to [0, 1]. ``ranges`` are the
    ranges before scaling; empty where the values were in [0, 1] from the start. Raises :class:`DataError` where the
    shape does not fit the names, or a value is not finite.
    """

    names: tuple[str, ...]
    values: NDArray[np.float32]
    ranges: tuple[tuple[float, float], ...] = ()

    def __repr__(self) -> str:
        return f"<Attributes of {len(self.values):,}: {len(self.names)} numbers each>"

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
    """The truth that synthetic data were drawn from.

    ``user_clusters`` int64 [n] and ``item_clusters`` int64 [m] are the taste clusters of users and items.
    ``popularity`` float64 [m] is the weight of each item within its cluster. With F facets ``item_clusters`` is [m, F],
    and ``user_facets`` int64 [n] are the facets of the users, by which their clusters are meant.
    """

    user_clusters: Ints
    item_clusters: Ints
    popularity: NDArray[np.float64]
    user_facets: Ints | None = None

    def take(self, users: Ints, items: Ints) -> SyntheticTruth:
        """The truth about the given users and items, in their order."""
        facets = None if self.user_facets is None else self.user_facets[users]
        return SyntheticTruth(self.user_clusters[users], self.item_clusters[items], self.popularity[items], facets)


@dataclass(frozen=True)
class HeldOut:
    """Counts of one held-out part: of ``interactions`` given, ``left_out`` cannot be evaluated.

    Left out are the interactions of ``unknown_users`` users and ``unknown_items`` items that never occur in training,
    and ``known_pairs`` pairs of a user and an item that an earlier part has as well. Such a pair could not be found:
    training items are never recommended, and validation items are removed from the lists that are tested.
    """

    interactions: int = 0
    unknown_users: int = 0
    unknown_items: int = 0
    known_pairs: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Ties:
    """How often chance decided a split by time, because a user has several interactions at the same time.

    Of the ``users`` who have interactions held out, for ``test`` it decided which ones are tested, and for ``any``
    which ones are tested or validated with. ``seed`` is the seed that decided.
    """

    users: int
    test: int
    any: int
    seed: int

    def line(self) -> str:
        """The counts as a sentence."""
        share = self.any / max(self.users, 1)
        test = f" ({self.test:,}: which one is tested)" if self.test and self.test < self.any else ""
        what = "which interaction is tested" if self.test == self.any else "which interactions are held out"
        return (
            f"chance decides {what} for {self.any:,} of {counted(self.users, 'user')} ({share:.0%}){test}: they "
            "have several at "
            f"the same time, and data.seed={self.seed} chooses (data.ties=together keeps them together)"
        )


@dataclass(frozen=True)
class NewUsers:
    """Counts of the users who are held out from training as a whole: ``users`` with ``interactions`` that are known.

    Besides them, ``short_users`` were held out who have too few interactions to be tested. ``unknown_items`` known
    interactions are left out, because their items never occur in training.
    """

    users: int
    interactions: int
    short_users: int = 0
    unknown_items: int = 0

    def lines(self) -> list[str]:
        """The counts as sentences."""
        verb, served = ("is", "a new user") if self.users == 1 else ("are", "new users")
        lines = [
            f"{counted(self.users, 'user')} {verb} held out from training, and tested as {served} with "
            f"{counted(self.interactions, 'known interaction')}",
            "validation is on users of training: the best round is chosen by them, not by new users",
        ]
        if self.short_users:
            verb = "was" if self.short_users == 1 else "were"
            lines.append(
                f"{counted(self.short_users, 'more user')} {verb} held out and cannot be tested: fewer than 2 of their "
                "interactions are with items of training"
            )
        if self.unknown_items:
            verb = "is" if self.unknown_items == 1 else "are"
            left = counted(self.unknown_items, "known interaction")
            lines.append(f"{left} of held-out users {verb} left out: the items never occur in training")
        return lines


@dataclass(frozen=True)
class SplitReport:
    """How a data set was made, and what it leaves out.

    ``how`` describes the split. ``duplicates`` is the number of rows that repeat a pair within their part.
    ``short_users`` is the number of users who have fewer than ``short_of``, which is too little to hold any out.
    ``ties`` says how often chance decided a split by time, and ``drawn`` that the whole split is random.
    ``looks_ahead`` is true where each user's own times decided, and training has interactions that are later than test
    interactions of other users. ``remarks`` are further sentences, about preparation and attributes. ``files`` are
    sentences about how the files were read. ``new_users`` counts the users who are held out as a whole, if any are.
    ``trained_on_valid`` is the number of validation interactions that are in training instead; None where validation is
    kept apart.
    """

    how: str
    valid: HeldOut
    test: HeldOut
    duplicates: int = 0
    short_users: int = 0
    short_of: str = "3 interactions"
    ties: Ties | None = None
    drawn: bool = False
    looks_ahead: bool = False
    remarks: tuple[str, ...] = field(default=())
    files: tuple[str, ...] = ()
    new_users: NewUsers | None = None
    trained_on_valid: int | None = None

    def lines(self) -> list[str]:
        """The report as sentences: one for each count that is not zero."""
        lines = [*self.files, f"split: {self.how}"]
        if self.trained_on_valid is not None:
            verb = "is" if self.trained_on_valid == 1 else "are"
            lines.append(
                f"{counted(self.trained_on_valid, 'validation interaction')} {verb} trained on: no round is chosen by "
                "validation, and the figures compare only with those of others who train on validation too"
            )
        if self.new_users is not None:
            lines += self.new_users.lines()
        if self.looks_ahead:
            lines.append("training has interactions that are later than tested ones (none with data.split=global-time)")
        if self.ties is not None and self.ties.any:
            lines.append(self.ties.line())
        if self.duplicates:
            verb = "was" if self.duplicates == 1 else "were"
            lines.append(f"{counted(self.duplicates, 'repeated interaction')} {verb} counted once")
        if self.short_users:
            verb = "is" if self.short_users == 1 else "are"
            lines.append(f"{counted(self.short_users, 'user')} with fewer than {self.short_of} {verb} in training only")
        for name, part in (("validation", self.valid), ("test", self.test)):
            if part.left_out:
                new = name == "test" and self.new_users is not None
                of = " without known interactions" if new else ""
                lines.append(
                    f"{name}: {part.left_out:,} of "
                    f"{counted(part.interactions, 'interaction is', 'interactions are')} left out of evaluation "
                    f"({counted(part.unknown_users, 'user')}{of} and {counted(part.unknown_items, 'item')} never occur "
                    f"in training, {counted(part.known_pairs, 'interaction occurs', 'interactions occur')} in an "
                    "earlier part too)"
                )
        if not any(part.interactions - part.left_out for part in (self.valid, self.test)):
            lines.append("no user can be evaluated: no interactions are held out for validation or test")
        return lines + list(self.remarks)

    @property
    def chance(self) -> str | None:
        """What chance decided in the split, as a sentence; None where it decided nothing."""
        if self.ties is not None and self.ties.any:
            return self.ties.line()
        return f"the split is random: {self.how}" if self.drawn else None

    def stored(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self)

    @staticmethod
    def read(stored: Mapping[str, Any]) -> SplitReport:
        """The report that :meth:`stored` gave. Raises :class:`KeyError` or :class:`TypeError` for other content."""
        parts = {name: HeldOut(**stored[name]) for name in ("valid", "test")}
        ties = None if stored["ties"] is None else Ties(**stored["ties"])
        new = None if stored.get("new_users") is None else NewUsers(**stored["new_users"])
        lists = {name: tuple(stored[name]) for name in ("remarks", "files")}
        return SplitReport(**{**stored, **parts, **lists, "ties": ties, "new_users": new})


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Training, validation and test interactions of the users and items that occur in training.

    Where users are held out as a whole, ``new_users`` are their known interactions, and ``test`` has the user ids of
    ``new_users`` in place of those of ``train``. No user is in both.

    ``notes`` says what was left out and why. ``user_attributes`` has one row per user and ``item_attributes`` one per
    item. ``relations`` are those between users of ``train``, if any were given. ``truth`` is known for synthetic data
    only. ``origin`` has the options of the section ``[data]`` of a configuration that give these data again; None where
    the data were not loaded by their name. ``forgotten`` are the numbers of users whose data were taken out
    (:meth:`without_users`). Raises :class:`DataError` where the parts have different ids, or where attributes or
    relations are those of another number of users or items.
    """

    name: str
    train: Interactions
    valid: Interactions
    test: Interactions
    notes: SplitReport
    user_attributes: Attributes | None = None
    item_attributes: Attributes | None = None
    truth: SyntheticTruth | None = None
    origin: Mapping[str, Any] | None = None
    new_users: Interactions | None = None
    forgotten: tuple[int, ...] = ()
    relations: Relations | None = None

    def __post_init__(self) -> None:
        for part, users in ((self.valid, self.train), (self.test, self.tested_users), (self.tested_users, None)):
            ids = [(part.item_ids, self.train.item_ids)]
            ids += [] if users is None else [(part.user_ids, users.user_ids)]
            if any(mine is not theirs and not np.array_equal(mine, theirs) for mine, theirs in ids):
                raise DataError("training, validation and test must share their user and item ids")
        if self.relations is not None and self.relations.n_users != self.n_users:
            raise DataError(
                f"{self.name}: the relations are those of {counted(self.relations.n_users, 'user')}; expected "
                f"{self.n_users:,}"
            )
        new = [] if self.new_users is None else self.new_users.user_ids.tolist()
        if new and (both := len(set(new) & set(self.train.user_ids.tolist()))):
            raise DataError(f"{self.name}: new users must not occur in training; {both:,} of them do")
        for attributes, rows in ((self.user_attributes, self.n_users), (self.item_attributes, self.n_items)):
            if attributes is not None and attributes.values.shape[0] != rows:
                raise DataError(f"attributes must have {rows} rows, got {attributes.values.shape[0]}")

    def __repr__(self) -> str:
        sizes = f"{counted(self.n_users, 'user')}, {counted(self.n_items, 'item')}"
        parts = (f"{name} {getattr(self, name).n_interactions:,}" for name in ("train", "valid", "test"))
        new = "" if self.new_users is None else f"; {counted(self.new_users.n_users, 'held-out user')}"
        return f"<Dataset {self.name}: {sizes}; interactions: {', '.join(parts)}{new}>"

    @property
    def n_users(self) -> int:
        return self.train.n_users

    @property
    def n_items(self) -> int:
        return self.train.n_items

    @property
    def tested_users(self) -> Interactions:
        """What is known of the users who are tested: the training interactions, or those of new users."""
        return self.train if self.new_users is None else self.new_users

    def without_test(self) -> Dataset:
        """The same data with an empty test part, for the selection of options, which must not use the test part."""
        nothing = np.empty(0, dtype=np.int64)
        empty = Interactions.from_rows(self.train.user_ids, self.train.item_ids, nothing, nothing, None)
        return replace(self, test=empty, origin=None, new_users=None)

    def without_users(self, user_ids: Sequence[int | str]) -> Dataset:
        """The same data as if the users had never given theirs: their interactions are gone from all parts, and so are
        their relations; their attributes are zeros. They keep their numbers, so that the random numbers of all others
        stay the same, and take part in no round. Items that nobody else has stay in the list of items.

        Raises :class:`DataError` for an unknown user, for a user who was taken out before, and where nobody would be
        left.
        """
        gone = sorted({self.train.user_index(each) for each in user_ids})
        if again := [each for each in gone if each in self.forgotten]:
            raise DataError(f"user {self.train.user_ids[again[0]]!r} was forgotten before; expected other users")
        everybody = tuple(sorted({*self.forgotten, *gone}))
        if len(everybody) == self.n_users:
            raise DataError(f"{self.name}: all {self.n_users:,} users are to be forgotten; expected some to be left")
        test = self.test.without(gone) if self.new_users is None else self.test
        attributes = self.user_attributes
        if attributes is not None:
            values = attributes.values.copy()
            values[gone] = 0
            attributes = replace(attributes, values=values)
        origin = self.origin
        if origin is not None:
            origin = {**origin, "forgotten": tuple(str(self.train.user_ids[each]) for each in everybody)}
        return replace(
            self,
            train=self.train.without(gone),
            valid=self.valid.without(gone),
            test=test,
            user_attributes=attributes,
            origin=origin,
            forgotten=everybody,
            relations=None if self.relations is None else self.relations.without(gone),
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on all ids, interactions and attributes, on the order of interactions where
        they have positions, and on nothing else."""
        digest = hashlib.sha256()

        def add(array: NDArray[Any]) -> None:
            data = "\0".join(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).data
            digest.update(f"{array.dtype.str}{array.shape}{memoryview(data).nbytes};".encode())
            digest.update(data)

        add(self.train.user_ids)
        add(self.train.item_ids)
        for part in (self.train, self.valid, self.test):
            add(part.offsets)
            add(part.items)
        if self.new_users is not None:
            digest.update(b"new users")
            add(self.new_users.user_ids)
            add(self.new_users.offsets)
            add(self.new_users.items)
        for known in (self.train, self.new_users):
            if known is not None and known.positions is not None and (order := known.in_order()) is not None:
                digest.update(b"order")
                add(order)
        for kind, attributes in (("user", self.user_attributes), ("item", self.item_attributes)):
            if attributes is not None:
                digest.update(kind.encode())
                add(np.array(attributes.names, dtype=object))
                add(attributes.values)
        if self.relations is not None:
            digest.update(b"relations")
            add(self.relations.sources)
            add(self.relations.targets)
        return digest.hexdigest()[:16]


class Rows(NamedTuple):
    """Interactions of one part, by index into the id maps of all parts together (see :func:`assemble`)."""

    users: Ints
    items: Ints
    timestamps: Ints | None
    positions: Ints | None = None

    def take(self, rows: NDArray[Any]) -> Rows:
        """Some of the rows: by number, or a mask."""
        times, positions = (None if each is None else each[rows] for each in self[2:])
        return Rows(self.users[rows], self.items[rows], times, positions)

    def with_rows(self, others: Rows) -> Rows:
        """These rows and then the ``others``; what is not known of all rows is left out."""
        pairs = zip(self[2:], others[2:], strict=True)
        times, positions = (None if a is None or b is None else np.concatenate([a, b]) for a, b in pairs)
        users, items = (np.concatenate(pair) for pair in zip(self[:2], others[:2], strict=True))
        return Rows(users, items, times, positions)


def assemble(name: str, user_ids: Ids, item_ids: Ids, parts: Sequence[Rows], how: str, short_users: int = 0) -> Dataset:
    """Make a data set of the ``parts`` train, valid and test, and perhaps the known interactions of new users.

    Its users and items are those of train. With new users, test is theirs. ``user_ids`` and ``item_ids`` are the ids of
    all parts together, which the rows of the parts index. ``how`` and ``short_users`` are for the report. Raises
    :class:`DataError` where the training part has no interactions, where new users have none, and where they occur in
    training too.
    """
    train, valid, test, *new = parts
    if not train.users.size:
        raise DataError(f"{name}: the training part holds no interactions")
    users, items = _occurring(train.users, user_ids.size), _occurring(train.items, item_ids.size)
    new_user, new_item = _renumbering(users, user_ids.size), _renumbering(items, item_ids.size)
    ids = user_ids[users], item_ids[items]
    fitted = Interactions.from_rows(*ids, new_user[train.users], new_item[train.items], *train[2:])
    duplicates = train.users.size - fitted.n_interactions
    validated, valid_report, again = _evaluated(valid, new_user, new_item, (fitted,))
    duplicates += again
    known: tuple[Interactions, ...] = (fitted, validated)
    counts, served = None, None
    if new:
        served, new_user, counts = _new_users(name, user_ids, fitted.item_ids, new[0], new_user, new_item)
        duplicates += new[0].users.size - counts.unknown_items - served.n_interactions
        known = (served,)
    tested, test_report, again = _evaluated(test, new_user, new_item, known)
    notes = SplitReport(how, valid_report, test_report, duplicates + again, short_users, new_users=counts)
    return Dataset(name, fitted, validated, tested, notes, new_users=served)


def _evaluated(
    part: Rows, new_user: Ints, new_item: Ints, known: Sequence[Interactions]
) -> tuple[Interactions, HeldOut, int]:
    """What can be evaluated of a held-out part, what cannot, and how many rows repeat a pair. ``known`` are earlier
    parts of the same users."""
    n_items, first = known[0].n_items, known[0]
    row_users, row_items = new_user[part.users], new_item[part.items]
    in_universe = (row_users >= 0) & (row_items >= 0)
    pairs = np.concatenate([each.users_of_rows() * n_items + each.items for each in known])
    pairs.sort(kind="stable")  # which merges runs: each part ascends
    repeated = in_universe & _among(row_users * n_items + row_items, pairs)
    keep = in_universe & ~repeated
    # the same arrays of ids in all parts, so that comparing them costs nothing
    ids, (_, _, *order) = (first.user_ids, first.item_ids), part.take(keep)
    found = Interactions.from_rows(*ids, row_users[keep], row_items[keep], *order)
    report = HeldOut(
        interactions=part.users.size,
        unknown_users=_occurring(part.users[row_users < 0], new_user.size).size,
        unknown_items=_occurring(part.items[row_items < 0], new_item.size).size,
        known_pairs=int(repeated.sum()),
        left_out=int((~keep).sum()),
    )
    return found, report, int(keep.sum()) - found.n_interactions


def _new_users(
    name: str, user_ids: Ids, item_ids: Ids, part: Rows, trained: Ints, new_item: Ints
) -> tuple[Interactions, Ints, NewUsers]:
    """The known interactions of new users, the new index of each user, and the counts. ``trained`` is the index of each
    user in training, or -1."""
    if both := _occurring(part.users[trained[part.users] >= 0], user_ids.size).size:
        raise DataError(
            f"{name}: new_users and training have {counted(both, 'user')} in common; expected users who are in one of "
            "them alone"
        )
    keep = new_item[part.items] >= 0
    users = _occurring(part.users[keep], user_ids.size)
    if not users.size:
        raise DataError(f"{name}: no held-out user has known interactions with items of training; expected one or more")
    new_user = _renumbering(users, user_ids.size)
    kept = part.take(keep)
    found = Interactions.from_rows(user_ids[users], item_ids, new_user[kept.users], new_item[kept.items], *kept[2:])
    counts = NewUsers(found.n_users, found.n_interactions, unknown_items=int((~keep).sum()))
    return found, new_user, counts


def _occurring(indices: Ints, size: int) -> Ints:
    """The distinct values of ``indices``, which are below ``size``, in ascending order."""
    return np.flatnonzero(np.bincount(indices, minlength=size))


def _among(values: Ints, ascending: Ints) -> NDArray[np.bool_]:
    """Whether each of ``values`` occurs in ``ascending``, which is sorted and not empty."""
    found: NDArray[np.bool_] = ascending[np.minimum(np.searchsorted(ascending, values), ascending.size - 1)] == values
    return found


def _renumbering(kept: Ints, size: int) -> Ints:
    """int64 [size] the new index of each old one: its place in ``kept``, or -1 where it is not kept."""
    numbers = np.full(size, -1, dtype=np.int64)
    numbers[kept] = np.arange(kept.size)
    return numbers
