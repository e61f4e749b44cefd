"""A node's file as one object.

A :class:`Store` offers what a :class:`perfedrec.runtimes.population.Population` in memory offers. The same client
functions work on both, with the same results; what a store holds survives the process.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import closing
from pathlib import Path
from typing import Self

from perfedrec.core.errors import reason
from perfedrec.data import Catalogue, Encoding
from perfedrec.data.interactions import Ids
from perfedrec.runtimes.node.database import Database, StoreError, remove
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
            raise StoreError(f"{path}: cannot be made ({reason(error)})") from None
        except StoreError as error:
            raise StoreError(str(error).replace(str(begun), str(path))) from error
        finally:
            remove(begun)
        return cls.open(path)
