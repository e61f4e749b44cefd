"""Ranking metrics over all items that a user has not seen in training.

With ``L`` the held-out items of a user, ``r_1 < r_2 < ...`` the ranks at which they stand in the list and ``k`` the
cut-off: ``Recall = hits / |L|``; ``Precision = hits / k``; ``HR = [hits > 0]``; ``MRR = 1 / r_1`` if ``r_1 <= k``;
``NDCG = sum_j 1 / log2(1 + r_j) / sum_{j <= min(k, |L|)} 1 / log2(1 + j)``. Means are over users with held-out items;
coverage is the share of all items that stand in somebody's list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.types import block_rows

METRICS = ("recall", "ndcg", "hr", "mrr", "precision")


@dataclass(frozen=True)
class Held:
    """Held-out items in CSR form: ``offsets`` [n + 1], ``items`` ascending within a user."""

    offsets: Tensor
    items: Tensor

    @staticmethod
    def of(offsets: NDArray[np.int64], items: NDArray[np.int64], device: torch.device) -> Held:
        """From arrays."""
        return Held(torch.tensor(offsets, device=device), torch.tensor(items, device=device))

    def counts(self, users: Tensor) -> Tensor:
        return self.offsets[users + 1] - self.offsets[users]

    def rows(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of segments [T] and items [T] for ``users`` [B]."""
        rows, _ = block_rows(self.offsets, self.items, users)
        return rows.segments, rows.items

    def hits(self, users: Tensor, lists: Tensor, n_items: int) -> Tensor:
        """[B, k] whether each recommended item of ``lists`` [B, k] is held out for its user."""
        if not self.items.numel():
            return torch.zeros_like(lists, dtype=torch.bool)
        owners = torch.repeat_interleave(
            torch.arange(self.offsets.numel() - 1, device=lists.device), self.offsets.diff()
        )
        keys = owners * n_items + self.items
        wanted = users[:, None] * n_items + lists
        places = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        return keys[places] == wanted


def metrics(hits: Tensor, counts: Tensor, ks: tuple[int, ...]) -> dict[str, Tensor]:
    """[B] float64 values of each metric, ``{"recall@10": ...}``, for ``hits`` [B, k] and ``counts`` [B], 1 or more."""
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
    """The metrics of users, closed under ``+``: their sums, from which ``means`` gives the figures to report, and, by
    user, what they are sums of: ``cases`` are users [B] and values [B] of each metric, block by block."""

    ks: tuple[int, ...]
    n_items: int
    users: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    shown: dict[int, Tensor] = field(default_factory=dict)
    cases: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)

    def add(self, hits: Tensor, counts: Tensor, lists: Tensor | None, users: Tensor) -> None:
        """Count a block: ``hits`` and ``lists`` [B, max(ks)] (or as many as there are items; -1 where a list has ended;
        ``None``: no lists, and no coverage), ``counts`` [B] held-out items (0: left out), ``users`` [B]."""
        tested = counts > 0
        hits, counts, users = hits[tested], counts[tested], users[tested]
        self.users += users.numel()
        values = metrics(hits, counts, self.ks)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum())
        self.cases.append((users, values))
        if lists is not None:
            for k in self.ks:
                flags = self.shown.setdefault(k, torch.zeros(self.n_items, dtype=torch.bool, device=hits.device))
                shown = lists[tested, :k]
                flags[shown[shown >= 0]] = True

    def by_user(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Tested users [t], ascending, and the values [t] of each metric."""
        users = torch.cat([users for users, _ in self.cases])
        order = users.argsort(stable=True)
        values = {name: torch.cat([each[name] for _, each in self.cases])[order] for name in self.cases[0][1]}
        return users[order], values

    def __add__(self, other: Totals) -> Totals:
        total = Totals(self.ks, self.n_items, self.users + other.users, cases=self.cases + other.cases)
        total.sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in {*self.sums, *other.sums}}
        for k in {*self.shown, *other.shown}:
            pair = [each.shown[k] for each in (self, other) if k in each.shown]
            total.shown[k] = torch.stack(pair).any(0)
        return total

    def means(self) -> dict[str, float]:
        """``{"recall@10": ..., "coverage@20": ..., "users": ...}``; no metrics where no user has held-out items."""
        result = {name: value / self.users for name, value in sorted(self.sums.items())} if self.users else {}
        if self.users:
            result |= {f"coverage@{k}": float(flags.sum()) / self.n_items for k, flags in sorted(self.shown.items())}
        return {**result, "users": float(self.users)}


def mask_seen(scores: Tensor, segments: Tensor, items: Tensor) -> Tensor:
    """Take items out of the ranking, in place: ``scores`` [B, m], pairs of ``segments`` [R] and ``items`` [R]."""
    scores[segments, items] = -torch.inf
    return scores


def rank_block(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each row, best first: scores and items [B, min(k, m)]."""
    values, items = torch.topk(scores, min(k, scores.shape[1]), dim=1)
    return values, items
