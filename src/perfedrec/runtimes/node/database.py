"""The SQLite file of a node: its schema, its transactions, and a one-line message for each error.

Committed data survive ``kill -9`` and a power cut: the write-ahead log is flushed at every commit. Deleted data are
overwritten. Only the owner can read the file and the files ``-wal`` and ``-shm`` that SQLite puts beside it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from perfedrec.core.errors import ConfigError, PerfedrecError, reason

APPLICATION_ID = 0x50464E31
"""``PFN1``: marks a node's file, so that other SQLite files are refused."""

LOCK_TIMEOUT = 5.0
"""Seconds that a command waits for another process to finish its transaction."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE node (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        secret BLOB NOT NULL,
        catalogue TEXT NOT NULL,
        integers INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE items (item INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE users (
        user INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        identity INTEGER UNIQUE CHECK (identity >= 0),
        attributes BLOB
    ) STRICT;
    CREATE TABLE interactions (
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        item INTEGER NOT NULL REFERENCES items,
        PRIMARY KEY (user, item)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY,
        run TEXT NOT NULL UNIQUE,
        round INTEGER NOT NULL DEFAULT -1,
        request BLOB,
        reply BLOB
    ) STRICT;
    CREATE TABLE memories (
        run INTEGER NOT NULL REFERENCES runs,
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        content BLOB NOT NULL,
        UNIQUE (run, user)
    ) STRICT;
    """,
    """
    CREATE TABLE served (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        run TEXT NOT NULL,
        round INTEGER NOT NULL,
        received INTEGER NOT NULL,
        configuration TEXT NOT NULL,
        scalars TEXT NOT NULL,
        tables BLOB NOT NULL,
        newcomer BLOB NOT NULL
    ) STRICT;
    CREATE TABLE served_users (
        user INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
        content BLOB NOT NULL
    ) STRICT;
    ALTER TABLE node ADD COLUMN scrubbing INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE node ADD COLUMN encoding TEXT NOT NULL DEFAULT '[]';
    """,
    """
    CREATE TABLE opened (
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        nodes BLOB NOT NULL,
        PRIMARY KEY (run, round)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE runs ADD COLUMN configuration BLOB;
    """,
    """
    -- Fields of client states and of the served model have other names from here on. What is stored keeps its names and
    -- is read by either one. A version that knows the old names alone refuses the file.
    """,
    """
    ALTER TABLE interactions ADD COLUMN part INTEGER;
    CREATE TABLE held_out (
        run INTEGER NOT NULL REFERENCES runs,
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        item INTEGER NOT NULL REFERENCES items,
        part INTEGER NOT NULL,
        PRIMARY KEY (run, user, item)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE kept_states (
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        content BLOB,
        UNIQUE (run, round, user)
    ) STRICT;
    """,
    """
    ALTER TABLE served ADD COLUMN inference TEXT;
    """,
    """
    CREATE TABLE details (
        item INTEGER PRIMARY KEY REFERENCES items,
        title TEXT,
        folded TEXT,
        attributes TEXT NOT NULL
    ) STRICT;
    CREATE TABLE pictures (
        item INTEGER PRIMARY KEY REFERENCES items,
        media TEXT NOT NULL,
        content BLOB NOT NULL
    ) STRICT;
    CREATE TABLE dismissed (
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        item INTEGER NOT NULL REFERENCES items,
        PRIMARY KEY (user, item)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE protections (
        protection INTEGER PRIMARY KEY,
        profile TEXT NOT NULL,
        statement TEXT NOT NULL,
        UNIQUE (profile, statement)
    ) STRICT;
    CREATE TABLE journal (
        entry INTEGER PRIMARY KEY AUTOINCREMENT,
        time INTEGER NOT NULL,
        times INTEGER NOT NULL,
        coordinator TEXT,
        run TEXT,
        phase TEXT NOT NULL,
        round INTEGER,
        stage TEXT,
        sent INTEGER NOT NULL,
        received INTEGER NOT NULL,
        users INTEGER,
        others INTEGER,
        protection INTEGER REFERENCES protections,
        epsilon REAL,
        against TEXT,
        refused TEXT
    ) STRICT;
    CREATE TABLE journal_users (
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        entry INTEGER NOT NULL REFERENCES journal,
        epsilon REAL,
        PRIMARY KEY (user, entry)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE rules (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        require TEXT,
        started TEXT,
        paused INTEGER NOT NULL DEFAULT 0,
        gone INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    INSERT INTO rules (only) VALUES (1);
    ALTER TABLE runs ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;
    """,
    """
    -- The largest cell comes last: what stands behind it is found only by a walk through all of its pages.
    ALTER TABLE served RENAME TO served_before;
    CREATE TABLE served (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        run TEXT NOT NULL,
        round INTEGER NOT NULL,
        received INTEGER NOT NULL,
        inference TEXT,
        scalars TEXT NOT NULL,
        newcomer BLOB NOT NULL,
        configuration TEXT NOT NULL,
        tables BLOB NOT NULL
    ) STRICT;
    INSERT INTO served
    SELECT only, run, round, received, inference, scalars, newcomer, configuration, tables FROM served_before;
    DROP TABLE served_before;
    """,
    "ALTER TABLE rules ADD COLUMN key TEXT;",
)
"""Entry ``i`` turns version ``i`` of the schema into version ``i + 1``. An entry that was released is never changed."""


