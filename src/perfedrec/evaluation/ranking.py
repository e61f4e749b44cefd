"""Ranking metrics over all items that a user has not seen in training.

With ``L`` the held-out items of a user, ``r_1 < r_2 < ...`` the ranks at which they stand in the list and ``k`` the
cut-off: ``Recall = hits / |L|``; ``Precision = hits / k``; ``HR = [hits > 0]``; ``MRR = 1 / r_1`` if ``r_1 <= k``;
``NDCG = sum_j 1 / log2(1 + r_j) / sum_{j <= min(k, |L|)} 1 / log2(1 + j)``. Means are over users with held-out items;
coverage is the share of all items that stand in somebody's list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from perfedrec.core.types import block_rows

METRICS = ("recall", "ndcg", "hr", "mrr", "precision")


@dataclass(frozen=True)
class Held:
    """Held-out items in CSR form: ``offsets`` [n + 1], ``items`` ascending within a user."""

    offsets: Tensor
    items: Tensor

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


@dataclass
class Totals:
    """Sums of the metrics over users, closed under ``+``; ``means`` gives the figures to report."""

    ks: tuple[int, ...]
    n_items: int
    users: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    shown: dict[int, Tensor] = field(default_factory=dict)

    def add(self, hits: Tensor, counts: Tensor, lists: Tensor) -> None:
        """Count a block: ``hits`` and ``lists`` [B, max(ks)] (or as many as there are items), ``counts`` [B] held-out
        items (0: left out)."""
        tested = counts > 0
        hits, lists, counts = hits[tested].to(torch.float64), lists[tested], counts[tested].to(torch.float64)
        self.users += int(tested.sum())
        ranks = torch.arange(1, max(self.ks) + 1, dtype=torch.float64, device=hits.device)
        discounts = (ranks + 1).log2().reciprocal()
        ideal = discounts.cumsum(0)
        for k in self.ks:
            found, top = hits[:, :k].sum(1), hits[:, :k]
            best = ideal[counts.clamp(max=k).to(torch.int64) - 1]
            values = {
                "recall": found / counts,
                "ndcg": (top * discounts[: top.shape[1]]).sum(1) / best,
                "hr": (found > 0).to(torch.float64),
                "mrr": (top / ranks[: top.shape[1]]).amax(1),
                "precision": found / k,
            }
            for name, value in values.items():
                self.sums[f"{name}@{k}"] = self.sums.get(f"{name}@{k}", 0.0) + float(value.sum())
            flags = self.shown.setdefault(k, torch.zeros(self.n_items, dtype=torch.bool, device=hits.device))
            flags[lists[:, :k].reshape(-1)] = True

    def __add__(self, other: Totals) -> Totals:
        total = Totals(self.ks, self.n_items, self.users + other.users)
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
