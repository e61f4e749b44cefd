"""A node's file as its owner uses it: what is stored about each user, and about items, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from perfedrec.core.errors import DataError
from perfedrec.nn.inference import Floats, Ints, Model
from perfedrec.runtimes.node.database import Database
from perfedrec.runtimes.node.details import ItemDetails
from perfedrec.runtimes.node.scorer import Scorer, Stored

if TYPE_CHECKING:
    from perfedrec.data.details import Details


class OwnedFile(Scorer):
    """A node's file with the lists of its users and the ``details`` of items."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.details = ItemDetails(database)

    # --- items ---

    def numbers(self, items: Iterable[str | int]) -> Ints:
        """The numbers of items. Raises :class:`DataError` for an unknown one."""
        with self._database.reading() as db:
            return np.array([self._number_of(db, str(each)) for each in items], dtype=np.int64)

    def describe(self, found: Iterable[Details]) -> tuple[int, int]:
        """Store details of items. Returns for how many items of the catalogue, and how many others there were."""
        given = list(found)
        with self._database.writing() as db:
            numbers: dict[str, int] = dict(db.execute("SELECT id, item FROM items").fetchall())
            kept = [(numbers[each.item], each) for each in given if each.item in numbers]
            self.details.put(kept)
        return len(kept), len(given) - len(kept)

    def popularity(self) -> Floats:
        """[m] with how many users of the federation each item has interactions, as far as the served model knows; 0
        where it does not."""
        _, model = self.served()
        if model is not None:
            found = model.shared.get("degrees")
        else:
            with self._database.reading() as db:
                (tables,) = db.execute("SELECT tables FROM served").fetchone()
            found = self._database.load_arrays(tables).get("degrees")
        return np.zeros(self.n_items, dtype=np.float32) if found is None else found.astype(np.float32)

    def by_popularity(self, scores: Floats, parts: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """The scores and parts of a user; where no model knows anything of the user, popularity alone decides."""
        possible = scores > -np.inf
        if not possible.any() or np.ptp(scores[possible]) > 0:
            return scores, parts
        counts = self.popularity()
        share = counts / max(float(counts.max()), 1.0)
        return np.where(possible, scores + share, scores), parts | {"popularity": share}

    def served(self) -> tuple[tuple[Any, ...], Model | None]:
        """Facts about the served model, and the model itself; ``None`` where its method needs torch."""
        with self._database.reading() as db:
            served = self.served_model(db)
            return served, self._read_model(db, served)

    # --- users ---

    def stored_of(self, user_ids: Sequence[str]) -> list[Stored | None]:
        """What the file has for the lists of several users at one moment; ``None`` for those who are not there."""

        def found(user_id: str) -> Stored | None:
            with suppress(DataError):
                return self.stored(user_id)
            return None

        with self._database.reading():
            return [found(each) for each in user_ids]

    def user_names(self) -> list[str]:
        """The external ids of all users, in the order in which they were added."""
        with self._database.reading() as db:
            return [name for (name,) in db.execute("SELECT id FROM users ORDER BY user")]

    def key_of(self, user_id: str) -> int:
        """The key of a user in the file. Raises :class:`DataError` for an unknown user."""
        with self._database.reading() as db:
            self.identity(user_id)
            return int(db.execute("SELECT user FROM users WHERE id = ?", (user_id,)).fetchone()[0])

    def own_numbers(self, user_id: str) -> list[int]:
        """The items that a user has interacted with, ascending."""
        with self._database.reading() as db:
            query = "SELECT item FROM interactions WHERE user = ? ORDER BY item"
            return [item for (item,) in db.execute(query, (self.key_of(user_id),))]

    def remove_interactions(self, user_id: str, *item_ids: str) -> int:
        """Delete interactions of a user, and return how many there were. Raises :class:`DataError` for an unknown user
        or item; then nothing is deleted."""
        return self._delete("interactions", user_id, item_ids)

    def restore(self, user_id: str, *item_ids: str) -> int:
        """Take items off the list of those that a user has dismissed, and return how many were on it."""
        return self._delete("dismissed", user_id, item_ids)

    def _delete(self, table: str, user_id: str, item_ids: Iterable[str]) -> int:
        with self._database.writing() as db:
            key, items = self.key_of(user_id), [self._number_of(db, each) for each in item_ids]
            query = f"DELETE FROM {table} WHERE user = ? AND item IN (SELECT value FROM json_each(?))"
            count = db.execute(query, (key, json.dumps(items))).rowcount
            if table == "interactions":
                query = "DELETE FROM held_out WHERE user = ? AND item IN (SELECT value FROM json_each(?))"
                db.execute(query, (key, json.dumps(items)))
        return count

    def dismiss(self, user_id: str, *item_ids: str) -> int:
        """Never recommend items to a user again. Returns how many of them are newly dismissed. Raises
        :class:`DataError` for an unknown user or item; then nothing changes."""
        with self._database.writing() as db:
            key, items = self.key_of(user_id), [self._number_of(db, each) for each in item_ids]
            put = "INSERT OR IGNORE INTO dismissed SELECT ?, value FROM json_each(?)"
            return db.execute(put, (key, json.dumps(sorted(set(items))))).rowcount

    def dismissed_numbers(self, key: int) -> Ints:
        """The items that a user has dismissed, ascending."""
        with self._database.reading() as db:
            found = db.execute("SELECT item FROM dismissed WHERE user = ? ORDER BY item", (key,)).fetchall()
        return np.array(found, dtype=np.int64).reshape(-1)

    def about(self, user_id: str) -> dict[str, Any]:
        """What the file has about a user beside items and journal: the identity in the federation, attributes by name,
        and the sizes of what training keeps, with the names of the numbers in it."""
        with self._database.reading() as db:
            key = self.key_of(user_id)
            identity, attributes = db.execute(
                "SELECT identity, attributes FROM users WHERE user = ?", (key,)
            ).fetchone()
            names = [name for name, _ in json.loads(self._encoding)]
            values = [] if attributes is None else np.frombuffer(attributes, dtype=np.float32).tolist()
            queries = {
                "client states": "SELECT content FROM memories WHERE user = ?",
                "kept client states": "SELECT content FROM kept_states WHERE user = ? AND content IS NOT NULL",
                "part of the served model": "SELECT content FROM served_users WHERE user = ?",
            }
            found = {name: [content for (content,) in db.execute(query, (key,))] for name, query in queries.items()}
        trained = {
            name: [
                {field: array.tolist() for field, array in self._database.load_arrays(each).items()}
                for each in contents
            ]
            for name, contents in found.items()
        }
        return {"identity": identity, "attributes": dict(zip(names, values, strict=False)), "trained": trained}
