"""Which users validate a run or test its model, where there are many: a fixed sample, and how sure its figures are.

Whether a user is in the sample is a function of the user's id and of the share that is wanted, and of nothing else: a
node knows it of its own users, all runs and seeds are compared on the same users, and a smaller sample is a part of a
larger one. The test of a finished model is on all users, or on a larger sample where these are very many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform, words_of
from perfedrec.data.interactions import Ids
from perfedrec.evaluation.ranking import Held

SAMPLE = Key(0).fold("users who validate")

AT_ONCE = 1 << 18
"""Ids of which words are made together: those of many users would take much memory."""

ERROR = "standard_error"
"""The name of a standard error among the figures of an evaluation: that of the metric by which a run is selected."""


def share_of(n_users: int, wanted: int) -> float:
    """The share of ``n_users`` in a sample of about ``wanted``; 1, which is all, where there are not more, or 0 are
    wanted."""
    return wanted / n_users if 0 < wanted < n_users else 1.0


def in_sample(user_words: Tensor, share: float) -> Tensor:
    """bool [n] which users are in the sample, by the words of their ids (:func:`perfedrec.core.keys.words_of`)."""
    if share >= 1:
        return torch.ones_like(user_words, dtype=torch.bool)
    return uniform(SAMPLE.spread(user_words), 1).squeeze(-1) < share


def sample_of(user_ids: Ids, share: float) -> Tensor:
    """bool [n] which of the users with these ids are in the sample."""
    parts = [user_ids[start : start + AT_ONCE] for start in range(0, user_ids.size, AT_ONCE)]
    return torch.cat([in_sample(words_of(map(str, each.tolist())), share) for each in parts])


def of_sample(held: Held, chosen: Tensor) -> Held:
    """The held-out items of those users who are ``chosen`` [n]; the others have none."""
    counts = held.offsets.diff()
    kept = torch.repeat_interleave(chosen, counts)
    return Held(torch.cat([held.offsets[:1], (counts * chosen).cumsum(0)]), held.items[kept])


def standard_error(total: float, squares: float, n: float, share: float) -> float:
    """The standard error of a mean over n users as a figure of all users, from the ``total`` and the sum of ``squares``
    of their values: ``sqrt(s^2 / n (1 - share))``, with the variance s^2 of the values. 0 for one user or none."""
    if n < 2:
        return 0.0
    variance = max(squares - total * total / n, 0.0) / (n - 1)
    return float((variance / n * (1 - share)) ** 0.5)
