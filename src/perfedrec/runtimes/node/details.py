"""Titles, pictures and attributes of items in a node's file, so that no page needs a network."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from perfedrec.runtimes.node.database import Database

if TYPE_CHECKING:
    from perfedrec.data.details import Details


class ItemDetails:
    """The details of the items in a node's file. Items are numbered as in the catalogue."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, found: Iterable[tuple[int, Details]]) -> None:
        """Store details in place of those that the same items have: all of them, or none."""
        with self._database.writing() as db:
            for item, each in found:
                folded = None if each.title is None else _folded(each.title)
                attributes = json.dumps(dict(each.attributes), ensure_ascii=False)
                db.execute("REPLACE INTO details VALUES (?, ?, ?, ?)", (item, each.title, folded, attributes))
                db.execute("DELETE FROM pictures WHERE item = ?", (item,))
                if each.picture is not None:
                    db.execute("INSERT INTO pictures VALUES (?, ?, ?)", (item, *each.picture))

    def of(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """For each of the ``items``: title or ``None``, whether there is a picture, and attributes."""
        query = """
            SELECT value, title, pictures.item IS NOT NULL, attributes FROM json_each(?)
            LEFT JOIN details ON details.item = value LEFT JOIN pictures ON pictures.item = value ORDER BY key
        """
        with self._database.reading() as db:
            rows = db.execute(query, (json.dumps(list(items)),)).fetchall()
        return [
            {"title": title, "picture": bool(picture), "attributes": json.loads(attributes or "{}")}
            for _, title, picture, attributes in rows
        ]

    def picture(self, item: int) -> tuple[bytes, str] | None:
        """The content and the media type of an item's picture."""
        with self._database.reading() as db:
            row = db.execute("SELECT content, media FROM pictures WHERE item = ?", (item,)).fetchone()
        return None if row is None else (row[0], row[1])

    def search(self, text: str, k: int) -> list[int]:
        """The ``k`` items whose id or title fits best: first the item of that id, then titles that begin with the text,
        then those in which a word does, and then all that have it anywhere. Case and accents do not count."""
        wanted, folded = text.strip(), _folded(text)
        if not wanted:
            return []
        like = "".join(f"\\{sign}" if sign in "%_\\" else sign for sign in folded)
        query = """
            SELECT items.item FROM items LEFT JOIN details USING (item)
            WHERE folded LIKE :any ESCAPE '\\' OR id LIKE :any ESCAPE '\\'
            ORDER BY id <> :id, folded IS NULL, folded NOT LIKE :start ESCAPE '\\',
                ' ' || folded NOT LIKE :word ESCAPE '\\', folded, items.item
            LIMIT :k
        """
        given = {"any": f"%{like}%", "start": f"{like}%", "word": f"% {like}%", "id": wanted, "k": k}
        with self._database.reading() as db:
            return [item for (item,) in db.execute(query, given)]


def _folded(text: str) -> str:
    """A text without case and accents, for comparisons."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(sign for sign in plain if not unicodedata.combining(sign)).split())