class StoreError(PerfedrecError):
    """A node's file is missing, damaged, of another program, in use, or cannot be written."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into :class:`StoreError` with a message that says what to do."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object!r:.100}: has half of a UTF-16 pair, which is no character") from None
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_FULL") or name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
            why = "the disk is full or the file may not grow; nothing was changed"
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            why = f"another process has kept it locked for {LOCK_TIMEOUT:g} s; nothing was changed, try again"
        elif name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            why = f"is damaged or not a node's file ({error}); expected a file of perfedrec node init, or its backup"
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
            why = f"cannot be opened for writing ({error})"
        elif name.startswith("SQLITE_IOERR"):
            why = f"cannot be read or written ({error}); nothing was changed"
        else:
            raise
        raise StoreError(f"{path}: {why}") from error


class Database:
    """The connection to a node's file. Several threads of a process, and several processes, may use a file at once.

    Raises :class:`StoreError` if the file is missing, damaged, not a node's file or of a newer version; and, with
    ``create``, if it exists or cannot be written.
    """

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._open: str | None = None  # the kind of the open transaction
        if create:
            try:  # SQLite gives the mode of this file to the files beside it
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except OSError as error:
                raise StoreError(f"{path}: cannot be made ({reason(error)})") from None
        elif not path.is_file():
            raise StoreError(f"{path}: no such file; make one with perfedrec node init")
        with explained(path):
            self.connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            with explained(path):
                self._prepare(create)
        except BaseException:
            self.close()
            raise

    def _prepare(self, create: bool) -> None:
        """Check the file, set SQLite up, and bring the schema to the newest version."""

        def pragma(name: str) -> int:
            (value,) = self.connection.execute(f"PRAGMA {name}").fetchone()
            return int(value)

        if not create and pragma("application_id") != APPLICATION_ID:
            raise StoreError(f"{self.path}: not a node's file; expected a file of perfedrec node init")
        version, newest = pragma("user_version"), len(MIGRATIONS)
        if version > newest:
            raise StoreError(
                f"{self.path}: has schema {version}, from a newer perfedrec; this one knows up to {newest}; "
                "update perfedrec"
            )
        for setting in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
            "temp_store = MEMORY",
        ):
            self.connection.execute(f"PRAGMA {setting}")
        if not create:
            (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise self.damaged(verdict)
        if version < newest:
            with self.writing():
                version = pragma("user_version")  # another process may have done this meanwhile
                for step, script in enumerate(MIGRATIONS[version:], version + 1):
                    for statement in script.split(";"):
                        self.connection.execute(statement)
                    self.connection.execute(f"PRAGMA user_version = {step}")
                self.connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction in which only this thread can write. Inside another transaction it is a part of that one."""
        with self._lock, explained(self.path), self._transaction("IMMEDIATE"):
            yield self.connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One transaction of queries, which all see the file as it is at one moment."""
        with self._lock, explained(self.path), self._transaction("DEFERRED"):
            yield self.connection

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        if self._open is not None:
            if kind > self._open:  # IMMEDIATE after DEFERRED
                raise RuntimeError("a transaction for reading cannot write; expected writing() as the outer one")
            yield
            return
        self.connection.execute(f"BEGIN {kind}")
        self._open = kind
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite has not rolled it back itself
                self.connection.execute("ROLLBACK")
            raise
        finally:
            self._open = None

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Queries on a connection of their own, which see what was committed last. They neither wait for a transaction
        nor delay one."""
        with explained(self.path), closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            yield db

    def scrub(self) -> None:
        """Remove every byte of deleted data from the file and from its write-ahead log.

        Raises :class:`StoreError` if another process is reading the file, because the log must stay until it has
        finished.
        """
        with self._lock, explained(self.path):
            self.connection.execute("VACUUM")
            for _ in range(2):  # the second time for the mark `scrubbing`, which is taken off below
                (busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:
                    raise StoreError(
                        f"{self.path}: the data are deleted, but another process is reading the file, so that the log "
                        "cannot be emptied; that is done when the file is next opened without another reader"
                    )
                self.connection.execute("UPDATE node SET scrubbing = 0 WHERE scrubbing")

    def load_arrays(self, content: bytes) -> dict[str, NDArray[Any]]:
        """The arrays in a cell of the file. Raises :class:`StoreError` if the cell is damaged: it is no record of
        arrays, or has numbers that are not finite, which training leaves only where it diverges."""
        try:
            arrays = load(content)
        except SafetensorError as error:
            raise self.damaged(error) from None
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise StoreError(
                    f"{self.path}: the stored {name} has numbers that are not finite: the file is damaged, or training "
                    "has diverged; expected its backup, or a new run"
                )
        return arrays

    def damaged(self, why: object) -> StoreError:
        """The error for a file with content that cannot be right."""
        return StoreError(f"{self.path}: is damaged ({why}); expected a whole file: restore its backup")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self.connection.close()


def remove(path: Path) -> None:
    """Delete a file and the files that SQLite puts beside it, where they exist."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
