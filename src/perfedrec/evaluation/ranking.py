"""Ranking metrics over all items that a user has not seen in training.

With ``L`` the held-out items of a user, ``r_1 < r_2 < ...`` their ranks in the list and ``k`` the cut-off:
``Recall = hits / |L|``; ``Precision = hits / k``; ``HR = [hits > 0]``; ``MRR = 1 / r_1`` if ``r_1 <= k``;
``NDCG = sum_j 1 / log2(1 + r_j) / sum_{j <= min(k, |L|)} 1 / log2(1 + j)``. Means are over users with held-out items.
Coverage is the share of all items that are in the list of at least one user. Items with equal scores are ordered by the
rule of :mod:`.order`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import SupportsInt, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.errors import ConfigError
from perfedrec.core.mapped import as_tensor
from perfedrec.core.types import block_rows
from perfedrec.evaluation.order import RandomOrder

METRICS = ("recall", "ndcg", "hr", "mrr", "precision")
CUTOFFS = (10, 20)
"""The lengths of lists (cut-offs) at which metrics are computed by default."""

Cutoffs: TypeAlias = SupportsInt | Iterable[SupportsInt]
"""One cut-off or several, as a caller gives them."""

_FIRST, _LAST = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min


def cutoffs(ks: Cutoffs) -> tuple[int, ...]:
    """One cut-off or several as an ascending tuple. Raises :class:`ConfigError` for other than whole numbers from 1."""
    given = [ks] if isinstance(ks, SupportsInt) else list(ks)
    found = tuple(sorted({int(k) for k in given if int(k) == k and not isinstance(k, bool)}))
    if not given or len(found) < len(set(given)) or found[0] < 1:
        raise ConfigError(f"the cut-offs ks are {given}; expected one or several whole numbers from 1 on")
    return found


def cutoffs_of(names: Iterable[str]) -> tuple[int, ...]:
    """The cut-offs, ascending, in names of metrics: 10 and 20 for ``recall@10, ndcg@20, users``."""
    return tuple(sorted({int(name.partition("@")[2]) for name in names if "@" in name}))


@dataclass(frozen=True)
class Held:
    """Held-out items of n users in CSR form: ``offsets`` [n + 1], and ``items``, which ascend within a user."""

    offsets: Tensor
    items: Tensor

    @staticmethod
    def of(offsets: NDArray[np.int64], items: NDArray[np.int64], device: torch.device) -> Held:
        """From the arrays of a CSR matrix."""
        return Held(as_tensor(offsets, device), as_tensor(items, device))

    def counts(self, users: Tensor) -> Tensor:
        """[B] the number of held-out items of each of ``users`` [B]."""
        return self.offsets[users + 1] - self.offsets[users]

    def rows(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """The held-out items [T] of ``users`` [B], with the position of their user among ``users``: segments, items."""
        rows, _ = block_rows(self.offsets, self.items, users)
        return rows.segments, rows.items

    def hits(self, users: Tensor, lists: Tensor, n_items: int) -> Tensor:
        """[B, k] whether each item of the ``lists`` [B, k] is held out for its user of ``users`` [B]."""
        owners, items = self.rows(users)
        if not items.numel():
            return torch.zeros_like(lists, dtype=torch.bool)
        keys = owners * n_items + items
        wanted = torch.arange(users.numel(), device=lists.device)[:, None] * n_items + lists
        places = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        return keys[places] == wanted


def metrics(hits: Tensor, counts: Tensor, ks: tuple[int, ...]) -> dict[str, Tensor]:
    """The value of each metric for each user: ``{"recall@10": float64 [B], ...}``.

    ``hits`` [B, max(ks)] says which places of a list hold a held-out item, ``counts`` [B] (at least 1) is the number of
    held-out items, and ``ks`` are the cut-offs.
    """
    hits, counts = hits.to(torch.float64), counts.to(torch.float64)
    ranks = torch.arange(1, max(ks) + 1, dtype=torch.float64, device=hits.device)
    discounts = (ranks + 1).log2().reciprocal()
    ideal, values = discounts.cumsum(0), {}
    for k in ks:
        top = hits[:, :k]
        found = top.sum(1)
        values[f"recall@{k}"] = found / counts
        values[f"ndcg@{k}"] = (top * discounts[: top.shape[1]]).sum(1) / ideal[counts.clamp(max=k).to(torch.int64) - 1]
        values[f"hr@{k}"] = (found > 0).to(torch.float64)
        values[f"mrr@{k}"] = (top / ranks[: top.shape[1]]).amax(1)
        values[f"precision@{k}"] = found / k
    return values


@dataclass
class Totals:
    """Sums of metrics over users; two of them can be added with ``+``. :meth:`means` gives the figures to report.

    ``users`` is the number of users counted, ``sums`` holds the sum of each metric, and ``shown`` flags the items [m]
    that were in at least one list, by cut-off. ``cases`` holds the values that were summed, block by block: users [B]
    and the values [B] of each metric. ``negatives`` are the smallest and the largest number of sampled negatives of a
    case, where there are such.
    """

    ks: tuple[int, ...]
    n_items: int
    users: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    shown: dict[int, Tensor] = field(default_factory=dict)
    cases: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    negatives: tuple[int, int] | None = None

    def add(self, hits: Tensor, counts: Tensor, lists: Tensor | None, users: Tensor) -> None:
        """Count a block of users.

        ``hits`` [B, l] says which places of a list hold a held-out item; l is max(ks), or the number of items where
        there are fewer. ``counts`` [B] are the numbers of held-out items; users with 0 are left out. ``lists`` [B, l]
        holds the items, -1 after the end of a list; ``None`` where there are no lists, so that coverage is not
        computed. ``users`` [B] are their indices.
        """
        tested = counts > 0
        hits, counts, users = hits[tested], counts[tested], users[tested]
        self.add_values(metrics(hits, counts, self.ks), None if lists is None else lists[tested], users)

    def add_values(self, values: dict[str, Tensor], lists: Tensor | None, users: Tensor) -> None:
        """Count a block of ``users`` [B], who all have held-out items, by the values [B] of each metric."""
        self.users += users.numel()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum())
        self.cases.append((users, values))
        if lists is not None:
            for k in self.ks:
                flags = self.shown.setdefault(k, torch.zeros(self.n_items, dtype=torch.bool, device=lists.device))
                shown = lists[:, :k]
                flags[shown[shown >= 0]] = True

    def by_user(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The counted users [t], ascending, and the values [t] of each metric."""
        users = torch.cat([users for users, _ in self.cases])
        order = users.argsort(stable=True)
        values = {name: torch.cat([each[name] for _, each in self.cases])[order] for name in self.cases[0][1]}
        return users[order], values

    def standard_error(self, metric: str, share: float) -> float:
        """The standard error of a ``metric`` where the users are a ``share`` of all: see :mod:`.sample`."""
        values = torch.cat([each[metric] for _, each in self.cases])
        if values.numel() < 2:
            return 0.0
        return float((values.var() / values.numel() * (1 - share)).sqrt())

    def count_negatives(self, numbers: Tensor) -> None:
        """Widen ``negatives`` by the ``numbers`` [t] of sampled negatives of some cases, t at least 1."""
        low, high = int(numbers.min()), int(numbers.max())
        known = self.negatives or (low, high)
        self.negatives = min(low, known[0]), max(high, known[1])

    def __add__(self, other: Totals) -> Totals:
        total = Totals(self.ks, self.n_items, self.users + other.users, cases=self.cases + other.cases)
        for each in (self.negatives, other.negatives):
            if each is not None:
                total.count_negatives(torch.tensor(each))
        total.sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in {*self.sums, *other.sums}}
        for k in {*self.shown, *other.shown}:
            pair = [each.shown[k] for each in (self, other) if k in each.shown]
            total.shown[k] = torch.stack(pair).any(0)
        return total

    def means(self) -> dict[str, float]:
        """Means over users: ``{"recall@10": ..., "coverage@20": ..., "users": ...}``.

        Without users with held-out items, there is only ``users``, which is 0.
        """
        result = {name: value / self.users for name, value in sorted(self.sums.items())} if self.users else {}
        if self.users:
            result |= {f"coverage@{k}": float(flags.sum()) / self.n_items for k, flags in sorted(self.shown.items())}
        return {**result, "users": float(self.users)}


