"""The SQLite file under a store: its schema, how it is opened, and one line for everything that can go wrong.

What is committed survives ``kill -9`` and a power cut: the write-ahead log is flushed at every commit. What is deleted
is overwritten. The file and its companions ``-wal`` and ``-shm`` can be read by their owner alone.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from perfedrec.core.errors import PerfedrecError

APPLICATION = 0x50464E31  # "PFN1", which tells a node's store from other SQLite files
PATIENCE = 5.0  # seconds that a command waits for another process to finish its transaction

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
)
"""What makes version ``i + 1`` of the schema out of version ``i``. A line that was released is never changed."""


class StoreError(PerfedrecError):
    """A node's file is missing, damaged, foreign, in use, or cannot be written."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors in words."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_FULL") or name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
            why = "the disk is full or the file may not grow; nothing was changed"
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            why = f"another process has been working on it for {PATIENCE:g} s; nothing was changed, try again"
        elif name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            why = f"is damaged or no node's file ({error}); expected one that perfedrec node init made, or its backup"
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
            why = f"cannot be opened for writing ({error})"
        elif name.startswith("SQLITE_IOERR"):
            why = f"cannot be read or written ({error}); nothing was changed"
        else:
            raise
        raise StoreError(f"{path}: {why}") from error


class Database:
    """A node's file. One process may use it from several threads, and several processes may use it at once."""

    def __init__(self, path: Path, make: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._open: str | None = None  # the kind of the transaction at work
        if make:
            try:  # made with this mode, which SQLite gives to its companions as well
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except OSError as error:
                raise StoreError(f"{path}: cannot be made ({error.strerror})") from None
        elif not path.is_file():
            raise StoreError(f"{path}: no such file; make one with perfedrec node init")
        with explained(path):
            self.connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            with explained(path):
                self._prepare(make)
        except BaseException:
            self.close()
            raise

    def _prepare(self, make: bool) -> None:
        def pragma(name: str) -> int:
            (value,) = self.connection.execute(f"PRAGMA {name}").fetchone()
            return int(value)

        if not make and pragma("application_id") != APPLICATION:
            raise StoreError(f"{self.path}: no node's file; expected one that perfedrec node init made")
        version, newest = pragma("user_version"), len(MIGRATIONS)
        if version > newest:
            raise StoreError(
                f"{self.path}: has schema {version}, from a newer perfedrec; this one knows up to {newest}"
            )
        for setting in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
            "temp_store = MEMORY",
        ):
            self.connection.execute(f"PRAGMA {setting}")
        if not make:
            (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise StoreError(f"{self.path}: is damaged ({verdict}); expected a whole file: restore its backup")
        if version < newest:
            with self.writing():
                version = pragma("user_version")  # another process may have been quicker
                for step, script in enumerate(MIGRATIONS[version:], version + 1):
                    for statement in script.split(";"):
                        self.connection.execute(statement)
                    self.connection.execute(f"PRAGMA user_version = {step}")
                self.connection.execute(f"PRAGMA application_id = {APPLICATION}")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, which nobody else can write beside; inside another one it is a part of it."""
        with self._lock, explained(self.path), self._transaction("IMMEDIATE"):
            yield self.connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Several queries that see the same moment."""
        with self._lock, explained(self.path), self._transaction("DEFERRED"):
            yield self.connection

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        if self._open is not None:
            if kind > self._open:  # IMMEDIATE after DEFERRED
                raise RuntimeError("a transaction that only reads cannot write")
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
    def beside(self) -> Iterator[sqlite3.Connection]:
        """Queries beside whatever is going on, which see what was stored last: nobody waits for them."""
        with explained(self.path), closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            yield db

    def scrub(self) -> None:
        """Leave no byte of what was deleted, in the file or in its write-ahead log.

        Raises :class:`StoreError` where another process reads the file: its log has to stay as long as it does.
        """
        with self._lock, explained(self.path):
            self.connection.execute("VACUUM")
            for _ in range(2):  # the second time for the note that all is done
                (busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:
                    raise StoreError(
                        f"{self.path}: what was forgotten is deleted, but another process is reading the file, and so "
                        "its log cannot be emptied; that is done when the file is next opened without another reader"
                    )
                self.connection.execute("UPDATE node SET scrubbing = 0 WHERE scrubbing")

    def close(self) -> None:
        with self._lock:
            self.connection.close()


def remove(path: Path) -> None:
    """Remove a file that was begun, with its companions."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
