"""The served model in a node's file: what the node recommends with."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from perfedrec.core.algorithm import Algorithm, B, Received
from perfedrec.core.inference import InferenceOptions
from perfedrec.core.records import flatten, unflatten
from perfedrec.runtimes.node.rounds import RoundStore, fields_per


@dataclass(frozen=True)
class Served:
    """Facts about the served model: its run, after how many rounds, when it was received (seconds since 1970), and the
    method with its options as TOML."""

    run: str
    round: int
    received: int
    configuration: str


class ModelStore(RoundStore):
    """The part of a :class:`~perfedrec.runtimes.node.store.Store` that holds the served model."""

    def receive(
        self,
        broadcast: Received,
        users: Tensor,
        run: str,
        number: int,
        configuration: str,
        inference: InferenceOptions | None = None,
    ) -> None:
        """Store the model of ``run`` after ``number`` rounds, in place of the one that was served before.

        ``broadcast`` is what :func:`perfedrec.runtimes.node.serving.serving_broadcast` returned for ``users`` [B]: its
        fields with one row per user have B + 1 rows, the last one for new users. ``configuration`` is the method with
        its options as TOML. ``inference``: its options for scores without torch, where it has them.
        """
        tensors, scalars = flatten(broadcast)
        own = {name: tensors.pop(name).numpy() for name in fields_per(broadcast, "user") & tensors.keys()}

        def content(row: int) -> bytes:
            return dump_arrays({name: np.ascontiguousarray(values[row : row + 1]) for name, values in own.items()})

        shared = dump_arrays({name: np.ascontiguousarray(values.numpy()) for name, values in tensors.items()})
        with self._database.writing() as db:
            for table in ("served", "served_users"):
                db.execute(f"DELETE FROM {table}")
            received, options = int(time.time()), None if inference is None else inference.dump()
            new_user = content(users.numel())
            what = (run, number, received, options, json.dumps(scalars), new_user, configuration, shared)
            db.execute("INSERT INTO served VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)", what)
            put = "INSERT INTO served_users SELECT user, ? FROM users WHERE identity = ?"
            db.executemany(put, [(content(row), identity) for row, identity in enumerate(users.tolist())])
            self._delete_old_states(db)

    def served(self) -> Served:
        """Facts about the served model. Raises :class:`StoreError` if the node has received no model."""
        with self._database.reading() as db:
            row = db.execute("SELECT run, round, received, configuration FROM served").fetchone()
        if row is None:
            raise self.no_model()
        return Served(*row)

    def use_served_run(self, algorithm: Algorithm[Any, Any, Any]) -> None:
        """Use the client states that belong to the served model, without taking part in its run.

        Raises :class:`StoreError` if the node has received no model.
        """
        served = self.served()
        run = served.run
        options = None if algorithm.inference is None else algorithm.inference.dump()
        with self._database.reading() as db:
            row = db.execute("SELECT number FROM runs WHERE run = ?", (run,)).fetchone()
            (stored,) = db.execute("SELECT inference FROM served").fetchone()
        if stored != options:  # another version of perfedrec received the model
            with self._database.writing() as db:
                db.execute("UPDATE served SET inference = ? WHERE run = ?", (options, run))
        self._use_run(algorithm, run, row[0] if row is not None else 0, served=served.round)

    def broadcast(self, cls: type[B], users: Tensor) -> B:
        """The served broadcast of ``users`` [B], a record of type ``cls``. Users whom the model does not know get what
        new users get. Requires a served model."""
        with self._database.reading() as db:
            scalars, tables, new_user = db.execute("SELECT scalars, tables, newcomer FROM served").fetchone()
            query = "SELECT content FROM served_users WHERE user = ?"
            found = [(db.execute(query, (key,)).fetchone() or (new_user,))[0] for key, _ in self._find_users(db, users)]
        own = [self._database.load_arrays(content) for content in found]
        arrays, new = self._database.load_arrays(tables), self._database.load_arrays(new_user)
        arrays |= {name: np.concatenate([like[:0], *(each[name] for each in own)]) for name, like in new.items()}
        return unflatten(cls, {name: torch.from_numpy(each) for name, each in arrays.items()}, json.loads(scalars))
