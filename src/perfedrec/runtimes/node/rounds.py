"""The runs of a node in its file: the client states of its users, and one answer to each round.

A round is one transaction: its client states and its answer are stored together, or neither is.

All noise of a node follows from its secret, the run, the round and the user. Two answers to one round on different
tables or interactions would therefore carry the same noise, and their difference would be free of noise. So a node
answers a round once (:meth:`RoundStore.answer_round`), and it does not go back to a run that it has left for another.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, ClientRecord
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key, words_of
from perfedrec.core.records import old_names
from perfedrec.data.interactions import Ints
from perfedrec.evaluation import Held
from perfedrec.evaluation.holdout import TRAIN, HoldOut
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.node.database import Database
from perfedrec.runtimes.node.scorer import OWN_ITEMS
from perfedrec.runtimes.node.users import UserStore, column, jagged


class RoundError(PerfedrecError):
    """A node was asked for a round that it must not play."""


@dataclass(frozen=True)
class JoinedRun:
    """The run that a node takes part in: its algorithm, its name and number in the file, and the seed of everything
    random that the node's users draw in it. ``served``: where the node only recommends, with the model after this
    number of rounds."""

    algorithm: Algorithm[Any, Any, Any]
    run: str
    number: int
    seed: int
    served: int | None = None


@dataclass(frozen=True)
class FoundStates:
    """Client states of B users, and where they come from.

    ``stored`` [B]: the user's state was in the file; otherwise it is the one that a user starts with. ``outdated`` [B]:
    the state was stored for other items than the user has now.
    """

    client_state: Any
    stored: Tensor
    outdated: Tensor


class RoundStore(UserStore):
    """The part of a :class:`~perfedrec.runtimes.node.store.Store` that holds runs, held-out items, client states and
    answers.

    The items that users hold out of a run are chosen when the node joins it. In the rounds of the run :meth:`rows` is
    without them; to recommend, all items count.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._joined: JoinedRun | None = None

    # --- runs ---

    def join_run(
        self,
        algorithm: Algorithm[Any, Any, Any],
        run: str,
        seed: int | None = None,
        configuration: str | None = None,
        hold_out: HoldOut | None = None,
    ) -> int:
        """Take part in ``run`` from now on. Returns the seed of everything random that the node's users draw in it,
        which must not leave the node.

        The seed follows from the node's secret and the run's name; a simulation gives its own ``seed``. By the rule
        ``hold_out`` users hold items out of a run that is new to the node. Client states of earlier runs are deleted,
        unless the model of their run is served.

        Raises :class:`RoundError` for a run that this node has left for another one or because its owner left the
        federation, and for a run that began with another ``configuration``: the privacy budget is counted for a run as
        a whole.
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
                self._delete_old_states(db)
                self._hold_out(db, row[0], hold_out)
            if digest is not None:
                db.execute(
                    "UPDATE runs SET configuration = coalesce(configuration, ?) WHERE number = ?", (digest, *row)
                )
                if db.execute("SELECT configuration FROM runs WHERE number = ?", row).fetchone()[0] != digest:
                    raise RoundError(f"run {run} began with another configuration; expected that one, or a new name")
            self._check_here(db, run, row[0])
        return self._use_run(algorithm, run, row[0], seed)

    def _use_run(
        self,
        algorithm: Algorithm[Any, Any, Any],
        run: str,
        number: int,
        seed: int | None = None,
        served: int | None = None,
    ) -> int:
        """Read and write the client states of run ``number``, and draw by its seed, from now on."""
        own = self.seed_of(run) if seed is None else seed
        self._joined = JoinedRun(algorithm, run, number, own, served)
        return own

    @staticmethod
    def _check_here(db: sqlite3.Connection, run: str, number: int) -> None:
        """Raise :class:`RoundError` for a run during which the node's owner has left the federation."""
        if db.execute("SELECT gone FROM runs WHERE number = ?", (number,)).fetchone()[0]:
            raise RoundError(f"this node's owner has left the federation during run {run}; expected a new run")

    @staticmethod
    def _delete_old_states(db: sqlite3.Connection) -> None:
        """Delete the client states of all runs but the latest and the one whose model is served, and the records of
        opened sums and of held-out items of all runs but the latest."""
        kept = "SELECT max(number) FROM runs UNION SELECT number FROM runs JOIN served USING (run)"
        for table in ("memories", "kept_states"):
            db.execute(f"DELETE FROM {table} WHERE run NOT IN ({kept})")
        for table in ("opened", "held_out"):
            db.execute(f"DELETE FROM {table} WHERE run < (SELECT max(number) FROM runs)")

    def _run(self) -> JoinedRun:
        if self._joined is None:
            raise RoundError("this node takes part in no run yet; expected a call of join_run() first")
        return self._joined

    @property
    def seed(self) -> int:
        """The seed of everything random that the node's users draw in the run. It must not leave the node."""
        return self._run().seed

    # --- held-out items ---

    def _hold_out(self, db: sqlite3.Connection, number: int, rule: HoldOut | None) -> None:
        """Choose the items that users hold out of run ``number``. Those whose items are split already keep that."""
        given = "SELECT user FROM interactions WHERE part IS NOT NULL"
        db.execute(
            f"INSERT INTO held_out SELECT ?, user, item, part FROM interactions WHERE part <> {TRAIN}", (number,)
        )
        if rule is None:
            return
        query = f"SELECT user, id FROM users WHERE user NOT IN ({given}) ORDER BY user"
        found = db.execute(query).fetchall()
        keys, names = [key for key, _ in found], [name for _, name in found]
        items, limits, segments = jagged([self._items_of(db, key) for key in keys])
        words = words_of(map(str, self.item_ids.tolist()))
        parts = rule.parts(segments, limits.diff(), words_of(names), words[items])
        held = (parts != TRAIN).nonzero().squeeze(1)
        owners = torch.tensor(keys, dtype=torch.int64)[segments]
        rows = zip(owners[held].tolist(), items[held].tolist(), parts[held].tolist(), strict=True)
        db.executemany(f"INSERT INTO held_out VALUES ({number}, ?, ?, ?)", rows)

    def _items_of(self, db: sqlite3.Connection, key: int) -> Ints:
        """The items of a user, ascending; in the rounds of a run without those that are held out of it."""
        joined = self._joined
        if joined is None or joined.served is not None:
            return super()._items_of(db, key)
        query = """
            SELECT item FROM interactions WHERE user = :user
            AND item NOT IN (SELECT item FROM held_out WHERE run = :run AND user = :user) ORDER BY item
        """
        return column(db.execute(query, {"run": joined.number, "user": key}))

    def held_out(self, users: Tensor, part: int) -> Held:
        """The items of ``users`` [B] that are held out of the run as this ``part``; users are numbered by place."""
        query = "SELECT item FROM held_out WHERE run = ? AND user = ? AND part = ? ORDER BY item"
        with self._database.reading() as db:
            found = self._find_users(db, users)
            own = [column(db.execute(query, (self._run().number, key, part))) for key, _ in found]
        items, limits, _ = jagged(own)
        return Held(limits, items)

    # --- client states ---

    def load_client_states(self, users: Tensor, positions: Tensor, unread: Collection[str] = ()) -> Any:
        """The client states of ``users`` [B] in the run; a user without one gets the state that users start with.

        Rows of items that were added after a state was stored are as in the state that users start with. ``positions``
        and ``unread`` are not used: they are part of the protocol :class:`~perfedrec.runtimes.population.Users`.
        """
        return self.find_client_states(users).client_state

    def find_client_states(self, users: Tensor, after: int | None = None) -> FoundStates:
        """The client states of :meth:`load_client_states` with their origin; those ``after`` a number of rounds (with a
        served model: its number) where they were kept (:meth:`keep_states`).

        Raises :class:`StoreError` if the stored states do not fit the algorithm of the run.
        """
        joined = self._run()
        wanted = {"run": joined.number, "round": joined.served if after is None else after}
        queries = (
            "SELECT content FROM kept_states WHERE run = :run AND round = :round AND user = :user",
            "SELECT content FROM memories WHERE run = :run AND user = :user",
        )

        def stored_state(key: int) -> bytes | None:
            rows = (db.execute(query, {**wanted, "user": key}).fetchone() for query in queries)
            return next((row[0] for row in rows if row is not None), None)

        with self._database.reading() as db:
            rows, _ = self.rows(users)
            initial = joined.algorithm.init_clients(rows, Key(joined.seed).fold("memory"))
            found = [stored_state(key) for key, _ in self._find_users(db, users)]
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors_of(initial).items()}
        per_row, before = fields_per(initial, "row"), old_names(type(initial))
        items, limits = rows.items.numpy(), rows.offsets.tolist()
        stored = torch.tensor([content is not None for content in found], dtype=torch.bool)
        outdated = torch.zeros_like(stored)
        for place, content in enumerate(found):
            if content is None:
                continue
            saved, own = self._database.load_arrays(content), slice(limits[place], limits[place + 1])
            saved = {before.get(name, name): array for name, array in saved.items()}
            source: slice | NDArray[np.int64] = slice(None)
            target: slice | NDArray[np.int64] = slice(None)
            saved_items = saved.pop(OWN_ITEMS)
            if not np.array_equal(saved_items, items[own]):
                outdated[place] = True
                _, source, target = np.intersect1d(saved_items, items[own], assume_unique=True, return_indices=True)
            self._check_fits(saved, arrays)
            if wrong := [name for name in arrays if len(saved[name]) != (len(saved_items) if name in per_row else 1)]:
                raise self._database.damaged(f"{wrong[0]} has {len(saved[wrong[0]])} rows")
            for name, into in arrays.items():
                if name in per_row:
                    into[own][target] = saved[name][source]
                else:
                    into[place] = saved[name][0]
        client_state = type(initial)(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return FoundStates(client_state, stored, outdated)

    def _check_fits(self, saved: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
        """Raises :class:`StoreError` if a stored client state lacks a field, or if one has another type or shape."""
        for name, like in expected.items():
            array = saved.get(name)
            if array is None or array.dtype != like.dtype or array.shape[1:] != like.shape[1:]:
                raise self.misfit(self._run().run, name)

    def save_client_states(
        self, users: Tensor, positions: Tensor, client_state: ClientRecord, before: ClientRecord | None = None
    ) -> None:
        """Store the client states of ``users`` [B] for the run.

        ``positions`` and ``before`` are not used: they are part of the protocol
        :class:`~perfedrec.runtimes.population.Users`.
        """
        number, per_row = self._run().number, fields_per(client_state, "row")
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors_of(client_state).items()}
        with self._database.writing() as db:
            rows, _ = self.rows(users)
            keys = [key for key, _ in self._find_users(db, users)]
            items, limits = rows.items.numpy(), rows.offsets.tolist()
            contents = []
            for place, key in enumerate(keys):
                own = slice(limits[place], limits[place + 1])
                one = {
                    name: np.ascontiguousarray(array[own if name in per_row else slice(place, place + 1)])
                    for name, array in arrays.items()
                }
                contents.append((number, key, dump_arrays(one | {OWN_ITEMS: np.ascontiguousarray(items[own])})))
            put = "INSERT INTO memories VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET content = excluded.content"
            db.executemany(put, contents)

    def keep_states(self, played: int, keep: Iterable[int]) -> None:
        """Keep the client states of all users as they are after ``played`` rounds, because these may prove to be the
        best. Of the states that were kept before, those after the numbers ``keep`` of rounds stay, and those of the
        served model."""
        number, wanted = self._run().number, json.dumps([played, *keep])
        with self._database.writing() as db:
            db.execute(
                "DELETE FROM kept_states WHERE run = :run AND round NOT IN (SELECT value FROM json_each(:keep)) "
                "AND round NOT IN (SELECT served.round FROM served JOIN runs USING (run) WHERE number = :run)",
                {"run": number, "keep": wanted},
            )
            db.execute(
                "INSERT OR IGNORE INTO kept_states SELECT :run, :round, user, content FROM users "
                "LEFT JOIN (SELECT user, content FROM memories WHERE run = :run) USING (user)",
                {"run": number, "round": played},
            )

    # --- rounds ---

    def answer_round(self, number: int, request: bytes, work: Callable[[], bytes | None]) -> bytes | None:
        """Answer round ``number`` of the run, whose content is ``request``, with what ``work`` returns: once.

        The client states that ``work`` writes and the answer are stored in one transaction. A round that was answered
        is not played again: for the same request this returns the stored answer. If ``work`` returns ``None``, no
        answer is stored.

        Raises :class:`RoundError` for an earlier round than the last one, for the last one with another request, and
        for the last one if its answer was not stored.
        """
        joined, digest = self._run(), hashlib.sha256(request).digest()
        with self._database.writing() as db:
            self._check_here(db, joined.run, joined.number)
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
        """Record that the answer to round ``number`` (below 0: to the question with this number), whose content is
        ``request``, is opened in a secure sum with the answers of ``nodes``.

        Raises :class:`RoundError` if it was opened in a sum with other nodes, or for another request: the difference of
        the two sums would show the part of those who are in only one of them.
        """
        joined, digest = self._run(), hashlib.sha256(request + repr(sorted(nodes)).encode()).digest()
        with self._database.writing() as db:
            db.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?)", (joined.number, number, digest))
            query = "SELECT nodes FROM opened WHERE run = ? AND round = ?"
            if db.execute(query, (joined.number, number)).fetchone()[0] != digest:
                raise RoundError(
                    f"{Question.sum_called(number)} of run {joined.run} was opened with other nodes or users; the "
                    "difference of two sums would show the part of those who are in only one of them"
                )


def tensors_of(record: object) -> dict[str, Tensor]:
    """The tensors of a client state, by field."""
    return {field.name: getattr(record, field.name) for field in fields(cast(Any, record))}


def fields_per(record: object, unit: str) -> set[str]:
    """Names of the fields of a record that have one row per ``unit``, as their metadata says: "row" or "user"."""
    return {field.name for field in fields(cast(Any, record)) if field.metadata.get("per") == unit}
