"""The users of a node in its file: ids, identities, attributes and interactions, and the catalogue of items.

A user has two names. The external id is the text that the node's owner uses; it never leaves the node. The identity is
the integer by which the federation knows the user. A user who has no identity yet is addressed on the node itself by a
negative number.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.core.types import Rows
from perfedrec.data import Catalogue, Encoding
from perfedrec.data.interactions import Ids, Ints, encode
from perfedrec.runtimes.node.database import Database, StoreError
from perfedrec.runtimes.node.file import NodeFile, counts, insert_interactions, insert_users


class Imported(NamedTuple):
    """What an import changed: numbers of new users and of new interactions, and of rows that were ``skipped`` because
    their item is unknown."""

    users: int
    interactions: int
    skipped: int


class UserStore(NodeFile):
    """The part of a :class:`~perfedrec.runtimes.node.store.Store` that holds users, interactions and the catalogue."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        described = json.loads(self._encoding)
        names, ranges = zip(*described, strict=True) if described else ((), ())
        self.encoding = Encoding(names, tuple((low, high) for low, high in ranges)) if names else None
        """How the users' attributes become numbers; ``None`` where the federation uses no attributes."""

        self._items: Ids | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Let nobody else change the file in the block, and store what the block writes together."""
        with self._database.writing():
            yield

    # --- catalogue ---

    @property
    def item_ids(self) -> Ids:
        """[m] external ids of the catalogue, int64 or objects of str."""
        if self._items is None:
            with self._database.reading() as db:
                found = [each for (each,) in db.execute("SELECT id FROM items ORDER BY item")]
            self._items = np.array([int(each) for each in found]) if self._integers else np.array(found, dtype=object)
        return self._items

    @property
    def n_user_attributes(self) -> int:
        """Numbers that describe a user; 0 where the federation uses no attributes."""
        return 0 if self.encoding is None else len(self.encoding.names)

    def check_catalogue(self, catalogue: Catalogue) -> None:
        """Raises :class:`StoreError` if ``catalogue`` is not the catalogue of this node."""
        if catalogue.fingerprint == self.catalogue:
            return
        raise StoreError(
            f"{self.path}: has a catalogue of {counted(self.n_items, 'item')} and "
            f"{counted(self.n_user_attributes, 'user attribute')}, "
            f"{self.catalogue}, and the federation one of {len(catalogue.item_ids)} and {catalogue.n_user_attributes}, "
            f"{catalogue.fingerprint}; expected the same items in the same order, and the same attributes"
        )

    # --- interactions and attributes ---

    def import_interactions(
        self,
        frame: pl.DataFrame,
        *,
        skip_unknown: bool = False,
        identities: Mapping[str, int] | None = None,
        first_identity: int | None = None,
        attributes: Mapping[str, Sequence[float]] | None = None,
    ) -> Imported:
        """Add the interactions of ``frame``, columns ``user`` and ``item`` in external ids: all of them or none.

        A column ``part`` says where the data are split already: the number of each interaction's part
        (:mod:`perfedrec.evaluation.holdout`). Interactions that are already stored stay as they are. A new user gets an
        identity from ``identities``, by external id; or, with ``first_identity``, the next number from there, in the
        order of the frame; or none yet. ``attributes`` gives F numbers for an external id; they replace those that are
        stored, and entries of users who are not on this node are ignored.

        Raises :class:`DataError` for an unknown item, unless ``skip_unknown`` leaves such rows out; for an identity
        that is negative, belongs to another user or differs from the stored one; and for attributes that are not F
        numbers.
        """
        items = encode(frame["item"], self.item_ids)
        unknown = items < 0
        if unknown.any() and not skip_unknown:
            first = frame["item"][int(np.argmax(unknown))]
            raise DataError(
                f"{int(unknown.sum()):,} of {counted(items.size, 'interaction')} have items that are not in the "
                "catalogue of "
                f"{self.path}, the first with {first!r}; expected known items, or --skip-unknown"
            )
        users: list[str] = frame["user"].cast(pl.String).to_numpy()[~unknown].tolist()
        parts = frame["part"].to_numpy()[~unknown].tolist() if "part" in frame.columns else [None] * len(users)
        with self._database.writing() as db:
            before = counts(db)
            given = dict(identities or {})
            if first_identity is not None:
                new = [each for each in dict.fromkeys(users) if not _exists(db, each)]
                given |= {user: number for number, user in enumerate(new, first_identity)}
            insert_users(db, [(user, given.get(user)) for user in dict.fromkeys(users)])
            insert_interactions(db, zip(items[~unknown].tolist(), parts, users, strict=True))
            self._set_attributes(db, attributes or {})
            after = counts(db)
        return Imported(after[0] - before[0], after[1] - before[1], int(unknown.sum()))

    def _set_attributes(self, db: sqlite3.Connection, attributes: Mapping[str, Sequence[float]]) -> None:
        """Store the attributes [F] of users, by external id."""
        for user, values in attributes.items():
            if len(values) != self.n_user_attributes:
                raise DataError(
                    f"user {user!r} has {len(values)} attributes; expected the {self.n_user_attributes} of {self.path}"
                )
            content = np.asarray(values, dtype=np.float32).tobytes()
            db.execute("UPDATE users SET attributes = ? WHERE id = ?", (content, user))

    # --- identities ---

    def unregistered(self) -> list[str]:
        """External ids of the users who have no identity, in the order in which they were added."""
        with self._database.reading() as db:
            return [each for (each,) in db.execute("SELECT id FROM users WHERE identity IS NULL ORDER BY user")]

    def register(self, identities: Mapping[str, int]) -> None:
        """Give users, by external id, their identities in the federation: all of them or none.

        Raises :class:`DataError` for an unknown user, and for an identity that is negative, belongs to another user or
        differs from the one that the user already has.
        """
        with self._database.writing() as db:
            for user in identities:
                if not _exists(db, user):
                    raise DataError(f"unknown user {user!r}; expected a user with interactions on this node")
            insert_users(db, identities.items())

    def user_ids(self) -> dict[str, int]:
        """The external ids of all users, in the order in which they were added, each with its :meth:`identity`."""
        with self._database.reading() as db:
            return dict(db.execute("SELECT id, coalesce(identity, -user) FROM users ORDER BY user").fetchall())

    def keys_of(self, users: Tensor) -> list[int]:
        """The keys of ``users`` [B] in the file, by identity."""
        with self._database.reading() as db:
            return [key for key, _ in self._find_users(db, users)]

    # --- the users as a population ---

    @property
    def device(self) -> torch.device:
        """Where all tensors are: on the CPU."""
        return torch.device("cpu")

    @property
    def n_users(self) -> int:
        """Users who have an identity."""
        return self.everyone().numel()

    def everyone(self) -> Tensor:
        """[h] the identities of all users who have one, ascending."""
        with self._database.reading() as db:
            found = db.execute("SELECT identity FROM users WHERE identity IS NOT NULL ORDER BY identity").fetchall()
        return torch.tensor([each for (each,) in found], dtype=torch.int64)

    @property
    def offsets(self) -> Tensor:
        """[h + 1] limits of the rows of each user of :meth:`everyone`."""
        return self.rows(self.everyone())[0].offsets

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], identities or negative numbers of :meth:`identity`, and the numbers [R] of the
        rows. A user whose attributes are not known has zeros.

        Raises :class:`PerfedrecError` for users who are not on this node.
        """
        with self._database.reading() as db:
            found = self._find_users(db, users)
            own = [self._items_of(db, key) for key, _ in found]
        items, limits, segments = jagged(own)
        attributes = None
        if self.encoding is not None:
            attributes = torch.zeros(len(found), self.n_user_attributes)
            for place, (_, content) in enumerate(found):
                if content is not None:
                    attributes[place] = torch.frombuffer(bytearray(content), dtype=torch.float32)
        return Rows(users, limits, items, segments, attributes), torch.arange(items.numel())

    def _items_of(self, db: sqlite3.Connection, key: int) -> Ints:
        """The items of a user, ascending."""
        return column(db.execute("SELECT item FROM interactions WHERE user = ? ORDER BY item", (key,)))

    def _find_users(self, db: sqlite3.Connection, users: Tensor) -> list[tuple[int, bytes | None]]:
        """The keys of ``users`` [B] in the file, with their attributes as bytes."""
        wanted = users.tolist()
        query = """
            SELECT identity, user, attributes FROM users WHERE identity IN (SELECT value FROM json_each(:all))
            UNION ALL
            SELECT -user, user, attributes FROM users
            WHERE identity IS NULL AND user IN (SELECT -value FROM json_each(:all))
        """
        found = {each[0]: each[1:] for each in db.execute(query, {"all": json.dumps(wanted)})}
        if len(found) < len(wanted):
            hosted = db.execute("SELECT count(identity) FROM users").fetchone()[0]
            raise PerfedrecError(f"this node was asked for users it does not host; it hosts {hosted}")
        return [found[each] for each in wanted]


def _exists(db: sqlite3.Connection, user_id: str) -> bool:
    return db.execute("SELECT user FROM users WHERE id = ?", (user_id,)).fetchone() is not None


def column(rows: sqlite3.Cursor) -> Ints:
    """The numbers of a query with one column."""
    return np.array(rows.fetchall(), dtype=np.int64).reshape(-1)


def jagged(lists: list[Ints]) -> tuple[Tensor, Tensor, Tensor]:
    """B lists of items as items [R], offsets [B + 1] and segments [R] (:class:`perfedrec.core.types.Rows`)."""
    sizes = torch.tensor([each.size for each in lists], dtype=torch.int64)
    limits = torch.zeros(len(lists) + 1, dtype=torch.int64)
    torch.cumsum(sizes, 0, out=limits[1:])
    items = np.concatenate([*lists, np.zeros(0, dtype=np.int64)])
    return torch.from_numpy(items), limits, torch.repeat_interleave(torch.arange(len(lists)), sizes)
