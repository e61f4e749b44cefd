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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.records import flatten, unflatten
from perfedrec.core.types import Rows
from perfedrec.data import Catalogue, Encoding
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


@dataclass(frozen=True)
class Served:
    """A model to recommend with: from which run, after how many rounds, when it came (seconds since 1970), and the
    method with its options as TOML."""

    run: str
    round: int
    received: int
    configuration: str


class Store:
    """The users of one node, in a file. Users who take part in a federation have an identity in it, an integer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.reading() as db:
            row = db.execute("SELECT secret, catalogue, integers, scrubbing, encoding FROM node").fetchone()
            self.n_items: int = db.execute("SELECT count(*) FROM items").fetchone()[0]
        if row is None:
            raise StoreError(f"{database.path}: was not finished; make it again with perfedrec node init")
        self._secret: bytes = row[0]
        self.catalogue: str = row[1]
        self._integers = bool(row[2])
        names, ranges = zip(*json.loads(row[4]), strict=True) if row[4] != "[]" else ((), ())
        self.encoding = Encoding(names, tuple((low, high) for low, high in ranges)) if names else None
        """How its users' attributes become numbers, where there are any."""

        self._joined: Joined | None = None
        self._items: Ids | None = None
        if row[3]:  # somebody was to be forgotten, and a kill or a reader came between
            with suppress(StoreError):
                database.scrub()

    @classmethod
    def make(cls, path: Path, item_ids: Ids, secret: bytes | None = None, encoding: Encoding | None = None) -> Self:
        """A new file for the catalogue ``item_ids`` [m] (int64, or objects of str), whose order is the federation's;
        ``encoding``: of users' attributes, if they have any.

        The node's ``secret`` is drawn from the operating system. Raises :class:`StoreError` where there is a file.
        """
        if path.is_dir():
            raise StoreError(f"{path}: is a folder; expected the name of a new file")
        begun = path.with_name(f".{path.name}.{os.getpid()}")
        remove(begun)
        try:
            with closing(Database(begun, make=True)) as database, database.writing() as db:
                described = [] if encoding is None else list(zip(encoding.names, encoding.ranges, strict=True))
                catalogue, whole = Catalogue(item_ids, None, encoding).fingerprint, item_ids.dtype.kind == "i"
                values = (secret or secrets.token_bytes(32), catalogue, whole, json.dumps(described))
                put = "INSERT INTO node (only, secret, catalogue, integers, encoding) VALUES (1, ?, ?, ?, ?)"
                db.execute(put, values)
                db.executemany("INSERT INTO items VALUES (?, ?)", enumerate(map(str, item_ids.tolist())))
            os.link(begun, path)  # there whole or not at all, and never over another one
        except FileExistsError:
            raise StoreError(f"{path}: exists already; expected a new file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be made ({error.strerror})") from None
        except StoreError as error:
            raise StoreError(str(error).replace(str(begun), str(path))) from error
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

    @property
    def n_user_attributes(self) -> int:
        return 0 if self.encoding is None else len(self.encoding.names)

    def expect(self, catalogue: Catalogue) -> None:
        """Raises :class:`StoreError` where the catalogue of somebody else is not this node's."""
        if catalogue.fingerprint == self.catalogue:
            return
        raise StoreError(
            f"{self.path}: has a catalogue of {self.n_items} items and {self.n_user_attributes} user attributes, "
            f"{self.catalogue}, and the federation one of {len(catalogue.item_ids)} and {catalogue.n_user_attributes}, "
            f"{catalogue.fingerprint}; expected the same items in the same order, and the same attributes"
        )

    def take(
        self,
        frame: pl.DataFrame,
        *,
        skip_unknown: bool = False,
        identities: Mapping[str, int] | None = None,
        first_identity: int | None = None,
        attributes: Mapping[str, Sequence[float]] | None = None,
    ) -> tuple[int, int, int]:
        """Take interactions in, columns ``user`` and ``item`` in external ids, with the ``attributes`` [F] of users by
        external id: all of it or nothing.

        What is there already stays as it is; attributes are replaced, and those of unknown users left out. Users who
        are new get their identity from ``identities``, by external id, or numbers from ``first_identity`` on, in the
        order of the frame, or none yet. Returns how many users and interactions are new, and how many rows had unknown
        items and were skipped (``skip_unknown``); otherwise such a row raises :class:`DataError`.
        """
        items = encode(frame["item"], self.item_ids)
        unknown = items < 0
        if unknown.any() and not skip_unknown:
            first = frame["item"][int(np.argmax(unknown))]
            raise DataError(
                f"{int(unknown.sum())} of {items.size} interactions are with items that are not in the catalogue of "
                f"{self.path}, the first with {first!r}; expected known items, or --skip-unknown"
            )
        users: list[str] = frame["user"].cast(pl.String).to_numpy()[~unknown].tolist()
        with self._database.writing() as db:
            before = self._counts(db)
            given = dict(identities or {})
            if first_identity is not None:
                new = [each for each in dict.fromkeys(users) if self._key(db, each) is None]
                given |= {user: number for number, user in enumerate(new, first_identity)}
            self._insert_users(db, [(user, given.get(user)) for user in dict.fromkeys(users)])
            self._insert(db, zip(items[~unknown].tolist(), users, strict=True))
            self._describe(db, attributes or {})
            after = self._counts(db)
        return after[0] - before[0], after[1] - before[1], int(unknown.sum())

    def add(self, user_id: str, *item_ids: str) -> int:
        """Take interactions of one user in, who may be new; on return they are on the disk. How many are new."""
        items = encode(pl.Series(item_ids), self.item_ids).tolist()
        for item, given in zip(items, item_ids, strict=True):
            if item < 0:
                raise DataError(f"unknown item {given!r}; expected one of the {self.n_items} in the catalogue")
        with self._database.writing() as db:
            before = self._counts(db)
            self._insert_users(db, [(user_id, None)])
            self._insert(db, [(item, user_id) for item in items])
            return self._counts(db)[1] - before[1]

    @staticmethod
    def _insert(db: sqlite3.Connection, pairs: Iterable[tuple[int, str]]) -> None:
        """Insert interactions, an item and the external id of a user each."""
        db.executemany("INSERT OR IGNORE INTO interactions SELECT user, ? FROM users WHERE id = ?", pairs)

    def _describe(self, db: sqlite3.Connection, attributes: Mapping[str, Sequence[float]]) -> None:
        """Give users, by external id, their attributes [F]."""
        for user, values in attributes.items():
            if len(values) != self.n_user_attributes:
                raise DataError(
                    f"user {user!r} has {len(values)} attributes; expected the {self.n_user_attributes} of {self.path}"
                )
            content = np.asarray(values, dtype=np.float32).tobytes()
            db.execute("UPDATE users SET attributes = ? WHERE id = ?", (content, user))

    @staticmethod
    def _key(db: sqlite3.Connection, user_id: str) -> int | None:
        row = db.execute("SELECT user FROM users WHERE id = ?", (user_id,)).fetchone()
        return None if row is None else int(row[0])

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
                if self._key(db, user) is None:
                    raise DataError(f"unknown user {user!r}; expected one whose interactions are here")
            self._insert_users(db, identities.items())

    def identity(self, user_id: str) -> int:
        """The identity of a user by its external id; a negative number, good here alone, for one who has none yet."""
        with self._database.reading() as db:
            row = db.execute("SELECT coalesce(identity, -user) FROM users WHERE id = ?", (user_id,)).fetchone()
            if row is None:
                raise DataError(
                    f"unknown user {user_id!r}; {self.path} has {self._counts(db)[0]} users, and not this one"
                )
        return int(row[0])

    def forget(self, user_id: str) -> None:
        """Delete all that there is about a user, and overwrite where it stood.

        The answer to the last round goes as well, because the user's part is in it. What was handed over in earlier
        rounds is in the federation's sums and cannot be taken back from here.
        """
        self.identity(user_id)
        with self._database.writing() as db:
            db.execute("DELETE FROM users WHERE id = ?", (user_id,))
            db.execute("UPDATE runs SET reply = NULL")
            db.execute("UPDATE node SET scrubbing = 1")
        self._database.scrub()

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
        given = None
        if self.encoding is not None:  # who has told none has zeros
            given = torch.zeros(len(found), self.n_user_attributes)
            for place, (_, told) in enumerate(found):
                if told is not None:
                    given[place] = torch.frombuffer(bytearray(told), dtype=torch.float32)
        return Rows(users, limits, torch.from_numpy(items), segments, given), torch.arange(items.size)

    def recall(self, users: Tensor, positions: Tensor) -> Any:
        """The memories of ``users`` [B]; who has none yet is given the one to start with.

        Rows of items that were not there when a memory was stored are as at the start.
        """
        return self.recall_all(users)[0]

    def recall_all(self, users: Tensor) -> tuple[Any, Tensor, Tensor]:
        """:meth:`recall`; and who of them [B] has a memory, and whose [B] is of other items than are there now."""
        joined = self._run()
        query = "SELECT content FROM memories WHERE run = ? AND user = ?"
        with self._database.reading() as db:
            rows, _ = self.rows(users)
            blank = joined.algorithm.init_clients(rows, Key(joined.seed).fold("memory"))
            stored = [db.execute(query, (joined.number, key)).fetchone() for key, _ in self._find(db, users)]
        values = {field.name: getattr(blank, field.name).numpy().copy() for field in fields(blank)}
        per_row = {field.name for field in fields(blank) if field.metadata.get("per") == "row"}
        items, limits = rows.items.numpy(), rows.offsets.tolist()
        has = torch.tensor([content is not None for content in stored], dtype=torch.bool)
        other = torch.zeros_like(has)
        for place, content in enumerate(stored):
            if content is None:
                continue
            arrays = self._arrays(content[0])
            known, here = arrays.pop(OWN), slice(limits[place], limits[place + 1])
            source: Any = slice(None)
            target: Any = source
            if not np.array_equal(known, items[here]):
                other[place] = True
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
        return type(blank)(**{name: torch.from_numpy(array) for name, array in values.items()}), has, other

    def remember(self, users: Tensor, positions: Tensor, client_state: Any) -> None:
        """Write the memories of ``users`` [B] back."""
        number = self._run().number
        per_row = {field.name for field in fields(client_state) if field.metadata.get("per") == "row"}
        arrays = {
            field.name: getattr(client_state, field.name).detach().cpu().numpy() for field in fields(client_state)
        }
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

    def _arrays(self, content: bytes) -> dict[str, NDArray[Any]]:
        """The arrays in a cell of the file."""
        try:
            return load_arrays(content)
        except SafetensorError as error:
            raise StoreError(f"{self.path}: is damaged ({error}); expected a whole file: restore its backup") from None

    @staticmethod
    def _own(db: sqlite3.Connection, users: list[int]) -> list[NDArray[np.int64]]:
        """The items of each user, ascending."""
        query = "SELECT item FROM interactions WHERE user = ? ORDER BY item"
        return [np.array(db.execute(query, (user,)).fetchall(), dtype=np.int64).reshape(-1) for user in users]

    # --- rounds ---

    def join(
        self,
        algorithm: Algorithm[Any, Any, Any],
        run: str,
        seed: int | None = None,
        configuration: str | None = None,
    ) -> int:
        """Take part in a run from now on; returns the seed of all that its users draw in it, which stays here.

        The seed follows from the node's secret and the run's name; a simulation gives one. Raises :class:`RoundError`
        for a run that was left for another one, and for one that began with another ``configuration``: what is released
        is counted for a run as a whole. Memories of a run that was left are dropped, unless its model is served.
        """
        digest = None if configuration is None else hashlib.sha256(configuration.encode()).digest()
        with self._database.writing() as db:
            row = db.execute("SELECT number FROM runs WHERE run = ?", (run,)).fetchone()
            (latest,) = db.execute("SELECT coalesce(max(number), 0) FROM runs").fetchone()
            if row is not None and row[0] != latest:
                raise RoundError(f"this node left the run {run} for another one; expected the latest, or a new name")
            if row is None:
                row = (latest + 1,)
                db.execute("INSERT INTO runs (number, run) VALUES (?, ?)", (*row, run))
                db.execute("UPDATE runs SET reply = NULL WHERE number < ?", row)
                self._tidy(db)
            if digest is not None:
                db.execute(
                    "UPDATE runs SET configuration = coalesce(configuration, ?) WHERE number = ?", (digest, *row)
                )
                if db.execute("SELECT configuration FROM runs WHERE number = ?", row).fetchone()[0] != digest:
                    raise RoundError(f"run {run} began with another configuration; expected that one, or a new name")
        return self._join(algorithm, run, row[0], seed)

    def _join(self, algorithm: Algorithm[Any, Any, Any], run: str, number: int, seed: int | None = None) -> int:
        digest = hashlib.blake2b(run.encode(), key=self._secret, digest_size=8).digest()
        self._joined = Joined(algorithm, run, number, int.from_bytes(digest, "little") if seed is None else seed)
        return self._joined.seed

    @staticmethod
    def _tidy(db: sqlite3.Connection) -> None:
        """Drop the memories of all runs but the latest and the one whose model is served."""
        kept = "SELECT max(number) FROM runs UNION SELECT number FROM runs JOIN served USING (run)"
        db.execute(f"DELETE FROM memories WHERE run NOT IN ({kept})")
        db.execute("DELETE FROM opened WHERE run < (SELECT max(number) FROM runs)")

    def _run(self) -> Joined:
        if self._joined is None:
            raise RoundError("this node takes part in no run yet; expected join() first")
        return self._joined

    @property
    def seed(self) -> int:
        """The seed of all that the node's users draw in the run."""
        return self._run().seed

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

    def open_sum(self, number: int, request: bytes, nodes: Iterable[int]) -> None:
        """Take note that the answer to round ``number``, whose content is ``request``, is opened in a sum with those
        ``nodes``.

        Raises :class:`RoundError` where one with others, or to another request, was opened: the difference of two sums
        shows what one has more.
        """
        joined, digest = self._run(), hashlib.sha256(request + repr(sorted(nodes)).encode()).digest()
        with self._database.writing() as db:
            db.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?)", (joined.number, number, digest))
            query = "SELECT nodes FROM opened WHERE run = ? AND round = ?"
            if db.execute(query, (joined.number, number)).fetchone()[0] != digest:
                raise RoundError(
                    f"the sum of round {number} of run {joined.run} was opened with other nodes or users; the "
                    "difference of two sums would show what one has more"
                )

    # --- recommending ---

    def receive(self, broadcast: Any, users: Tensor, run: str, number: int, configuration: str) -> None:
        """Keep what :func:`perfedrec.runtimes.node.serving.serving_broadcast` gave for ``users`` [B] after so many rounds.

        It takes the place of what was served before. ``configuration`` is the method with its options as TOML.
        """
        tensors, scalars = flatten(broadcast)
        own = {name: tensors.pop(name).numpy() for name in _per_user(broadcast) & tensors.keys()}

        def content(row: int) -> bytes:
            return dump_arrays({name: np.ascontiguousarray(values[row : row + 1]) for name, values in own.items()})

        shared = dump_arrays({name: np.ascontiguousarray(values.numpy()) for name, values in tensors.items()})
        with self._database.writing() as db:
            for table in ("served", "served_users"):
                db.execute(f"DELETE FROM {table}")
            what = (run, number, int(time.time()), configuration, json.dumps(scalars), shared, content(users.numel()))
            db.execute("INSERT INTO served VALUES (1, ?, ?, ?, ?, ?, ?, ?)", what)
            put = "INSERT INTO served_users SELECT user, ? FROM users WHERE identity = ?"
            db.executemany(put, [(content(row), identity) for row, identity in enumerate(users.tolist())])
            self._tidy(db)

    def served(self) -> Served:
        """What is served. Raises :class:`StoreError` where no model has come yet."""
        with self._database.reading() as db:
            row = db.execute("SELECT run, round, received, configuration FROM served").fetchone()
        if row is None:
            raise StoreError(f"{self.path}: no model has come from the federation yet; expected one to recommend with")
        return Served(*row)

    def consult(self, algorithm: Algorithm[Any, Any, Any]) -> None:
        """Take up the memories that belong to the served model, without taking part in its run."""
        run = self.served().run
        with self._database.reading() as db:
            row = db.execute("SELECT number FROM runs WHERE run = ?", (run,)).fetchone()
        self._join(algorithm, run, row[0] if row is not None else 0)

    def broadcast(self, cls: type[Any], users: Tensor) -> Any:
        """The served view, a record of ``cls``, of ``users`` [B]; those whom it did not know are newcomers."""
        with self._database.reading() as db:
            scalars, tables, newcomer = db.execute("SELECT scalars, tables, newcomer FROM served").fetchone()
            query = "SELECT content FROM served_users WHERE user = ?"
            found = [(db.execute(query, (user,)).fetchone() or (newcomer,))[0] for user, _ in self._find(db, users)]
        own = [self._arrays(content) for content in found]
        arrays = self._arrays(tables) | {name: np.concatenate([each[name] for each in own]) for name in own[0]}
        return unflatten(cls, {name: torch.from_numpy(each) for name, each in arrays.items()}, json.loads(scalars))

    def glance(self) -> tuple[int, int | None]:
        """How many users are hosted, and when the served model came (seconds since 1970; ``None`` where none has).

        From any thread, also while a round is being worked on.
        """
        with self._database.beside() as db:
            query = "SELECT (SELECT count(*) FROM users), (SELECT received FROM served)"
            users, received = db.execute(query).fetchone()
        return users, received

    def status(self) -> dict[str, Any]:
        """What is in the file, in figures."""
        with self._database.reading() as db:
            users, interactions = self._counts(db)
            (registered,) = db.execute("SELECT count(identity) FROM users").fetchone()
            (schema,) = db.execute("PRAGMA user_version").fetchone()
            run = db.execute("SELECT run, round FROM runs ORDER BY number DESC LIMIT 1").fetchone()
            query = "SELECT content FROM memories WHERE run = (SELECT max(number) FROM runs)"
            client_states = [self._arrays(content) for (content,) in db.execute(query)]
            served = db.execute("SELECT run, round, received FROM served").fetchone()
        taken = [int(each["taken"][0]) for each in client_states if "taken" in each]
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
            "participations": {"total": sum(taken), "most": max(taken, default=0), "users": sum(map(bool, taken))},
            "model": None
            if served is None
            else {"run": served[0], "round": served[1], "age_seconds": max(int(time.time()) - served[2], 0)},
        }


def _per_user(broadcast: Any) -> set[str]:
    return {field.name for field in fields(broadcast) if field.metadata.get("per") == "user"}


_NONE = np.zeros(0, dtype=np.int64)
