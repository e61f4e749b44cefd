"""Lists from a node's file, without torch where its served model allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perfedrec.core.errors import check_length
from perfedrec.runtimes.node.scorer import Scorer


def recommend(path: Path, user_id: str, k: int) -> list[dict[str, Any]]:
    """The ``k`` best items that a user of a node has no interaction with, best first. Each one is a row of
    :func:`perfedrec.evaluation.lists.explained`.

    Raises :class:`perfedrec.core.errors.DataError` for an unknown user, :class:`perfedrec.runtimes.node.StoreError`
    where the file cannot be used or has no model yet, and :class:`ConfigError` where ``k`` is below 1.
    """
    check_length(k)
    with Scorer.open(path) as scorer:
        found = scorer.recommend(user_id, k)
    if found is not None:
        return found
    from perfedrec.federation.offline import recommend as with_torch
    from perfedrec.runtimes.node import Store

    with Store.open(path) as store:
        return with_torch(store, user_id, k).to_dicts()
