"""Fake data through honest clients (shilling): the clients follow the method, and their lists are invented."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Adversary, Knowledge
from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose


class RandomFillers(Adversary):
    """Random attack (Lam and Riedl, WWW 2004): each list has the targets and random items.

    Knows nothing. Departs from the paper: feedback is implicit, so that there are no ratings to invent.
    """

    name = "random"


class PopularFillers(Adversary):
    """Bandwagon attack (O'Mahony et al., ACM TOIT 2004; Mobasher et al., ACM TOIT 2007): each list has the targets and
    popular items, so that the targets look like what many users like.

    Knows which items are popular. The fillers are drawn at random among the tenth of all items that is most popular, or
    among as many as a list has where these are more, and so lists differ, as real ones do. Departs from the papers:
    feedback is implicit, and there are no random items beside the popular ones.
    """

    name = "popular"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({"popularity"})

    def fillers(self, n: int, key: Key) -> Tensor:
        return popular_fillers(self.known.popular, n, key)


def popular_fillers(popular: Tensor | None, n: int, key: Key) -> Tensor:
    """[n] random items among the tenth of the ``popular`` [m] items, the most popular first, that is most popular."""
    assert popular is not None
    among = max(popular.numel() // 10, min(n, popular.numel()))
    found: Tensor = popular[choose(among, n, key)]
    return found.to(torch.int64)
