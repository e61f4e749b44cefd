"""The protocol of "99 sampled negatives", for comparison with papers that use it.

Each held-out item is ranked among a few random items that its user has not seen. This makes every method look better
than full ranking does, and it can change the order of methods (Krichene and Rendle, KDD 2020). The draw leaves out the
held-out items, because they are not negatives. That is no leak: only the evaluation makes this draw, never training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.evaluation.ranking import Held, Totals


def rank_among(scores: Tensor, users: Tensor, held: Held, n_negatives: int, key: Key, totals: Totals) -> None:
    """Rank each held-out item of ``users`` [B] among negatives by ``scores`` [B, m], and add the result to ``totals``.

    ``scores`` are minus infinity for items that must not be drawn. ``key`` decides the draws: up to ``n_negatives`` for
    each user. Each held-out item is a case of its own, with one right answer. Each negative with an equal score counts
    as half a rank, so that a model that gives all items the same score ends in the middle.
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