def mask_seen(scores: Tensor, segments: Tensor, items: Tensor) -> Tensor:
    """Remove items from the ranking: set their scores to minus infinity, in place.

    ``scores`` [B, m]; the items are pairs of ``segments`` [R], which are rows of ``scores``, and ``items`` [R].
    """
    scores[segments, items] = -torch.inf
    return scores


def rank_block(scores: Tensor, k: int, users: Tensor, order: RandomOrder) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each row, best first: scores and items [B, min(k, m)].

    Row i of ``scores`` [B, m] are those of user i of ``users`` [B]. Items with equal scores come in the ``order`` of
    their user. Items with minus infinity come last, in any order.
    """
    k = min(k, scores.shape[1])
    values, items = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1)  # one more, to see a tie at the end
    values, last = values[:, :k].contiguous(), values[:, k:]
    items = items[:, :k].contiguous()
    cut = ((last == values[:, -1:]) & (last > -torch.inf)).any(1)
    if bool(cut.any()):  # of the items that have the last place's score, those that come first
        rows = cut.nonzero().squeeze(1)
        words, own, worst = order.words(users[rows]), scores[rows], values[rows, -1:]
        words.masked_fill_(own > worst, _FIRST).masked_fill_(own < worst, _LAST)
        items[rows] = words.topk(k, dim=1).indices
        values[rows], places = own.gather(1, items[rows]).sort(dim=1, descending=True, stable=True)
        items[rows] = items[rows].gather(1, places)
    settle(values, items, users, order)
    return values, items


def settle(values: Tensor, items: Tensor, users: Tensor, order: RandomOrder) -> None:
    """Bring ``items`` [B, k] with equal scores ``values`` [B, k], which descend, into the ``order`` of their user."""
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)).any(1)
    if bool(tied.any()):
        rows = tied.nonzero().squeeze(1)
        by_word = order.words(users[rows], items[rows]).argsort(dim=1, descending=True)
        own, places = values[rows].gather(1, by_word).sort(dim=1, descending=True, stable=True)
        values[rows], items[rows] = own, items[rows].gather(1, by_word).gather(1, places)
