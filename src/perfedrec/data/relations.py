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
from perfedrec.data.formats import read
from perfedrec.data.interactions import Ids, Ints, encode
from perfedrec.data.text import clean, read_bytes

ROLES = ("user", "item", "rating")
"""What the reader of interactions calls the user that a relation goes out from, the one that it leads to, and its
weight."""


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

    Raises :class:`DataError` for a broken file, and where no relation is left.
    """
    if isinstance(source, pl.DataFrame):
        if source.width < 2:
            raise DataError(f"relations: the frame has {source.width} column; expected two users, or a weight too")
        names = dict(zip(source.columns, ROLES, strict=False))
        name, frame = "relations", source.select(list(names)).rename(names)
    else:
        name, frame = str(source), read(source, "csv", _columns(Path(source)), min_rating=0.0)
    n_rows = frame.height
    if "rating" in frame.columns:
        frame = frame.filter(pl.col("rating") > 0)
    sources, targets = encode(frame["user"], ids), encode(frame["item"], ids)
    known = (sources >= 0) & (targets >= 0)
    own = int((known & (frame["user"] == frame["item"]).to_numpy()).sum())
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
            f"{name}: no relation between users of training is left of {n_rows:,} ({left}); expected lines of two "
            "users, with the ids of the interactions"
        )
    line = (
        f"{name}: {facts['relations']:,} relations, {facts['mutual']:,} of them mutual, between {facts['users']:,} of "
        f"{ids.size:,} users"
    )
    return found, (line, *((f"{name}: left out of {n_rows:,} relations: {left}",) if left else ()))


def _columns(path: Path) -> dict[str, str | int]:
    """The places of the columns of a file: two users, and a weight where its first line has a third field."""
    first = clean(path, read_bytes(path)).lstrip(b"\n").split(b"\n", 1)[0]
    return {role: place + 1 for place, role in enumerate(ROLES[: len(re.split(rb"[,;|\t ]+", first.strip()))])}


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
