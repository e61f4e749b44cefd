"""Splitting interactions into training, validation and test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from perfedrec.core import mapped
from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset, Rows, Ties, assemble
from perfedrec.data.formats import check_name
from perfedrec.data.interactions import Interactions, Ints, ordering
from perfedrec.data.parts import parted
from perfedrec.data.times import SIZES, time_unit, utc

SPLITS = ("leave-one-out", "ratio", "global-time", "folds", "users")
ORDERS = ("time", "file", "random")
TIES = ("random", "together")
FEWEST = 3  # one interaction for each part
RATIO = (0.8, 0.1, 0.1)
TEST_USERS = 0.1
_NAME_TIMES = "name the column of times with --columns timestamp=NAME"
_OF = {
    "ratio": ("ratio", "global-time"),
    "valid_from": ("global-time",),
    "test_from": ("global-time",),
    "folds": ("folds",),
    "test_users": ("users",),
}
"""The splits that use an option; the first one is meant where no split is named."""

Moment = str | int | date


class MoreOptions(TypedDict, total=False):
    """Options of :func:`split` that are keyword arguments."""

    ties: str
    valid_from: Moment | None
    test_from: Moment | None
    folds: int | None
    fold: int
    test_users: float | None
    train_on_valid: bool


@dataclass(frozen=True)
class SplitRule:
    """How interactions are split: the options of :func:`split`.

    Without ``how``, the split is the one that the other options belong to, or else leave-one-out. ``order`` may also be
    "auto": by time where there are timestamps, or else by place in the file where this is the order in time. With
    ``train_on_valid``, what the split gives to validation is in training instead, and validation is empty. Raises
    :class:`DataError` for options that are wrong or have no effect.
    """

    how: str | None = None
    order: str = "auto"
    ties: str = "random"
    ratio: tuple[float, float, float] | None = None
    valid_from: Moment | None = None
    test_from: Moment | None = None
    folds: int | None = None
    fold: int = 0
    test_users: float | None = None
    seed: int = 0
    train_on_valid: bool = False

    def __post_init__(self) -> None:
        given = [option for option in _OF if getattr(self, option) is not None]
        how = self.how or implied(given)
        object.__setattr__(self, "how", how)
        check_name(how, SPLITS, "split")
        check_name(self.order, ("auto", *ORDERS), "order")
        check_name(self.ties, TIES, "ties")
        for option in given:
            if how not in _OF[option]:
                raise DataError(f"{option} changes nothing with split {how}; it belongs to {' and '.join(_OF[option])}")
        ratio = RATIO if self.ratio is None else self.ratio
        if min(ratio) < 0 or ratio[0] <= 0 or not np.isclose(sum(ratio), 1):
            raise DataError(f"ratio must be three shares that add up to 1, the first above 0, got {ratio}")
        if self.test_users is not None and not 0 < self.test_users < 1:
            raise DataError(f"test_users must be a share of users between 0 and 1, such as 0.1, got {self.test_users}")
        if self.seed < 0:
            raise DataError(f"the seed of a split must be at least 0, got {self.seed}")
        if self.ties == "together" and (how not in ("leave-one-out", "ratio") or self.order in ("file", "random")):
            raise DataError("ties together changes nothing here; it belongs to leave-one-out and ratio by time")
        if how == "global-time":
            self._check_times()
        if how == "folds" and (self.folds is None or self.folds < 2):
            raise DataError(f"split folds needs the number of folds, at least 2, got {self.folds}")
        if self.fold and how != "folds":
            raise DataError(f"fold changes nothing with split {how}; it belongs to folds")
        if not 0 <= self.fold < (self.folds or 1):
            raise DataError(f"fold must be from 0 to {(self.folds or 1) - 1}, got {self.fold}")

    def _check_times(self) -> None:
        if self.order in ("file", "random"):
            raise DataError(f"split global-time is by time; expected no order {self.order}")
        if (self.valid_from is None) != (self.test_from is None) or (self.valid_from is not None and self.ratio):
            raise DataError("split global-time needs either ratio, or both valid_from and test_from")
        if self.valid_from is not None and self.test_from is not None and not self.times[0] <= self.times[1]:
            raise DataError(f"valid_from must not be later than test_from, got {self.valid_from} and {self.test_from}")

    @property
    def times(self) -> tuple[int, int]:
        """``valid_from`` and ``test_from`` in seconds since 1970, where they are given."""
        assert self.valid_from is not None
        assert self.test_from is not None
        return _seconds("valid_from", self.valid_from), _seconds("test_from", self.test_from)

    def by_time(self, timed: bool) -> bool:
        """Whether each user's interactions are in order of time; ``timed``: whether there are timestamps.

        Raises :class:`DataError` where times are wanted and there are none.
        """
        if self.order == "time" and not timed:
            raise DataError(f"the data have no timestamps to split by; expected order random, or {_NAME_TIMES}")
        if self.ties == "together" and not timed:
            raise DataError(f"the data have no timestamps; expected no ties together, or {_NAME_TIMES}")
        return timed and self.order not in ("file", "random")

    def by_file(self, timed: bool, placed: bool) -> bool:
        """Whether each user's interactions are in the order of the file; ``placed``: whether this order is known.

        Raises :class:`DataError` where this order is wanted and not known.
        """
        if self.order == "file" and not placed:
            raise DataError("the order of the file is not known; expected another order than file")
        return placed and (self.order == "file" or (self.order == "auto" and not timed))


def implied(options: Iterable[str]) -> str:
    """The split that is meant where it is not named, and these ``options`` are given."""
    given = set(options)
    return next((splits[0] for option, splits in reversed(_OF.items()) if option in given), "leave-one-out")


def parse_ratio(text: str) -> tuple[float, float, float]:
    """The shares in a text such as ``0.8,0.1,0.1``. Raises :class:`DataError` for any other text."""
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"ratio is {text!r}; expected three shares, such as 0.8,0.1,0.1") from None
    return train, valid, test


class _Cut(NamedTuple):
    """Which part each row [nnz] belongs to, and what the report says of it: 0, 1, 2, or 3 for what is known of new
    users; -1 is left out."""

    part: NDArray[np.int8]
    made: str
    short_users: int = 0
    short_of: str = "3 interactions"
    ties: Ties | None = None
    by_time: bool = False
    drawn: bool = False
    short_new_users: int = 0


def split(
    interactions: Interactions,
    how: str | None = None,
    order: str = "time",
    ratio: tuple[float, float, float] | None = None,
    seed: int = 0,
    name: str = "data",
    **more: Unpack[MoreOptions],
) -> Dataset:
    """Split interactions into training, validation and test.

    The options after ``name`` are ``ties`` ("random"), ``valid_from``, ``test_from``, ``folds`` (None), ``fold``
    (0), ``test_users`` (None) and ``train_on_valid`` (False). ``how`` is one of

    - "leave-one-out" (the default): the last interaction of each user is for testing, the one before for validation;
    - "ratio": of each user's interactions, the first ``ratio[0]`` are for training and the last ``ratio[2]`` for
      testing (default 0.8, 0.1, 0.1); the limits between the parts are rounded;
    - "global-time": interactions before ``valid_from`` are for training, those from ``test_from`` on for testing, those
      between for validation. Both are dates, ISO times (in UTC where they name no zone) or seconds since 1970. Without
      them, the two times are chosen so that the parts have the shares ``ratio`` of all interactions;
    - "users": the share ``test_users`` of all users (default 0.1, rounded, at least one user) is drawn at random and
      held out from training as a whole. Of each of them one interaction is tested, the last one in ``order``, and the
      others are known: they are :attr:`Dataset.new_users`. Only interactions with items of training count, and a
      held-out user with fewer than 2 of them is left out. Validation is one interaction of each other user, see
      :func:`validation_rows`;
    - "folds": each user's interactions are dealt at random into ``folds`` parts that differ by at most one interaction;
      part ``fold``, counted from 0, is for testing. Validation is one random interaction of each user, see
      :func:`validation_rows`.

    Leave-one-out, ratio and users put the interactions of a user in ``order``: by "time", "file" (by ``positions``),
    "random", or "auto", which is by time where there are timestamps, or else by positions where there are any. In
    leave-one-out and ratio, users with fewer than 3 interactions stay in training. With ``ties`` "random", interactions
    at the same time are in random order, so that ids have no influence. With "together", a user's interactions at the
    same time are never in different parts: leave-one-out tests all those at the last time and validates with all those
    at the time before; a limit of ratio moves to the nearest change of time (of two that are equally near, to the
    earlier one), but never to the start; and users with fewer than 3 different times stay in training.

    With ``train_on_valid``, the validation interactions are in training instead. ``seed`` (at least 0) decides what is
    random, and ``name`` is the name of the data set. Its ``notes`` count what was
    left out and how often chance decided. Raises :class:`DataError` for wrong options, options that have no effect,
    missing timestamps, and a training part that would be empty.
    """
    return split_by(SplitRule(how, order, ratio=ratio, seed=seed, **more), interactions, name)


def split_by(rule: SplitRule, interactions: Interactions, name: str = "data") -> Dataset:
    """:func:`split` by a rule that was made before."""
    cuts = {"leave-one-out": _by_user, "ratio": _by_user, "global-time": _by_global_time, "folds": _by_folds}
    cuts["users"] = _by_held_out_users
    cut = cuts[str(rule.how)](rule, interactions)
    times, part = interactions.timestamps, cut.part
    ties, joined = cut.ties, int((part == 1).sum())
    if rule.train_on_valid:
        part[part == 1] = 0
        ties = None if ties is None else replace(ties, any=ties.test)
    if rule.how == "users":
        every = Rows(interactions.users_of_rows(), interactions.items, times, interactions.positions)
        rows = [every.take(part == p) for p in range(4)]
        data = assemble(name, interactions.user_ids, interactions.item_ids, rows, cut.made, cut.short_users)
    else:
        data = parted(name, interactions, part, cut.made, cut.short_users)
    ahead = cut.by_time and times is not None and _looks_ahead(interactions, times, part)
    notes = replace(data.notes, short_of=cut.short_of, ties=ties, drawn=cut.drawn, looks_ahead=ahead)
    if rule.train_on_valid:
        notes = replace(notes, trained_on_valid=joined)
    if notes.new_users is not None:
        notes = replace(notes, new_users=replace(notes.new_users, short_users=cut.short_new_users))
    return replace(data, notes=notes)


def _looks_ahead(interactions: Interactions, times: Ints, part: NDArray[np.int8]) -> bool:
    """Whether a training interaction is later than a test interaction."""
    latest, earliest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    for _, rows in interactions.blocks():
        trained, tested = (times[rows][part[rows] == number] for number in (0, 2))
        latest = max(latest, int(trained.max(initial=latest)))
        earliest = min(earliest, int(tested.min(initial=earliest)))
    return latest > earliest


def validation_rows(
    users: Ints, items: Ints, times: Ints | None, seed: int, together: bool = False
) -> tuple[NDArray[np.bool_], Ties | None]:
    """bool [rows] which training interactions become validation where no validation part is given, and their ties.

    One interaction of each user who has at least 2: the last one by ``times`` [rows] (interactions at the same time are
    in random order), or a random one where these are None. With ``together``, it is all interactions at the user's last
    time, if any are left. One interaction of each item always stays in training, the earliest or a random one; then it
    is the user's next one that is taken. Therefore training keeps all its users and items, and all test interactions
    can still be evaluated. ``users`` and ``items`` [rows] are indices, and no pair may occur twice.
    """
    if not users.size:
        return np.zeros(0, dtype=bool), None
    chance = np.random.default_rng(seed).random(users.size)
    keys = [chance] if times is None else [times, chance]
    first_of_item = ordering(items, *keys)
    first_of_item = first_of_item[np.concatenate([[True], np.diff(items[first_of_item]) > 0])]
    free = np.ones(users.size, dtype=bool)
    free[first_of_item] = False
    free &= np.bincount(users)[users] >= 2
    free_rows = np.flatnonzero(free)
    taken = np.zeros(users.size, dtype=bool)
    if not free_rows.size:
        return taken, None
    sequence = free_rows[ordering(users[free_rows], *(key[free_rows] for key in keys))]
    is_last = np.concatenate([np.diff(users[sequence]) > 0, [True]])
    last = sequence[is_last]
    taken[last] = True
    if times is None:
        return taken, None
    before = np.concatenate([[last[0]], sequence[:-1]])[is_last]
    tied = (before != last) & (users[before] == users[last]) & (times[before] == times[last])
    if not together:
        return taken, Ties(int(last.size), 0, int(tied.sum()), seed)
    last_time = np.full(int(users.max()) + 1, -1, dtype=np.int64)
    last_time[users[last]] = times[last]
    taken = free & (times == last_time[users])
    whole = np.bincount(users, taken) == np.bincount(users)  # nothing of these users would be left in training
    return taken & ~whole[users], None


class _Cuts(NamedTuple):
    """How the rows of a block of users were cut: their ``part`` [rows], and for how many users there are too ``few``
    rows, chance decided what is tested (``test``), and what is held out (``any``)."""

    part: NDArray[np.int8]
    few: int
    test: int
    any: int


def _by_user(rule: SplitRule, interactions: Interactions) -> _Cut:
    """Cut each user's interactions where the split says: the first rows train, then rows validate, the last test."""
    times, generator = interactions.timestamps, np.random.default_rng(rule.seed)
    by_time = rule.by_time(times is not None)
    by_file = rule.by_file(times is not None, interactions.positions is not None)
    together = by_time and rule.ties == "together"
    along = times if by_time else interactions.positions if by_file else None
    part, counts = mapped.empty(interactions.n_interactions, np.int8), []
    for users, rows in interactions.blocks():  # a generator gives the same numbers in one call or in many
        chance = generator.random(rows.stop - rows.start)
        own = None if along is None else along[rows]
        part[rows], *numbers = _cut_block(rule, interactions.degrees[users], own, chance, together)
        counts.append(numbers)
    short, test, either = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    shares = "" if rule.how == "leave-one-out" else " " + ":".join(f"{share:g}" for share in rule.ratio or RATIO)
    if by_file:
        return _Cut(part, f"{rule.how}{shares} in the order of the file", short)
    if not by_time:
        return _Cut(part, f"{rule.how}{shares} in random order (seed {rule.seed})", short, drawn=True)
    made = f"{rule.how}{shares} by time" + (", interactions at the same time together" if together else "")
    if together:
        return _Cut(part, made, short, "3 different times", by_time=True)
    return _Cut(part, made, short, ties=Ties(interactions.n_users - short, test, either, rule.seed), by_time=True)


