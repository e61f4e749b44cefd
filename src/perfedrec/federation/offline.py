"""What a node does without a coordinator and with torch: it imports files, and scores by methods that need torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data import attributes_beside
from perfedrec.federation.agreement import build
from perfedrec.nn.inference import Floats
from perfedrec.runtimes.node import LocalRecommender, Served, Store


def import_file(
    store: Store, file: Path, frame: pl.DataFrame, skip_unknown: bool = False, first_identity: int | None = None
) -> tuple[int, int, int, int]:
    """Import the interactions ``frame`` that a ``file`` holds into a node's store.

    Where users have attributes, they are read from the same folder, as :func:`perfedrec.data.load` does. Returns what
    :meth:`Store.import_interactions` counts, and the number of users whose attributes were read.
    """
    known: dict[str, list[float]] = {}
    if store.encoding is not None:
        users = frame["user"].cast(pl.String).unique(maintain_order=True).to_list()
        found, _ = attributes_beside(file.parent, "user", np.array(users, dtype=object), store.encoding)
        known = {} if found is None else dict(zip(users, found.values.tolist(), strict=True))
    counts = store.import_interactions(
        frame, skip_unknown=skip_unknown, first_identity=first_identity, attributes=known
    )
    return *counts, len(known)


class TorchScores:
    """Scores for the users of a node's file by torch, for methods that need it. Threads take turns."""

    def __init__(self, path: Path) -> None:
        self._store, self._lock = Store.open(path), threading.Lock()
        self._local: tuple[Served, LocalRecommender[Any, Any]] | None = None

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def _recommender(self) -> LocalRecommender[Any, Any]:
        served = self._store.served()
        if self._local is None or self._local[0] != served:
            self._local = served, LocalRecommender(self._store, build(served.configuration))
        return self._local[1]

    def scores(self, user_id: str) -> tuple[Floats, dict[str, Floats]]:
        """[m] scores of all items for a user, minus infinity for those that the user has; and their parts [m].

        Raises :class:`perfedrec.core.errors.DataError` for an unknown user, and
        :class:`perfedrec.runtimes.node.StoreError` where the store has no model yet.
        """
        with self._lock:
            scores, parts = self._recommender().scores(torch.tensor([self._store.identity(user_id)]))
        return scores[0].numpy(), {name: each[0].numpy() for name, each in parts.items()}

    def item_vectors(self) -> Floats:
        """[m, d] the vectors of items in the served model. Raises :class:`ConfigError` for a method without any."""
        with self._lock:
            found = self._recommender().item_vectors()
            method = self._local and self._local[0].run
        if found is None:
            raise ConfigError(f"the method of run {method} has no vectors of items, by which items could be alike")
        return found.numpy()
