"""Relations between users, such as trust or friendship: a second table beside the interactions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.formats import LAYOUTS
from perfedrec.data.interactions import Ids, Ints, encode
from perfedrec.data.tables import read_table
from perfedrec.data.text import UnreadableError, clean, read_bytes
from perfedrec.data.values import convert

ROLES = {"user": "user", "item": "second user", "rating": "weight"}
"""What the reader of interactions calls the user that a relation goes out from, the one that it leads to, and its
weight; and what messages call them."""

LINES = "`user user` or `user user weight`"


@dataclass(frozen=True, eq=False, repr=False)
class Relations:
    """Directed relations between ``n_users`` users: ``sources`` [E] trust, or follow, ``targets`` [E].

    Both are int64 places of users among those of training; pairs ascend, each is there once, and none is of a user with
    itself. Raises :class:`DataError` for others.
    """

    n_users: int
    sources: Ints
    targets: Ints

    def __post_init__(self) -> None:
        pairs = self.sources * self.n_users + self.targets
        inside = all(not each.size or 0 <= each.min() <= each.max() < self.n_users for each in self._both())
        if not inside or bool(np.any(self.sources == self.targets)) or bool(np.any(np.diff(pairs) <= 0)):
            raise DataError(
                f"relations must be ascending pairs of different users below {self.n_users}, each pair once; "
                "Relations.of() makes them so"
            )
        for name, each in zip(("sources", "targets"), self._both(), strict=True):
            frozen = each.view()
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)

    def _both(self) -> tuple[Ints, Ints]:
        return self.sources, self.targets

    def __repr__(self) -> str:
        return f"<Relations between {self.n_users:,} users: {self.sources.size:,}>"

    @staticmethod
    def of(n_users: int, sources: Ints, targets: Ints) -> Relations:
        """From pairs in any order: those that repeat, and those of a user with itself, are left out."""
        pairs = np.unique(sources.astype(np.int64) * n_users + targets)
        return Relations(n_users, *(each[pairs // n_users != pairs % n_users] for each in np.divmod(pairs, n_users)))

    def without(self, users: Sequence[int]) -> Relations:
        """The same without those from or to the ``users``."""
        kept = ~np.isin(self.sources, users) & ~np.isin(self.targets, users)
        return Relations(self.n_users, self.sources[kept], self.targets[kept])

    @property
    def mutual(self) -> int:
        """The number of relations whose reverse is there too."""
        here, back = (one * self.n_users + other for one, other in (self._both(), self._both()[::-1]))
        return int(np.isin(here, back).sum())

    def facts(self) -> dict[str, Any]:
        """What ``data info`` shows: ``relations``, ``mutual``, and the ``users`` who have any."""
        users = np.union1d(*self._both()).size
        return {"relations": int(self.sources.size), "mutual": self.mutual, "users": int(users)}


def read_relations(source: str | Path | pl.DataFrame, ids: Ids) -> tuple[Relations, tuple[str, ...]]:
    """Read relations between the users ``ids`` [n] from a file, and tell in sentences what was left out.

    A line is ``user user`` or ``user user weight``, between commas, semicolons, tabs or white space, with or without a
    header (``trust.txt`` of SELFRec, CSV): the first user trusts, or follows, the second. A data frame has these as its
    first columns. Relations whose weight is not above 0 do not count; other weights make no difference. Left out are
    relations with a user who is not among ``ids`` and those of a user with itself; repeated ones count once.

    Raises :class:`DataError` for a broken file, where no relation is left, and for a source of another type.
    """
    if not isinstance(source, str | Path | pl.DataFrame):
        raise DataError(
            f"relations: got {type(source).__name__}; expected a file, or a data frame of polars whose first two "
            'columns are users: polars.DataFrame({"user": [1, 2], "trusts": [2, 3]})'
        )
    name = "relations" if isinstance(source, pl.DataFrame) else str(source)
    try:
        frame = _of_frame(source) if isinstance(source, pl.DataFrame) else _of_file(Path(source))
    except UnreadableError as error:
        problem = str(error)
        for role, called in ROLES.items():
            problem = problem.replace(f": {role} is ", f": {called} is ", 1)
        form = f"a line is {LINES}" if "expected" in problem else f"expected two users a line, {LINES}"
        raise DataError(f"{problem}; {form}") from None
    n_rows = frame.height
    if "rating" in frame.columns:
        frame = frame.filter(pl.col("rating") > 0)
    sources, targets = encode(frame["user"], ids), encode(frame["item"], ids)
    known = (sources >= 0) & (targets >= 0)
    own = int((known & (sources == targets)).sum())
    found = Relations.of(ids.size, sources[known], targets[known])
    facts, n_known = found.facts(), int(known.sum())
    counts = (
        (n_rows - frame.height, "with a weight that is not above 0"),
        (frame.height - n_known, "with a user who is not in training"),
        (own, "of a user with itself"),
        (n_known - own - facts["relations"], "repeated"),
    )
    left = "; ".join(f"{count:,} {what}" for count, what in counts if count)
    if not facts["relations"]:
        raise DataError(
            f"{name}: no relation between users of training is left of {n_rows:,}{left and f' ({left})'}; expected "
            "lines of two users, with the ids of the interactions"
        )
    line = (
        f"{name}: {facts['relations']:,} relations, {facts['mutual']:,} of them mutual, between {facts['users']:,} of "
        f"{ids.size:,} users"
    )
    return found, (line, *((f"{name}: left out of {n_rows:,} relations: {left}",) if left else ()))


def _of_frame(source: pl.DataFrame) -> pl.DataFrame:
    """The first columns of a data frame, by the names of :data:`ROLES`."""
    if source.width < 2:
        raise DataError(f"relations: the frame has {source.width} column; expected two users, or a weight too")
    names = dict(zip(source.columns, ROLES, strict=False))
    return convert(Path("relations"), source.select(list(names)).rename(names), False, lambda row: f"row {row + 1}")[0]


def _of_file(path: Path) -> pl.DataFrame:
    """The columns of a file, by the names of :data:`ROLES`; a weight where its first line has a third field."""
    text = clean(path, read_bytes(path))
    first = text.lstrip(b"\n").split(b"\n", 1)[0]
    places = {role: place + 1 for place, role in enumerate(list(ROLES)[: len(re.split(rb"[,;|\t ]+", first.strip()))])}
    if len(places) < 2:
        raise UnreadableError(f"{path}: has one column")
    cells = read_table(path, text, LAYOUTS["csv"], places, None)
    return convert(path, cells.table, cells.integers, cells.place)[0]


def planted(clusters: Ints, per_user: float, strength: float, seed: int) -> Relations:
    """Relations for synthetic data: each user trusts ``per_user`` others on average (Poisson), each with probability
    ``strength`` one of its own taste cluster, otherwise any. ``clusters`` [n] are those of the users.

    Raises :class:`DataError` where ``per_user`` is not above 0.
    """
    if not per_user > 0:
        raise DataError(f"synthetic data: relations is the mean number of each user, above 0, got {per_user:g}")
    rng, n = np.random.default_rng([seed, 1]), clusters.size
    sources = np.repeat(np.arange(n), rng.poisson(per_user, size=n))
    order = np.argsort(clusters, kind="stable")
    first = np.searchsorted(clusters[order], np.arange(clusters.max() + 2))
    low, high = (first[clusters[sources] + step] for step in (0, 1))
    own = rng.random(sources.size) < strength
    start, end = np.where(own, low, 0), np.where(own, high, n)
    places = start + ((end - start) * rng.random(sources.size)).astype(np.int64)
    return Relations.of(n, sources, order[places])