def _cut_block(rule: SplitRule, counts: Ints, along: Ints | None, chance: NDArray[np.float64], together: bool) -> _Cuts:
    """Cut the rows of a block of users, who have ``counts`` [b] of them, in the order ``along`` [rows] and then of
    ``chance`` [rows]."""
    users = np.repeat(np.arange(counts.size), counts)
    sequence = ordering(users, chance) if along is None else ordering(users, along, chance)
    starts = np.cumsum(counts) - counts
    place = np.arange(sequence.size) - starts[users]  # of the rows in sequence, within their user
    changes = place == 0  # where a user, a time or a place in the file begins, in sequence
    if along is not None:
        changes[1:] |= np.diff(along[sequence]) != 0
    group = np.cumsum(changes) - 1
    first_group = group[starts[users]]  # of the user of each row
    size = np.bincount(users, changes, counts.size).astype(np.int64) if together else counts
    if rule.how == "leave-one-out":
        where, train_end, valid_end = (group - first_group if together else place), size - 2, size - 1
    else:
        where, ratio = place, rule.ratio or RATIO
        train_end = np.maximum(1, np.rint(counts * ratio[0])).astype(np.int64)
        valid_end = np.maximum(train_end, np.ceil(counts * (1 - ratio[2]) - 0.5).astype(np.int64))
        if together:
            train_end = _to_change(train_end, starts, counts, changes)
            valid_end = np.maximum(train_end, _to_change(valid_end, starts, counts, changes))
    short = size < FEWEST
    train_end[short] = valid_end[short] = size[short] if rule.how == "leave-one-out" else counts[short]
    part = np.empty(sequence.size, dtype=np.int8)
    part[sequence] = (where >= train_end[users]).astype(np.int8) + (where >= valid_end[users])
    test, valid = (_inside(end, starts, counts, changes) for end in (valid_end, train_end))
    return _Cuts(part, int(short.sum()), int(test.sum()), int((test | valid).sum()))


