"""The runs of a node in its file: the client states of its users, and one answer to each round.

A round is one transaction: its client states and its answer are stored together, or neither is.

All noise of a node follows from its secret, the run, the round and the user. Two answers to one round on different
tables or interactions would therefore carry the same noise, and their difference would be free of noise. So a node
answers a round once (:meth:`RoundStore.answer_round`), and it does not go back to a run that it has left for another.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, ClientRecord
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.records import old_names
from perfedrec.runtimes.node.database import Database, StoreError
from perfedrec.runtimes.node.users import UserStore

OWN_ITEMS = "own items"
"""Stored beside the fields of a client state: the items [r] that its rows belong to. No field can have this name."""


class RoundError(PerfedrecError):
    """A node was asked for a round that it must not play."""


@dataclass(frozen=True)
class JoinedRun:
    """The run that a node takes part in: its algorithm, its name and number in the file, and the seed of everything
    random that the node's users draw in it."""

    algorithm: Algorithm[Any, Any, Any]
    run: str
    number: int
    seed: int


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
    """The part of a :class:`~perfedrec.runtimes.node.store.Store` that holds runs, client states and answers."""

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
    ) -> int:
        """Take part in ``run`` from now on. Returns the seed of everything random that the node's users draw in it,
        which must not leave the node.

        The seed follows from the node's secret and the run's name; a simulation gives its own ``seed``. Client states
        of earlier runs are deleted, unless the model of their run is served.

        Raises :class:`RoundError` for a run that this node has left for another one, and for a run that began with
        another ``configuration``: the privacy budget is counted for a run as a whole.
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
            if digest is not None:
                db.execute(
                    "UPDATE runs SET configuration = coalesce(configuration, ?) WHERE number = ?", (digest, *row)
                )
                if db.execute("SELECT configuration FROM runs WHERE number = ?", row).fetchone()[0] != digest:
                    raise RoundError(f"run {run} began with another configuration; expected that one, or a new name")
        return self._use_run(algorithm, run, row[0], seed)

    def _use_run(self, algorithm: Algorithm[Any, Any, Any], run: str, number: int, seed: int | None = None) -> int:
        """Read and write the client states of run ``number``, and draw by its seed, from now on."""
        digest = hashlib.blake2b(run.encode(), key=self._secret, digest_size=8).digest()
        self._joined = JoinedRun(algorithm, run, number, int.from_bytes(digest, "little") if seed is None else seed)
        return self._joined.seed

    @staticmethod
    def _delete_old_states(db: sqlite3.Connection) -> None:
        """Delete the client states of all runs but the latest and the one whose model is served, and the records of
        opened sums of all runs but the latest."""
        kept = "SELECT max(number) FROM runs UNION SELECT number FROM runs JOIN served USING (run)"
        db.execute(f"DELETE FROM memories WHERE run NOT IN ({kept})")
        db.execute("DELETE FROM opened WHERE run < (SELECT max(number) FROM runs)")

    def _run(self) -> JoinedRun:
        if self._joined is None:
            raise RoundError("this node takes part in no run yet; expected a call of join_run() first")
        return self._joined

    @property
    def seed(self) -> int:
        """The seed of everything random that the node's users draw in the run. It must not leave the node."""
        return self._run().seed

    # --- client states ---

    def load_client_states(self, users: Tensor, positions: Tensor) -> Any:
        """The client states of ``users`` [B] in the run; a user without one gets the state that users start with.

        Rows of items that were added after a state was stored are as in the state that users start with. ``positions``
        is not used: it is part of the protocol :class:`~perfedrec.runtimes.population.Users`.
        """
        return self.find_client_states(users).client_state

    def find_client_states(self, users: Tensor) -> FoundStates:
        """The client states of :meth:`load_client_states` with their origin.

        Raises :class:`StoreError` if the stored states do not fit the algorithm of the run.
        """
        joined = self._run()
        query = "SELECT content FROM memories WHERE run = ? AND user = ?"
        with self._database.reading() as db:
            rows, _ = self.rows(users)
            initial = joined.algorithm.init_clients(rows, Key(joined.seed).fold("memory"))
            found = [db.execute(query, (joined.number, key)).fetchone() for key, _ in self._find_users(db, users)]
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors_of(initial).items()}
        per_row, before = fields_per(initial, "row"), old_names(type(initial))
        items, limits = rows.items.numpy(), rows.offsets.tolist()
        stored = torch.tensor([content is not None for content in found], dtype=torch.bool)
        outdated = torch.zeros_like(stored)
        for place, content in enumerate(found):
            if content is None:
                continue
            saved, own = self._database.load_arrays(content[0]), slice(limits[place], limits[place + 1])
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
                raise StoreError(
                    f"{self.path}: the client states of run {self._run().run} were stored by another method or "
                    f"configuration; {name} does not fit"
                )

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: ClientRecord) -> None:
        """Store the client states of ``users`` [B] for the run.

        ``positions`` is not used: it is part of the protocol :class:`~perfedrec.runtimes.population.Users`.
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

    def _participations(self, db: sqlite3.Connection) -> list[int]:
        """In how many rounds of the latest run each user has taken part, for users with a stored client state."""
        query = "SELECT content FROM memories WHERE run = (SELECT max(number) FROM runs)"
        saved = [self._database.load_arrays(content) for (content,) in db.execute(query)]
        names = ("participations", "taken")  # the second one was its name up to schema 5
        return [int(each[name][0]) for each in saved for name in names if name in each]

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
        """Record that the answer to round ``number``, whose content is ``request``, is opened in a secure sum with the
        answers of ``nodes``.

        Raises :class:`RoundError` if it was opened in a sum with other nodes, or for another request: the difference of
        the two sums would show the part of those who are in only one of them.
        """
        joined, digest = self._run(), hashlib.sha256(request + repr(sorted(nodes)).encode()).digest()
        with self._database.writing() as db:
            db.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?)", (joined.number, number, digest))
            query = "SELECT nodes FROM opened WHERE run = ? AND round = ?"
            if db.execute(query, (joined.number, number)).fetchone()[0] != digest:
                raise RoundError(
                    f"the sum of round {number} of run {joined.run} was opened with other nodes or users; the "
                    "difference of two sums would show the part of those who are in only one of them"
                )


def tensors_of(record: object) -> dict[str, Tensor]:
    """The tensors of a client state, by field."""
    return {field.name: getattr(record, field.name) for field in fields(cast(Any, record))}


def fields_per(record: object, unit: str) -> set[str]:
    """Names of the fields of a record that have one row per ``unit``, as their metadata says: "row" or "user"."""
    return {field.name for field in fields(cast(Any, record)) if field.metadata.get("per") == unit}
