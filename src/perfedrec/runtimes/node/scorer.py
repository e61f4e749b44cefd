"""Recommending from a node's file without torch: what ``perfedrec node recommend`` waits for.

A :class:`Scorer` reads what :class:`perfedrec.runtimes.node.serving.LocalRecommender` reads, and computes the same
lists in numpy (:mod:`perfedrec.nn.inference`). Where it cannot, it says so, and torch has to do it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.inference import InferenceOptions
from perfedrec.core.words import TIES, fold_in, words_of
from perfedrec.nn.inference import Client, Floats, Ints, Model, UnsupportedError, User
from perfedrec.runtimes.node.database import Database
from perfedrec.runtimes.node.file import NodeFile

OWN_ITEMS = "own items"
"""Stored beside the fields of a client state: the items [r] that its rows belong to. No field can have this name."""

OLD_NAMES = {"vectors": "private", "lift": "user_init_scale"}
"""Fields that older versions stored under other names."""


@dataclass(frozen=True)
class Stored:
    """What a node's file has for the lists of one user: equal ones give equal lists.

    ``served`` are facts about the served model, and ``model`` is the model itself, ``None`` where its method needs
    torch. ``key`` and ``identity`` name the user, who has the ``items`` [r], ``received`` an own part of the model, and
    has a client ``state`` or none.
    """

    served: tuple[Any, ...]
    key: int
    identity: int
    items: tuple[int, ...]
    received: bytes
    state: bytes | None
    model: Model | None = field(compare=False)


def best(scores: Floats, k: int) -> Ints:
    """The items with the ``k`` best ``scores`` [m] above minus infinity, best first, and all others that are as good as
    the last one. Equal ones come by number. It takes a fifth of the time of sorting all items."""
    items = np.flatnonzero(scores > -np.inf)
    if k < items.size:
        items = items[scores[items] >= np.partition(scores[items], -k)[-k]]
    return items[np.argsort(-scores[items], kind="stable")]


class Scorer(NodeFile):
    """Scores for the users of a node's file, one at a time. The served model is read once for all of them, and again
    when the node has received another one."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._model: tuple[tuple[Any, ...], Model | None] | None = None

    def stored(self, user_id: str) -> Stored:
        """What the file has for the lists of a user.

        Raises :class:`DataError` for an unknown user, and :class:`StoreError` if the node has received no model.
        """
        with self._database.reading() as db:
            identity, served = self.identity(user_id), self.served_model(db)
            (key,) = db.execute("SELECT user FROM users WHERE id = ?", (user_id,)).fetchone()
            query = "SELECT item FROM interactions WHERE user = ? ORDER BY item"
            items = tuple(item for (item,) in db.execute(query, (key,)))
            known = db.execute("SELECT content FROM served_users WHERE user = ?", (key,)).fetchone()
            received = (known or db.execute("SELECT newcomer FROM served").fetchone())[0]
            state, model = self._stored_state(db, key, served), self._read_model(db, served)
        return Stored(served, key, identity, items, received, state, model)

    def user(self, stored: Stored) -> User | None:
        """The user as the lists are made for, after local training where no round of training has used all items.
        ``None`` where the method, or this user, needs torch."""
        if stored.model is None:
            return None
        user, is_new = self._user(stored.model, stored)
        try:
            return user.finetuned(stored.identity, self.seed_of(stored.served[0])) if is_new else user
        except UnsupportedError:
            return None

    def scores(self, user_id: str) -> tuple[Floats, dict[str, Floats]] | None:
        """[m] scores of all items for a user, minus infinity for the items that the user already has; and the named
        parts [m] that the scores are the sum of. ``None`` where the method, or this user, needs torch.

        Raises :class:`DataError` for an unknown user, and :class:`StoreError` if the node has received no model.
        """
        own = self.user(self.stored(user_id))
        if own is None:
            return None
        scores, parts = own.scores()
        scores[own.own] = -np.inf
        return scores, parts

    def served_model(self, db: sqlite3.Connection) -> tuple[Any, ...]:
        """Facts about the served model: run, round, when it was received, options. Raises :class:`StoreError` if there
        is none."""
        served: tuple[Any, ...] | None = db.execute("SELECT run, round, received, inference FROM served").fetchone()
        if served is None:
            raise self.no_model()
        return served

    def _read_model(self, db: sqlite3.Connection, served: tuple[Any, ...]) -> Model | None:
        """The served model; ``None`` where its method needs torch."""
        if self._model is None or self._model[0] != served:
            options, found = None if served[3] is None else InferenceOptions.load(served[3]), None
            if options is not None:
                scalars, tables = db.execute("SELECT scalars, tables FROM served").fetchone()
                named = {OLD_NAMES.get(name, name): value for name, value in json.loads(scalars).items()}
                found = Model(options, self._database.load_arrays(tables), named)
            self._model = served, found
        return self._model[1]

    def _user(self, model: Model, of: Stored) -> tuple[User, bool]:
        """A user as the file has it, and whether no round of training has used all of its items."""
        items, received = np.array(of.items, dtype=np.int64), self._database.load_arrays(of.received)
        client = Client.start(model.options, items.size, of.identity, self.seed_of(of.served[0]))
        if of.state is None:
            return User(model, items, received, client).started(), True
        stored = {OLD_NAMES.get(name, name): each for name, each in self._database.load_arrays(of.state).items()}
        saved_items = stored.pop(OWN_ITEMS)
        rows, fits = self._fitting(stored, client, saved_items.size, of.served[0])
        outdated = not np.array_equal(saved_items, items)
        if outdated:
            _, source, target = np.intersect1d(saved_items, items, assume_unique=True, return_indices=True)
            rows, old = np.zeros_like(client.rows), rows
            rows[target] = old[source]
        return User(model, items, received, Client(**fits, rows=rows)), outdated

    @staticmethod
    def _stored_state(db: sqlite3.Connection, key: int, served: tuple[Any, ...]) -> bytes | None:
        """The client state that belongs to the served model."""
        wanted = {"run": served[0], "round": served[1], "user": key}
        run = "(SELECT number FROM runs WHERE run = :run)"
        for table, also in (("kept_states", "AND round = :round"), ("memories", "")):
            query = f"SELECT content FROM {table} WHERE run = {run} AND user = :user {also}"
            if (row := db.execute(query, wanted).fetchone()) is not None:
                found: bytes | None = row[0]
                return found
        return None

    def _fitting(
        self, stored: dict[str, NDArray[Any]], like: Client, n_rows: int, run: str
    ) -> tuple[Floats, dict[str, Any]]:
        """The rows and the other fields of a stored client state. Raises :class:`StoreError` where they do not fit."""
        vector = like.private.shape
        wanted = {"private": (1, *vector), "first": (1, *vector), "second": (1, *vector), "steps": (1,)}
        wanted |= {"rows": (n_rows, *vector)} | ({"mix": (1, *like.mix.shape)} if like.mix.size else {})
        for name, shape in wanted.items():
            if name not in stored or stored[name].shape != shape:
                raise self.misfit(run, name)
        fields = {name: stored[name][0] for name in wanted if name != "rows"}
        return stored["rows"], {"mix": like.mix} | fields | {"steps": int(fields["steps"])}

    # --- lists ---

    def ids(self, items: Ints) -> list[int | str]:
        """The external ids of items, by number."""
        wanted = json.dumps(items.tolist())
        with self._database.reading() as db:
            query = "SELECT item, id FROM items WHERE item IN (SELECT value FROM json_each(?))"
            found = dict(db.execute(query, (wanted,)).fetchall())
        return [int(found[each]) if self._integers else found[each] for each in items.tolist()]

    def ranked(self, user_id: str, scores: Floats, k: int) -> Ints:
        """The ``k`` best of the items that can be recommended, best first. Equal scores come in the order of
        :class:`perfedrec.evaluation.order.RandomOrder`."""
        order = best(scores, k)
        values = scores[order]
        same = values[1:] == values[:-1]
        if same.any():
            tied = np.flatnonzero(np.append(False, same) | np.append(same, False))
            order[tied] = order[tied][np.lexsort((~self._tie_words(user_id, order[tied]), -values[tied]))]
        return order[:k]

    def _places(self, user_id: str, scores: Floats, items: Ints) -> Ints:
        """How many items come before each of ``items`` in the list of all items that :meth:`ranked` makes."""
        ordered = np.sort(scores[scores >= scores[items].min(initial=np.inf)])
        better = ordered.size - np.searchsorted(ordered, scores[items], side="right")
        equal = ordered.size - np.searchsorted(ordered, scores[items], side="left") - better
        within = np.zeros(scores.size, dtype=np.int64)
        for value in np.unique(scores[items[equal > 1]]):
            tied = np.flatnonzero(scores == value)
            within[tied[np.argsort(~self._tie_words(user_id, tied), kind="stable")]] = np.arange(tied.size)
        return better + within[items]

    def _tie_words(self, user_id: str, items: Ints) -> Ints:
        """[n] of items with equal scores, one with a higher word comes first."""
        own = TIES.words(words_of([user_id]))
        words: Ints = fold_in(own, words_of(map(str, self.ids(items)))).view(np.int64)
        return words

    def recommend(self, user_id: str, k: int) -> list[dict[str, Any]] | None:
        """The rows of :meth:`listed`; ``None`` where :meth:`scores` needs torch."""
        found = self.scores(user_id)
        return None if found is None else self.listed(user_id, *found, k)[1]

    def listed(
        self, user_id: str, scores: Floats, parts: Mapping[str, Floats], k: int
    ) -> tuple[Ints, list[dict[str, Any]]]:
        """The items of a list, by number, and the rows of :func:`perfedrec.evaluation.lists.explained` as plain
        values."""
        items = self.ranked(user_id, scores, k)
        moved = np.zeros(items.size, dtype=np.int64)
        if parts["global"].any():
            alone = np.where(scores > -np.inf, parts["global"], np.float32(-np.inf))
            moved = self._places(user_id, alone, items) - np.arange(items.size)
        columns = {
            "item": self.ids(items),
            "rank": list(range(1, items.size + 1)),
            "score": scores[items].tolist(),
            **{name: values[items].tolist() for name, values in parts.items()},
            "moved": moved.tolist(),
        }
        return items, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
