"""Keyed samples of items that a user has not interacted with: negatives and decoys."""

from __future__ import annotations

import torch
from torch import Tensor

from perfedrec.core.keys import permute
from perfedrec.core.types import Rows


def draw_outside(rows: Rows, n_items: int, counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct items outside each user's own, uniformly: ``counts`` [B] of them with the users' ``keys`` [B].

    Returns ``items`` [T] and their ``segments`` [T], user by user. A user asks in vain for more items than there are
    outside its own and gets those. Only the rows given here are known to the sampler: held-out data cannot be avoided
    by it, nor leak through it.
    """
    counts = torch.minimum(counts, n_items - rows.counts)
    segments = torch.repeat_interleave(torch.arange(rows.n_users, device=counts.device), counts)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(segments.numel(), device=counts.device) - starts[segments]
    items = permute(keys[segments], slots, n_items)
    owned = rows.segments * n_items + rows.items  # ascending, because rows are
    used = counts.clone()  # images of the permutation that each user has looked at
    wrong = _member(segments * n_items + items, owned).nonzero().squeeze(1)
    while wrong.numel():
        owners = segments[wrong]
        tally = torch.bincount(owners, minlength=rows.n_users)
        rank = torch.arange(wrong.numel(), device=wrong.device) - (tally.cumsum(0) - tally)[owners]
        items[wrong] = permute(keys[owners], used[owners] + rank, n_items)
        used += tally
        wrong = wrong[_member(owners * n_items + items[wrong], owned)]
    return items, segments


def _member(values: Tensor, ascending: Tensor) -> Tensor:
    if not ascending.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    places = torch.searchsorted(ascending, values).clamp_(max=ascending.numel() - 1)
    return ascending[places] == values
