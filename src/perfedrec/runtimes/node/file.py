"""What is known of a node's file without torch: the node itself, and who its users are."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from perfedrec.core.errors import ConfigError, DataError
from perfedrec.runtimes.node.database import Database, StoreError
from perfedrec.runtimes.node.journal import Journal
from perfedrec.runtimes.node.rules import RuleBook

LONGEST_USER_ID = 256
"""Characters."""


class NodeFile:
    """A node's file that is open, with its ``journal`` and its owner's ``rules``. Close it after use, or open it in a
    ``with`` statement."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.journal, self.rules = Journal(database), RuleBook(database)
        with database.reading() as db:
            query = "SELECT secret, catalogue, integers, encoding, scrubbing FROM node"
            row = db.execute(query).fetchone()
            self.n_items: int = db.execute("SELECT count(*) FROM items").fetchone()[0]
        if row is None:
            raise StoreError(f"{database.path}: was not completed; make it again with perfedrec node init")
        self._secret: bytes = row[0]
        self.catalogue: str = row[1]
        """The fingerprint of the catalogue."""
        self._integers = bool(row[2])
        self._encoding: str = row[3]
        if row[4]:  # a user was deleted, but the process was killed, or a reader was active, before the overwriting
            with suppress(StoreError):
                database.scrub()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file, and bring it to the newest schema.

        Raises :class:`StoreError` if the file is missing, damaged, not a node's file, or of a newer version.
        """
        database = Database(path)
        try:
            return cls(database)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    def summary(self) -> tuple[int, int | None]:
        """The number of users in the file, and when the served model was received (seconds since 1970; ``None`` without
        a model).

        May be called from any thread, also while the node works on a round.
        """
        with self._database.snapshot() as db:
            query = "SELECT (SELECT count(*) FROM users), (SELECT received FROM served)"
            users, received = db.execute(query).fetchone()
        return users, received

    def identity(self, user_id: str) -> int:
        """The identity of a user; for a user who has none yet, a negative number that is valid on this node only.

        Raises :class:`DataError` for an unknown user.
        """
        with self._database.reading() as db:
            row = db.execute("SELECT coalesce(identity, -user) FROM users WHERE id = ?", (user_id,)).fetchone()
            if row is None:
                (n_users,) = db.execute("SELECT count(*) FROM users").fetchone()
                words = {0: "it holds no users yet", 1: "expected its only user"}
                known = words.get(n_users, f"expected one of its {n_users} users")
                raise DataError(f"unknown user {user_id!r:.100}: {self.path} has no such user; {known}")
        return int(row[0])

    def add_interactions(self, user_id: str, *item_ids: str) -> int:
        """Add interactions of one user, who may be new, and return how many of them are new.

        They are on the disk when this returns. Raises :class:`DataError` for an unknown item, and :class:`ConfigError`
        for a new user whose id cannot be one; then nothing is added.
        """
        with self._database.writing() as db:
            items = [self._number_of(db, each) for each in item_ids]
            insert_users(db, [(user_id, None)])
            return insert_interactions(db, [(item, None, user_id) for item in items])

    def _number_of(self, db: sqlite3.Connection, item_id: str) -> int:
        """The number of an item. Where ids are whole numbers, an id may be written in any way, as in 007."""
        whole = re.fullmatch(r"([+-]?)0*([0-9]{1,19})", item_id) if self._integers else None
        name = item_id if whole is None else str(int(whole[1] + whole[2]))
        row = db.execute("SELECT item FROM items WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise DataError(f"unknown item {item_id!r:.100}; expected one of the {self.n_items} in the catalogue")
        return int(row[0])

    def forget(self, user_id: str) -> None:
        """Delete everything that is stored about a user, and overwrite the places on the disk.

        The stored answer to the last round is deleted as well, because it contains the user's part. What the user
        handed over in earlier rounds is in the federation's sums and cannot be removed from here. Raises
        :class:`DataError` for an unknown user, and :class:`StoreError` if another process is reading the file: then the
        user is deleted, and the overwriting is done when the file is next opened without another reader.
        """
        self.identity(user_id)
        with self._database.writing() as db:
            db.execute("DELETE FROM users WHERE id = ?", (user_id,))
            self.journal.forget()
            db.execute("UPDATE runs SET reply = NULL")
            db.execute("UPDATE node SET scrubbing = 1")
        self._database.scrub()

    def status(self) -> dict[str, Any]:
        """What is in the file, in figures, for ``perfedrec node status``."""
        with self._database.reading() as db:
            users, interactions = counts(db)
            (registered,) = db.execute("SELECT count(identity) FROM users").fetchone()
            (schema,) = db.execute("PRAGMA user_version").fetchone()
            run = db.execute("SELECT run, round FROM runs ORDER BY number DESC LIMIT 1").fetchone()
            rounds = self._participations(db)
            served = db.execute("SELECT run, round, received FROM served").fetchone()
        size = sum(Path(f"{self.path}{suffix}").stat().st_size for suffix in ("", "-wal"))
        return {
            "store": str(self.path),
            "schema": schema,
            "bytes": size,
            "catalogue": self.catalogue,
            "items": self.n_items,
            "user_attributes": len(json.loads(self._encoding)),
            "users": users,
            "registered": registered,
            "interactions": interactions,
            "run": None if run is None else run[0],
            "last_round": None if run is None or run[1] < 0 else run[1],
            "participations": {"total": sum(rounds), "most": max(rounds, default=0), "users": sum(map(bool, rounds))},
            "model": None
            if served is None
            else {"run": served[0], "round": served[1], "age_seconds": max(int(time.time()) - served[2], 0)},
        }

    def _participations(self, db: sqlite3.Connection) -> list[int]:
        """In how many rounds of the latest run each user has taken part, for users with a stored client state."""
        query = "SELECT content FROM memories WHERE run = (SELECT max(number) FROM runs)"
        saved = [self._database.load_arrays(content) for (content,) in db.execute(query)]
        names = ("participations", "taken")  # the second one was its name up to schema 5
        return [int(each[name][0]) for each in saved for name in names if name in each]

    def seed_of(self, run: str) -> int:
        """The seed of everything random that the node's users draw in a run. It must not leave the node."""
        digest = hashlib.blake2b(run.encode(), key=self._secret, digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def no_model(self) -> StoreError:
        """The error of a node that has nothing to recommend with."""
        return StoreError(
            f"{self.path}: has received no model yet; get one with perfedrec node receive, or take part in a run"
        )

    def misfit(self, run: str, field: str) -> StoreError:
        """The error of client states that the method of a run cannot use."""
        return StoreError(
            f"{self.path}: the client states of run {run} were stored by another method or configuration; {field} does "
            "not fit"
        )


def counts(db: sqlite3.Connection) -> tuple[int, int]:
    """Numbers of users and of interactions in the file."""
    (users,) = db.execute("SELECT count(*) FROM users").fetchone()
    (interactions,) = db.execute("SELECT count(*) FROM interactions").fetchone()
    return users, interactions


def insert_users(db: sqlite3.Connection, users: Iterable[tuple[str, int | None]]) -> None:
    """Insert the users, external id and identity, who are not in the file; give an identity to those without one.

    Every way in ends here. Raises :class:`ConfigError` for a new user whose id :func:`check_user_id` refuses, and
    :class:`DataError` for an identity that the user cannot get.
    """
    put = "INSERT INTO users (id, identity) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
    for user, identity in users:
        try:
            if db.execute(put, (user, identity)).rowcount:  # who is there already keeps an id of an earlier version
                check_user_id(user)
            if identity is not None:
                db.execute("UPDATE users SET identity = ? WHERE id = ? AND identity IS NULL", (identity, user))
                (found,) = db.execute("SELECT identity FROM users WHERE id = ?", (user,)).fetchone()
                if found != identity:
                    raise DataError(f"user {user!r} has the identity {found}; it cannot become {identity}")
        except sqlite3.IntegrityError:
            raise DataError(f"identity {identity} of user {user!r} is another user's, or negative") from None


def check_user_id(user: str) -> None:
    """Raise :class:`ConfigError` for an id by which nobody could find or name a user: an empty one, a very long one, or
    one with characters that are not shown, or that stand for damaged text."""
    if not user.strip():
        raise ConfigError("the id of a user is empty; expected a name")
    if len(user) > LONGEST_USER_ID:
        raise ConfigError(
            f"the id of a user has {len(user):,} characters, {user!r:.40}...; expected at most {LONGEST_USER_ID}"
        )
    for letter in user:
        if letter == "\ufffd":
            raise ConfigError(f"the id of a user {user!r} has U+FFFD, which stands for damaged text; expected UTF-8")
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            what = "a control character, a line break or half a character"
            raise ConfigError(f"the id of a user {user!r} has U+{ord(letter):04X}: {what}; expected a name on one line")


def insert_interactions(db: sqlite3.Connection, rows: Iterable[tuple[int, int | None, str]]) -> int:
    """Insert interactions, each one an item, its part if that is known, and the external id of a user. Returns how many
    of them are new."""
    put = "INSERT OR IGNORE INTO interactions (user, item, part) SELECT user, ?, ? FROM users WHERE id = ?"
    return db.executemany(put, rows).rowcount
