"""The rule for equal scores: a random order of all items for each user, which depends on ids alone.

Where items have equal scores, one of them must come first. What ``topk`` does then depends on how items are numbered,
on the length of the list and on the device, and it is no small matter: a model that gives all items one score finds
everything or nothing, by where popular items have their numbers. Here such items come in a pseudo-random order that is
a function of the id of the user and the id of the item. Therefore

- a list depends neither on the numbering of users and items nor on blocks, and a shorter list is the beginning of a
  longer one;
- a model that learnt nothing is at chance level: each user has an order of its own, and the mean over users is close to
  that over all orders;
- metrics are those of the lists that are shown, and a node, which knows the ids of its own users, makes the same lists
  as a simulator. A seed changes nothing in them.

Others decide otherwise. trec_eval orders documents with equal scores by their ids, alike for all queries, so that ids
which tell something (age, popularity) bias a figure: see Cabanac et al. (CLEF 2010) and Lin and Yang (SIGIR 2019).
McSherry and Najork (ECIR 2008) give the expectation of a metric over all orders. That has no chance in it, but it is
the figure of no list that anybody could show.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import Tensor

from perfedrec.core import words
from perfedrec.core.keys import Key, fold_in, words_of
from perfedrec.data.interactions import Ids

TIES = Key(words.TIES.value)


class RandomOrder:
    """A pseudo-random order of all items for each user, a function of ``key``, the user's id and the items' ids.

    ``user_ids`` [n] and ``item_ids`` [m] are external ids; a number and its digits are the same id.
    """

    def __init__(self, user_ids: Ids, item_ids: Ids) -> None:
        self._user_ids, self._item_ids = user_ids, item_ids

    @staticmethod
    def of_numbers(n_users: int, n_items: int) -> RandomOrder:
        """The order where numbers are the only ids."""
        return RandomOrder(np.arange(n_users), np.arange(n_items))

    # Digests take about a second for a million ids: they are made only where there are equal scores, and once.
    @cached_property
    def _item_words(self) -> Tensor:
        return words_of(map(str, self._item_ids.tolist()))

    def words(self, users: Tensor, items: Tensor | None = None, key: Key = TIES) -> Tensor:
        """int64 [B, l]: of the ``items`` [B, l] of ``users`` [B], one with a higher word comes first. Without
        ``items``: of all items, [B, m]."""
        names = self._user_ids[users.cpu().numpy()].tolist()
        own = key.spread(words_of(map(str, names)).to(users.device))[:, None]
        words = self._item_words.to(users.device)
        return fold_in(own, words[None] if items is None else words[items])
