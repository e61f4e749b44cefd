"""Scores that are computed where they are needed, and not all of them at once.

A model says how a block of users scores the items, as sums of products of vectors. Who ranks computes them piece by
piece, in pieces that stay in the processor's cache, and never holds the scores of all users for all items. Several
settings of a model share the products: only their weights differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALL = slice(None)

RANKED_AT_ONCE = 512
"""Users per block, where all their scores are computed: each takes memory for the scores of all items."""

ITEMS_AT_ONCE = 8192
"""Rows of a table of items that are made at once, where something is computed from all of them."""


@dataclass(frozen=True)
class Product:
    """Scores as inner products: ``users`` [B, d] with the rows of a table of items, which each group of users may have
    its own of. ``table(group, which)`` are the rows [t, d] of the items that a slice takes."""

    users: Tensor
    table: Callable[[int, slice], Tensor]


@dataclass(frozen=True)
class Lists:
    """Scores of few items for each user: ``items`` [B, L], -1 for unused places, and ``values`` [B, L, S]."""

    items: Tensor
    values: Tensor


@dataclass(frozen=True)
class Scoring:
    """The scores of B users for m items by S settings of a model.

    By setting s the score of item i for user b is ``sum_j weights[b, s, j] parts[j](b, i)``, plus what ``lists`` say of
    the item. Without ``weights`` there are one part and one setting. ``groups`` [B] are the users' groups, which decide
    the tables of the parts; without them all users are in group 0. Instead of parts, the scores may be ``known``
    [B, m].
    """

    n_users: int
    n_items: int
    parts: tuple[Product, ...] = ()
    weights: Tensor | None = None
    lists: Lists | None = None
    groups: Tensor | None = None
    known: Tensor | None = None

    @staticmethod
    def of(scores: Tensor) -> Scoring:
        """Scores [B, m] that are known already."""
        return Scoring(scores.shape[0], scores.shape[1], known=scores)

    @staticmethod
    def product(users: Tensor, items: Tensor) -> Scoring:
        """The inner products of ``users`` [B, d] and ``items`` [m, d]."""
        return Scoring(users.shape[0], items.shape[0], (Product(users, lambda group, which: items[which]),))

    @property
    def device(self) -> torch.device:
        """Where the scores are computed."""
        return self.parts[0].users.device if self.known is None else self.known.device

    @property
    def n_settings(self) -> int:
        """S, the number of settings."""
        return 1 if self.weights is None else self.weights.shape[1]

    def by_group(self) -> Iterator[tuple[int, Tensor]]:
        """Each group, and the places of its users in the block."""
        if self.groups is None:
            yield 0, torch.arange(self.n_users, device=self.device)
            return
        for group in self.groups.unique().tolist():
            yield group, (self.groups == group).nonzero().squeeze(1)

    def each(self, which: Tensor | None = None) -> Iterator[Tensor]:
        """The scores [b, m] by one setting after the other, for the users at the places ``which`` [b] of the block, or
        for all of them. The products are computed once for all settings. The caller may overwrite what it gets."""
        if self.known is not None:
            yield self.known if which is None else self.known[which]
            return
        which = torch.arange(self.n_users, device=self.device) if which is None else which
        found = [self._multiplied(part, which) for part in self.parts]
        for setting in range(self.n_settings):
            if self.weights is None:
                scores = found[0]
            else:
                own = self.weights[which, setting].to(found[0].dtype)
                scores = found[0] * own[:, :1]
                for place, each in enumerate(found[1:], start=1):
                    scores.addcmul_(each, own[:, place : place + 1])
            if self.lists is not None:
                items, values = self.lists.items[which], self.lists.values[which, :, setting]
                scores.scatter_add_(1, items.clamp(min=0), values.masked_fill(items < 0, 0.0))
            yield scores

    def dense(self) -> Tensor:
        """The scores [B, m] by the only setting."""
        (scores,) = self.each()
        return scores

    def _multiplied(self, part: Product, which: Tensor) -> Tensor:
        """[b, m] the scores of a part. Of the tables only some rows are there at once."""
        groups = None if self.groups is None else self.groups[which]
        scores, users = part.users.new_empty(which.numel(), self.n_items), part.users[which]
        for group in [0] if groups is None else groups.unique().tolist():
            members = ALL if groups is None else (groups == group).nonzero().squeeze(1)
            for first in range(0, self.n_items, ITEMS_AT_ONCE):
                here = slice(first, first + ITEMS_AT_ONCE)
                scores[members, here] = users[members] @ part.table(group, here).T
        return scores
