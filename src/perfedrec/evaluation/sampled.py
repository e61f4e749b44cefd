"""The protocol of "99 sampled negatives", for comparison with papers that use it.

Each held-out item is ranked among a few random items that its user has not seen. This makes every method look better
than full ranking does, and it can change the order of methods (Krichene and Rendle, KDD 2020). The draw leaves out the
held-out items, because they are not negatives. That is no leak: only the evaluation makes this draw, never training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import Held, Totals

_NEVER = torch.iinfo(torch.int64).min


def rank_among(
    scores: Tensor, users: Tensor, held: Held, n_negatives: int, key: Key, order: RandomOrder, totals: Totals
) -> None:
    """Rank each held-out item of ``users`` [B] among negatives by ``scores`` [B, m], and add the result to ``totals``.

    ``scores`` are minus infinity for items that must not be drawn. ``key`` and the ids that ``order`` knows decide the
    draws: up to ``n_negatives`` for each user. Each held-out item is a case of its own, with one right answer. Items
    with equal scores come in the ``order`` of their user, as in full ranking.
    """
    segments, items = held.rows(users)
    if not items.numel():
        return
    allowed = scores > -torch.inf
    allowed[segments, items] = False
    draws = order.words(users, key=key).masked_fill_(~allowed, _NEVER)
    values, drawn = draws.topk(min(n_negatives, scores.shape[1]), dim=1)
    others, own = scores.gather(1, drawn)[segments], scores[segments, items][:, None]
    later = order.words(users, drawn)[segments] < order.words(users[segments], items[:, None])
    ahead = ((others > own) | ((others == own) & ~later)) & (values > _NEVER)[segments]
    rank = ahead.sum(1)  # from 0
    hits = torch.arange(max(totals.ks), device=rank.device) == rank[:, None]
    ones = torch.ones_like(rank)
    totals.add(hits, ones, None, users[segments])
    totals.count_negatives((values > _NEVER).sum(1)[segments])