def _inside(ends: Ints, starts: Ints, counts: Ints, changes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [n] whether the limit before place ``ends`` [n] of each user is between interactions at the same time."""
    real = (ends > 0) & (ends < counts)
    found = np.zeros(ends.size, dtype=bool)
    found[real] = ~changes[(starts + ends)[real]]
    return found


def _to_change(ends: Ints, starts: Ints, counts: Ints, changes: NDArray[np.bool_]) -> Ints:
    """int64 [n] the limits before the places ``ends`` [n], moved to the nearest change of time (see :func:`split`)."""
    at = np.concatenate([np.flatnonzero(changes), [changes.size]])  # ends of users are among them
    wanted = starts + ends
    after = at[np.minimum(np.searchsorted(at, wanted), at.size - 1)]
    before = at[np.maximum(np.searchsorted(at, wanted, side="right") - 1, 0)]
    early = (wanted - before <= after - wanted) & (before > starts)
    moved: Ints = np.where(early, before, after) - starts
    return np.where(ends < counts, moved, ends)


def _by_global_time(rule: SplitRule, interactions: Interactions) -> _Cut:
    times = interactions.timestamps
    if times is None or not times.size:
        raise DataError(f"the data have no timestamps; expected another split than global-time, or {_NAME_TIMES}")
    unit = time_unit(int(times.max()))
    if rule.test_from is not None:
        valid_from, test_from = (seconds * SIZES[unit] for seconds in rule.times)
        made = "global-time"
    else:
        ratio, ascending = rule.ratio or RATIO, np.sort(times)
        ends = [round(times.size * share) for share in (ratio[0], ratio[0] + ratio[1])]
        valid_from, test_from = (int(ascending[end] if end < times.size else ascending[-1] + 1) for end in ends)
        made = "global-time " + ":".join(f"{share:g}" for share in ratio)
    if valid_from <= int(times.min()):
        raise DataError(
            f"no interaction is before {_utc(valid_from, unit)}, where validation starts; the times are from "
            f"{_utc(int(times.min()), unit)} to {_utc(int(times.max()), unit)}"
        )
    made += f", validation from {_utc(valid_from, unit)}, test from {_utc(test_from, unit)}"
    return _Cut((times >= valid_from).astype(np.int8) + (times >= test_from), made)


def _by_folds(rule: SplitRule, interactions: Interactions) -> _Cut:
    users, folds = interactions.users_of_rows(), rule.folds or 2
    generator = np.random.default_rng(rule.seed)
    sequence = ordering(users, generator.random(users.size))
    first = generator.integers(folds, size=interactions.n_users)  # so that no fold is larger for many small users
    dealt = np.empty_like(sequence)
    dealt[sequence] = (np.arange(users.size) - interactions.offsets[:-1][users] + first[users]) % folds
    part = np.where(dealt == rule.fold, 2, 0).astype(np.int8)
    rest = np.flatnonzero(part == 0)
    chosen, _ = validation_rows(users[rest], interactions.items[rest], None, rule.seed)
    part[rest[chosen]] = 1
    made = f"fold {rule.fold} of {folds} at random (seed {rule.seed}), validation: one random interaction of each user"
    return _Cut(part, made, drawn=True)


def _by_held_out_users(rule: SplitRule, interactions: Interactions) -> _Cut:
    users, items, times, n = (
        interactions.users_of_rows(),
        interactions.items,
        interactions.timestamps,
        interactions.n_users,
    )
    if n < 2:
        raise DataError(f"split users needs at least 2 users: some for training, others for testing; there is {n}")
    by_time = rule.by_time(times is not None)
    by_file = rule.by_file(times is not None, interactions.positions is not None)
    along = times if by_time else interactions.from_last() if by_file else None
    share = TEST_USERS if rule.test_users is None else rule.test_users
    generator = np.random.default_rng(rule.seed)
    held = np.zeros(n, dtype=bool)
    held[generator.permutation(n)[: min(max(round(n * share), 1), n - 1)]] = True
    part = np.where(held[users], 3, 0).astype(np.int8)
    trained = np.bincount(items[part == 0], minlength=interactions.n_items) > 0  # validation leaves each of them there
    rest = np.flatnonzero(part == 0)
    chosen, _ = validation_rows(users[rest], items[rest], None if along is None else along[rest], rule.seed)
    part[rest[chosen]] = 1
    short = held & (np.bincount(users[trained[items]], minlength=n) < 2)
    part[short[users]] = -1
    rows = np.flatnonzero((part == 3) & trained[items])
    if not rows.size:
        raise DataError(
            f"no held-out user has 2 interactions with items of training ({counted(int(held.sum()), 'user')} tried); "
            "expected another share test_users, or more data"
        )
    keys = [generator.random(rows.size)]
    sequence = rows[ordering(users[rows], *([] if along is None else [along[rows]]), *keys)]
    part[sequence[np.concatenate([np.diff(users[sequence]) > 0, [True]])]] = 2
    which = "the last interaction by time" if by_time else "the last interaction in the file" if by_file else ""
    which = which or "one random interaction"
    made = (
        f"users: {share * 100:.3g}% of all users are held out, drawn at random (seed {rule.seed}); tested: {which} of "
    )
    made += f"each of them; validation: {which} of each other user who has two or more"
    return _Cut(part, made, by_time=by_time, drawn=True, short_new_users=int(short.sum()))


def _seconds(option: str, moment: Moment) -> int:
    """A date, an ISO time or seconds as seconds since 1970."""
    try:
        if isinstance(moment, int):
            return moment
        if isinstance(moment, str):
            moment = moment.strip()
            if moment.isdecimal():
                return int(moment)
            moment = datetime.fromisoformat(moment)
        elif not isinstance(moment, datetime):
            moment = datetime.combine(moment, time())
    except ValueError:
        raise DataError(
            f"{option} is {moment!r}; expected a date such as 2015-01-31, an ISO time or seconds since 1970"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _utc(value: int, unit: str) -> str:
    return utc(value, unit).strftime("%Y-%m-%d %H:%M:%S")
