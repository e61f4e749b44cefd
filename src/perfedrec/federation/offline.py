"""What a node does without a coordinator: it imports files, and recommends to its users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch

from perfedrec.data import attributes_beside
from perfedrec.evaluation.lists import explained
from perfedrec.federation.agreement import build
from perfedrec.runtimes.node import LocalRecommender, Store


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


def recommend(store: Store, user_id: str, k: int) -> pl.DataFrame:
    """The ``k`` best items that a user has no interaction with: see :func:`perfedrec.evaluation.lists.explained`.

    Raises :class:`perfedrec.core.errors.DataError` for an unknown user, and
    :class:`perfedrec.runtimes.node.StoreError` where the store has no model yet.
    """
    users = torch.tensor([store.identity(user_id)])
    scores, parts = LocalRecommender(store, build(store.served().configuration)).scores(users)
    return explained(scores[0], {name: values[0] for name, values in parts.items()}, user_id, store.item_ids, k)
