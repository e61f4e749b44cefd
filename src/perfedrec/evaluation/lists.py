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
    """Refuse a list without places."""
    if k < 1:
        raise ConfigError(f"k is {k}; expected 1 or more")


def explained(scores: Tensor, parts: Mapping[str, Tensor], item_ids: Ids, k: int) -> pl.DataFrame:
    """The ``k`` best items by ``scores`` [m], in which those that cannot be recommended are minus infinity.

    Columns item, rank, score, one for each of the ``parts`` [m] whose sum is the score, and the places ``moved`` that
    an item gained over the part ``global`` alone.
    """
    check_length(k)
    _, ranked = rank_block(scores[None].clone(), k)
    items = ranked[0][scores[ranked[0]] > -torch.inf]  # who has seen nearly everything gets a shorter list
    alone = parts["global"].masked_fill(scores == -torch.inf, -torch.inf)
    rank = torch.arange(1, items.numel() + 1, device=items.device)
    rank_alone = (alone[None, :] > alone[items][:, None]).sum(1) + 1
    if not bool(parts["global"].any()):  # it has no weight, and so no ranking to move from
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
