"""A node's users in its file: what a :class:`perfedrec.runtimes.population.Population` offers, durable.

The same client functions work on it as on users in memory, with the same results. One round is one transaction: its
memories and its answer are there together or not at all.

All noise of a node follows from its secret, the run, the round and the user. Two answers to one round on different
tables or interactions would carry the same noise, which their difference would take off both; so a round is answered
once (:meth:`Store.answer`), and a run that was left for another is not taken up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Algorithm, Rows
from perfedrec.data.interactions import Ids, encode
from perfedrec.runtimes.node.database import Database, StoreError, remove

OWN = "own items"  # beside a memory's fields: the items [r] that its rows belong to; no field can have that name


class RoundError(PerfedrecError):
    """A node was asked for a round that it must not play."""


@dataclass(frozen=True)
class Joined:
    """The run that a node takes part in: its algorithm, its number in the file, and the seed of its users' draws."""

    algorithm: Algorithm[Any, Any, Any]
    run: str
    number: int
    seed: int


class Store:
    """The users of one node, in a file. Users who take part in a federation have an identity in it, an integer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.reading() as db:
            row = db.execute("SELECT secret, catalogue, integers FROM node").fetchone()
            self.n_items: int = db.execute("SELECT count(*) FROM items").fetchone()[0]
        if row is None:
            raise StoreError(f"{database.path}: was not finished; make it again with perfedrec node init")
        self._secret: bytes = row[0]
        self.catalogue: str = row[1]
        self._integers = bool(row[2])
        self._joined: Joined | None = None
        self._items: Ids | None = None

    @classmethod
    def make(cls, path: Path, item_ids: Ids, secret: bytes | None = None) -> Self:
        """A new file for the catalogue ``item_ids`` [m] (int64, or objects of str), whose order is the federation's.

        The node's ``secret`` is drawn from the operating system. Raises :class:`StoreError` where there is a file.
        """
        begun = path.with_name(f".{path.name}.{os.getpid()}")
        remove(begun)
        try:
            with closing(Database(begun, make=True)) as database, database.writing() as db:
                values = (secret or secrets.token_bytes(32), fingerprint(item_ids), item_ids.dtype.kind == "i")
                db.execute("INSERT INTO node VALUES (1, ?, ?, ?)", values)
                db.executemany("INSERT INTO items VALUES (?, ?)", enumerate(map(str, item_ids.tolist())))
            os.link(begun, path)  # there whole or not at all, and never over another one
        except FileExistsError:
            raise StoreError(f"{path}: exists already; expected a new file") from None
        finally:
            remove(begun)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The store in a file, brought to the newest schema. Raises :class:`StoreError`."""
        database = Database(path)
        try:
            return cls(database)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._database.path

    # --- items and users ---

    @property
    def item_ids(self) -> Ids:
        """[m] external ids of the catalogue, int64 or objects of str."""
        if self._items is None:
            with self._database.reading() as db:
                found = [each for (each,) in db.execute("SELECT id FROM items ORDER BY item")]
            self._items = np.array([int(each) for each in found]) if self._integers else np.array(found, dtype=object)
        return self._items

    def take(
        self, frame: pl.DataFrame, *, skip_unknown: bool = False, identities: Mapping[str, int] | None = None
    ) -> tuple[int, int, int]:
        """Take interactions in, columns ``user`` and ``item`` in external ids: all of them or none.

        What is there already stays as it is. Users who are new get their identity from ``identities``, by external id,
        or none yet. Returns how many users and interactions are new, and how many rows had unknown items and were
        skipped (``skip_unknown``); otherwise such a row raises :class:`DataError`.
        """
        items = encode(frame["item"], self.item_ids)
        unknown = items < 0
        if unknown.any() and not skip_unknown:
            first = frame["item"][int(np.argmax(unknown))]
            raise DataError(
                f"{int(unknown.sum())} of {items.size} interactions are with items that are not in the catalogue of "
                f"{self.path}, the first with {first!r}; expected known items, or --skip-unknown"
            )
        users = frame["user"].cast(pl.String).to_numpy()[~unknown]
        pairs = list(zip(users.tolist(), items[~unknown].tolist(), strict=True))
        with self._database.writing() as db:
            before = self._counts(db)
            new = [(user, (identities or {}).get(user)) for user in dict.fromkeys(users.tolist())]
            self._insert_users(db, new)
            db.executemany(
                "INSERT OR IGNORE INTO interactions SELECT user, ? FROM users WHERE id = ?",
                [(item, user) for user, item in pairs],
            )
            after = self._counts(db)
        return after[0] - before[0], after[1] - before[1], int(unknown.sum())

    def add(self, user_id: str, item_id: str) -> bool:
        """Take one interaction in; on return it is on the disk. Whether it is new. A user who is new is made."""
        (item,) = encode(pl.Series([item_id]), self.item_ids).tolist()
        if item < 0:
            raise DataError(f"unknown item {item_id!r}; expected one of the {self.n_items} of the catalogue")
        with self._database.writing() as db:
            self._insert_users(db, [(user_id, None)])
            done = db.execute(
                "INSERT OR IGNORE INTO interactions SELECT user, ? FROM users WHERE id = ?", (item, user_id)
            )
            return done.rowcount > 0

    @staticmethod
    def _insert_users(db: sqlite3.Connection, users: Iterable[tuple[str, int | None]]) -> None:
        """Make users who are not there; an identity is given to those who have none."""
        for user, identity in users:
            try:
                db.execute(
                    "INSERT INTO users (id, identity) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", (user, identity)
                )
                if identity is not None:
                    db.execute("UPDATE users SET identity = ? WHERE id = ? AND identity IS NULL", (identity, user))
                    (found,) = db.execute("SELECT identity FROM users WHERE id = ?", (user,)).fetchone()
                    if found != identity:
                        raise DataError(f"user {user!r} has the identity {found}; it cannot become {identity}")
            except sqlite3.IntegrityError:
                raise DataError(f"identity {identity} of user {user!r} is another user's, or negative") from None

    @staticmethod
    def _counts(db: sqlite3.Connection) -> tuple[int, int]:
        (users,) = db.execute("SELECT count(*) FROM users").fetchone()
        (interactions,) = db.execute("SELECT count(*) FROM interactions").fetchone()
        return users, interactions

    def unregistered(self) -> list[str]:
        """External ids of the users without an identity, in the order in which they came."""
        with self._database.reading() as db:
            return [each for (each,) in db.execute("SELECT id FROM users WHERE identity IS NULL ORDER BY user")]

    def register(self, identities: Mapping[str, int]) -> None:
        """Give users, by external id, their identities in the federation; all of them or none."""
        with self._database.writing() as db:
            for user in identities:
                if db.execute("SELECT 1 FROM users WHERE id = ?", (user,)).fetchone() is None:
                    raise DataError(f"unknown user {user!r}; expected one whose interactions are here")
            self._insert_users(db, identities.items())

    def set_attributes(self, attributes: Mapping[str, Sequence[float]]) -> None:
        """Give users, by external id, their own attributes, each [F] numbers."""
        with self._database.writing() as db:
            for user, values in attributes.items():
                content = np.asarray(values, dtype=np.float32).tobytes()
                db.execute("UPDATE users SET attributes = ? WHERE id = ?", (content, user))

    # --- what a population offers ---

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def n_users(self) -> int:
        return self.everyone().numel()

    def everyone(self) -> Tensor:
        """[h] the identities of all users who have one, ascending."""
        with self._database.reading() as db:
            found = db.execute("SELECT identity FROM users WHERE identity IS NOT NULL ORDER BY identity").fetchall()
        return torch.tensor([each for (each,) in found], dtype=torch.int64)

    @property
    def offsets(self) -> Tensor:
        """[h + 1] limits of everybody's rows."""
        query = """
            SELECT count(item) FROM users LEFT JOIN interactions USING (user)
            WHERE identity IS NOT NULL GROUP BY user ORDER BY identity
        """
        with self._database.reading() as db:
            counts = [0, *(each for (each,) in db.execute(query))]
        return torch.tensor(counts, dtype=torch.int64).cumsum(0)

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], identities, and their numbers [R].

        Raises :class:`PerfedrecError` for users that are not here.
        """
        with self._database.reading() as db:
            found = self._find(db, users)
            own = self._own(db, [user for user, _ in found])
        items, counts = np.concatenate([*own, _NONE]), [each.size for each in own]
        limits = torch.zeros(len(found) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(counts, dtype=torch.int64), 0, out=limits[1:])
        segments = torch.repeat_interleave(torch.arange(len(found)), torch.tensor(counts, dtype=torch.int64))
        attributes = [np.frombuffer(each, np.float32) for _, each in found if each is not None]
        given = torch.from_numpy(np.stack(attributes)) if attributes and len(attributes) == len(found) else None
        return Rows(users, limits, torch.from_numpy(items), segments, given), torch.arange(items.size)

    def recall(self, users: Tensor, positions: Tensor) -> Any:
        """The memories of ``users`` [B]; who has none yet is given the one to start with.

        Rows of items that were not there when a memory was stored are as at the start.
        """
        joined = self._run()
        with self._database.reading() as db:
            rows, _ = self.rows(users)
            blank = joined.algorithm.init_memory(rows, Key(joined.seed).fold("memory"))
            keys = [user for user, _ in self._find(db, users)]
            stored = [
                db.execute("SELECT content FROM memories WHERE run = ? AND user = ?", (joined.number, key)).fetchone()
                for key in keys
            ]
        values = {field.name: getattr(blank, field.name).numpy().copy() for field in fields(blank)}
        per_row = {field.name for field in fields(blank) if field.metadata.get("per") == "row"}
        items, limits = rows.items.numpy(), rows.offsets.tolist()
        for place, content in enumerate(stored):
            if content is None:
                continue
            arrays = load_arrays(content[0])
            known, here = arrays.pop(OWN), slice(limits[place], limits[place + 1])
            _, source, target = np.intersect1d(known, items[here], assume_unique=True, return_indices=True)
            for name, into in values.items():
                array = arrays.get(name)
                if array is None or array.dtype != into.dtype or array.shape[1:] != into.shape[1:]:
                    raise StoreError(
                        f"{self.path}: the memories of run {joined.run} were made by another method or configuration; "
                        f"{name} does not fit"
                    )
                if name in per_row:
                    into[here][target] = array[source]
                else:
                    into[place] = array[0]
        return type(blank)(**{name: torch.from_numpy(array) for name, array in values.items()})

    def remember(self, users: Tensor, positions: Tensor, memory: Any) -> None:
        """Write the memories of ``users`` [B] back."""
        number = self._run().number
        per_row = {field.name for field in fields(memory) if field.metadata.get("per") == "row"}
        arrays = {field.name: getattr(memory, field.name).detach().cpu().numpy() for field in fields(memory)}
        with self._database.writing() as db:
            rows, _ = self.rows(users)
            keys = [user for user, _ in self._find(db, users)]
            items, limits = rows.items.numpy(), rows.offsets.tolist()
            contents = []
            for place, key in enumerate(keys):
                own = slice(limits[place], limits[place + 1])
                one = {
                    name: np.ascontiguousarray(array[own if name in per_row else slice(place, place + 1)])
                    for name, array in arrays.items()
                }
                contents.append((number, key, dump_arrays(one | {OWN: np.ascontiguousarray(items[own])})))
            put = "INSERT INTO memories VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET content = excluded.content"
            db.executemany(put, contents)

    def _find(self, db: sqlite3.Connection, users: Tensor) -> list[tuple[int, bytes | None]]:
        """The keys of ``users`` [B] in the file, with their attributes."""
        wanted = users.tolist()
        found = {
            identity: (user, attributes)
            for identity, user, attributes in db.execute(
                "SELECT identity, user, attributes FROM users WHERE identity IN (SELECT value FROM json_each(?))",
                (json.dumps(wanted),),
            )
        }
        if len(found) < len(wanted):
            hosted = db.execute("SELECT count(identity) FROM users").fetchone()[0]
            raise PerfedrecError(f"this node was asked for users it does not host; it hosts {hosted}")
        return [found[each] for each in wanted]

    @staticmethod
    def _own(db: sqlite3.Connection, users: list[int]) -> list[NDArray[np.int64]]:
        """The items of each user, ascending."""
        query = "SELECT item FROM interactions WHERE user = ? ORDER BY item"
        return [np.array(db.execute(query, (user,)).fetchall(), dtype=np.int64).reshape(-1) for user in users]

    # --- rounds ---

    def join(self, algorithm: Algorithm[Any, Any, Any], run: str) -> int:
        """Take part in a run from now on; returns the seed of all that its users draw in it, which stays here.

        The seed follows from the node's secret and the run's name. Raises :class:`RoundError` for a run that was left
        for another one. Memories of a run that was left are dropped.
        """
        with self._database.writing() as db:
            row = db.execute("SELECT number FROM runs WHERE run = ?", (run,)).fetchone()
            (latest,) = db.execute("SELECT coalesce(max(number), 0) FROM runs").fetchone()
            if row is not None and row[0] != latest:
                raise RoundError(f"this node left the run {run} for another one; expected the latest, or a new name")
            if row is None:
                row = (latest + 1,)
                db.execute("INSERT INTO runs (number, run) VALUES (?, ?)", (*row, run))
                db.execute("UPDATE runs SET reply = NULL WHERE number < ?", row)
                db.execute("DELETE FROM memories WHERE run < ?", row)
        digest = hashlib.blake2b(run.encode(), key=self._secret, digest_size=8).digest()
        self._joined = Joined(algorithm, run, row[0], int.from_bytes(digest, "little"))
        return self._joined.seed

    def _run(self) -> Joined:
        if self._joined is None:
            raise RoundError("this node takes part in no run yet; expected join() first")
        return self._joined

    def answer(self, number: int, request: bytes, work: Callable[[], bytes | None]) -> bytes | None:
        """The answer to round ``number`` of the run, whose content is ``request``: what ``work`` returns.

        Memories that ``work`` writes and the answer are stored in one transaction. A round that was answered is not
        played again: the same request gets the stored answer, and any other one raises :class:`RoundError`, as does the
        same one where ``work`` returned ``None``, which stands for an answer that is not kept.
        """
        joined, digest = self._run(), hashlib.sha256(request).digest()
        with self._database.writing() as db:
            row = db.execute("SELECT round, request, reply FROM runs WHERE number = ?", (joined.number,)).fetchone()
            last, asked, reply = row
            if number < last:
                raise RoundError(f"round {number} of run {joined.run} is past; this node has played round {last}")
            if number == last and asked != digest:
                raise RoundError(
                    f"round {number} of run {joined.run} was asked for again with other content; a second answer would "
                    "show what the noise hides"
                )
            if number == last and reply is None:
                raise RoundError(f"round {number} of run {joined.run} was answered, and the answer was not kept")
            if number == last:
                return bytes(reply)
            made = work()
            db.execute(
                "UPDATE runs SET round = ?, request = ?, reply = ? WHERE number = ?",
                (number, digest, made, joined.number),
            )
        return made


def fingerprint(item_ids: Ids) -> str:
    """16 hexadecimal digits that change with any id of a catalogue and with their order."""
    text = "\0".join(map(str, item_ids.tolist()))
    return hashlib.sha256(f"{len(item_ids)};{text}".encode()).hexdigest()[:16]


_NONE = np.zeros(0, dtype=np.int64)
