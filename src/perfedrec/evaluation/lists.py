"""A list of recommendations as a table."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import torch
from torch import Tensor

from perfedrec.core.errors import ConfigError
from perfedrec.data.interactions import Ids, id_series
from perfedrec.evaluation.ranking import rank_block


def check_length(k: int) -> None:
    """Raise :class:`ConfigError` where a list would have fewer than 1 item."""
    if k < 1:
        raise ConfigError(f"the length k of the list is {k}; expected 1 or more")


def explained(scores: Tensor, parts: Mapping[str, Tensor], item_ids: Ids, k: int) -> pl.DataFrame:
    """A user's ``k`` best items as a table with columns item, rank, score, one column for each part, and moved.

    ``scores`` [m] are minus infinity for items that cannot be recommended. The ``parts`` [m] add up to the score.
    ``item_ids`` [m] are external ids. ``moved`` is the number of places that an item gained over the ranking by the
    part ``global`` alone. Raises :class:`ConfigError` where ``k`` is below 1.
    """
    check_length(k)
    _, ranked = rank_block(scores[None].clone(), k)
    items = ranked[0][scores[ranked[0]] > -torch.inf]  # a user who has seen nearly all items gets a shorter list
    alone = parts["global"].masked_fill(scores == -torch.inf, -torch.inf)
    rank = torch.arange(1, items.numel() + 1, device=items.device)
    rank_alone = (alone[None, :] > alone[items][:, None]).sum(1) + 1
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
