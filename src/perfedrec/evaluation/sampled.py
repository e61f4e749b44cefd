"""The protocol of "99 sampled negatives", for comparison with papers that use it.

Each held-out item is ranked among a few random items that its user has not seen, which flatters every method and can
change their order (Krichene and Rendle, KDD 2020). Only the evaluation draws them: held-out items are left out of the
draw because they would be no negatives, and training cannot know of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.evaluation.ranking import Held, Totals


def rank_among(scores: Tensor, users: Tensor, held: Held, n_negatives: int, key: Key, totals: Totals) -> None:
    """Rank each held-out item of ``users`` [B] by ``scores`` [B, m], where what may not be drawn is minus infinity.

    Every held-out item counts as a case of its own, with one right answer. Equal scores count as half a rank lost each,
    so that a scorer that learns nothing is placed in the middle.
    """
    segments, items = held.rows(users)
    if not items.numel():
        return
    allowed = scores > -torch.inf
    allowed[segments, items] = False
    draws = uniform(key.spread(users), scores.shape[1]).masked_fill_(~allowed, -1.0)
    values, drawn = draws.topk(min(n_negatives, scores.shape[1]), dim=1)
    others = scores.gather(1, drawn).masked_fill_(values < 0, -torch.inf)[segments]
    own = scores[segments, items][:, None]
    rank = (others > own).sum(1) + (((others == own) & (own > -torch.inf)).sum(1) + 1) // 2  # from 0
    hits = torch.arange(max(totals.ks), device=rank.device) == rank[:, None]
    ones = torch.ones_like(rank)
    totals.add(hits, ones, None, users[segments])
