"""A list of recommendations as a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from torch import Tensor

from perfedrec.core.errors import check_length
from perfedrec.data.interactions import Ids, id_series
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import rank_block


def explained(scores: Tensor, parts: Mapping[str, Tensor], user_id: int | str, item_ids: Ids, k: int) -> pl.DataFrame:
    """A user's ``k`` best items as a table with columns item, rank, score, one column for each part, and moved.

    ``scores`` [m] are minus infinity for items that cannot be recommended. The ``parts`` [m] add up to the score.
    ``user_id`` and ``item_ids`` [m] are external ids. ``moved`` is the number of places that an item gained over the
    ranking by the part ``global`` alone. Raises :class:`ConfigError` where ``k`` is below 1.
    """
    check_length(k)
    order = RandomOrder(np.array([user_id], dtype=object), item_ids)

    def ranked(values: Tensor, length: int) -> Tensor:
        """The items of a list by ``values`` [m], which ends before the items that cannot be recommended."""
        values = values.masked_fill(scores == -torch.inf, -torch.inf)
        best, items = rank_block(values[None], length, torch.zeros(1, dtype=torch.int64, device=values.device), order)
        return items[0][best[0] > -torch.inf]

    items, alone = ranked(scores, k), ranked(parts["global"], scores.numel())
    ranks = torch.arange(1, scores.numel() + 1, device=items.device)
    rank, rank_alone = ranks[: items.numel()], torch.zeros_like(ranks)
    rank_alone[alone] = ranks[: alone.numel()]
    rank_alone = rank_alone[items]
    if not bool(parts["global"].any()):  # the global model has weight 0: there is no ranking to compare with
        rank_alone = rank
    return pl.DataFrame(
        {
            "item": id_series(item_ids)[items.cpu().numpy()],
            "rank": rank.cpu().numpy(),
            "score": scores[items].cpu().numpy(),
            **{name: values[items].cpu().numpy() for name, values in parts.items()},
            "moved": (rank_alone - rank).cpu().numpy(),
        }
    )
