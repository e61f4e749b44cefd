"""A node's file as one object.

A :class:`Store` offers what a :class:`perfedrec.runtimes.population.Population` in memory offers. The same client
functions work on both, with the same results; what a store holds survives the process.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from perfedrec.data import Catalogue, Encoding
from perfedrec.data.interactions import Ids
from perfedrec.runtimes.node.database import Database, StoreError, remove
from perfedrec.runtimes.node.file import counts
from perfedrec.runtimes.node.model import ModelStore


class Store(ModelStore):
    """Everything that a node stores, in one SQLite file. Close it after use, or open it in a ``with`` statement.

    It is made of three parts, each of which needs the one before:
    :class:`~perfedrec.runtimes.node.users.UserStore` (users, interactions, catalogue),
    :class:`~perfedrec.runtimes.node.rounds.RoundStore` (runs, client states, answers) and
    :class:`~perfedrec.runtimes.node.model.ModelStore` (the served model).
    """

    @classmethod
    def create(cls, path: Path, item_ids: Ids, secret: bytes | None = None, encoding: Encoding | None = None) -> Self:
        """Create a file for the catalogue ``item_ids`` [m] (int64, or objects of str), in the order that the whole
        federation uses, and open it. ``encoding`` says how attributes of users become numbers, if they have any.

        The node's ``secret`` of 32 bytes is drawn from the operating system, unless it is given. Raises
        :class:`StoreError` if the file exists or cannot be written.
        """
        if path.is_dir():
            raise StoreError(f"{path}: is a folder; expected the name of a new file")
        begun = path.with_name(f".{path.name}.{os.getpid()}")
        remove(begun)
        try:
            with closing(Database(begun, create=True)) as database, database.writing() as db:
                described = [] if encoding is None else list(zip(encoding.names, encoding.ranges, strict=True))
                catalogue, whole = Catalogue(item_ids, None, encoding).fingerprint, item_ids.dtype.kind == "i"
                values = (secret or secrets.token_bytes(32), catalogue, whole, json.dumps(described))
                put = "INSERT INTO node (only, secret, catalogue, integers, encoding) VALUES (1, ?, ?, ?, ?)"
                db.execute(put, values)
                db.executemany("INSERT INTO items VALUES (?, ?)", enumerate(map(str, item_ids.tolist())))
            os.link(begun, path)  # all of the file or nothing, and never over an existing file
        except FileExistsError:
            raise StoreError(f"{path}: exists already; expected a new file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be made ({error.strerror})") from None
        except StoreError as error:
            raise StoreError(str(error).replace(str(begun), str(path))) from error
        finally:
            remove(begun)
        return cls.open(path)

    def summary(self) -> tuple[int, int | None]:
        """The number of users in the file, and when the served model was received (seconds since 1970; ``None`` without
        a model).

        May be called from any thread, also while the node works on a round.
        """
        with self._database.snapshot() as db:
            query = "SELECT (SELECT count(*) FROM users), (SELECT received FROM served)"
            users, received = db.execute(query).fetchone()
        return users, received

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
            "user_attributes": self.n_user_attributes,
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
