"""The paper's mechanisms: pseudo-item labelling, interacted-item masking, clipping and Laplace noise.

What they guarantee is narrow: ``2 clip / noise_scale`` is the epsilon of ONE coordinate of one upload. The upload as a
whole has no useful guarantee, and a sparse upload shows which rows were touched.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, fold_in, laplace, uniform
from perfedrec.core.sampling import draw_outside
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows


class PrivacySettings(Settings):
    """Protection of what leaves a client."""

    clip: float | None = Field(None, gt=0, description="bound of each coordinate that is uploaded; none: no bound")
    noise_scale: float = Field(0.0, ge=0, description="scale of the Laplace noise on each coordinate (needs clip)")
    pseudo_items: float = Field(0.0, ge=0, description="decoys labelled as interacted, as a share of a user's items")
    masking: float = Field(0.0, ge=0, lt=1, description="share of a user's items that is left out")


def perturb_labels(rows: Rows, n_items: int, settings: PrivacySettings, key: Key) -> tuple[Rows, Tensor, Rows]:
    """The rows a client works with: a share of its items left out, a share of random items labelled as interacted.

    Returns the perturbed rows; the position [R'] of each in ``rows`` (-1 for decoys); and the rows that are no
    negatives, real items and decoys together. A user keeps at least one real item. The numbers of decoys are rounded
    at random, so that their mean is the exact share.
    """
    positions = torch.arange(rows.items.numel(), device=rows.items.device)
    labelled = known = rows
    if settings.masking:
        draws = uniform(fold_in(key.fold("masking").spread(rows.users)[rows.segments], rows.items), 1).squeeze(-1)
        best = draws.new_zeros(rows.n_users).scatter_reduce_(0, rows.segments, draws, "amax")
        positions = ((draws >= settings.masking) | (draws == best[rows.segments])).nonzero().squeeze(1)
        labelled = _jagged(rows, rows.items[positions], rows.segments[positions])
    if settings.pseudo_items:
        counts = rows.counts * settings.pseudo_items + uniform(key.fold("counts").spread(rows.users), 1).squeeze(-1)
        keys = key.fold("decoys").spread(rows.users)
        decoys, owners = draw_outside(rows, n_items, counts.floor().to(torch.int64), keys)
        known, _ = _merge(rows, decoys, owners, n_items)
        labelled, order = _merge(labelled, decoys, owners, n_items)
        positions = torch.cat([positions, torch.full_like(decoys, -1)])[order]
    return labelled, positions, known


def _merge(rows: Rows, items: Tensor, segments: Tensor, n_items: int) -> tuple[Rows, Tensor]:
    """Rows with further items, ascending per user, and the order that made them so."""
    items, segments = torch.cat([rows.items, items]), torch.cat([rows.segments, segments])
    order = (segments * n_items + items).argsort()
    return _jagged(rows, items[order], segments[order]), order


def _jagged(rows: Rows, items: Tensor, segments: Tensor) -> Rows:
    limits = torch.zeros_like(rows.offsets)
    torch.cumsum(torch.bincount(segments, minlength=rows.n_users), 0, out=limits[1:])
    return replace(rows, offsets=limits, items=items, segments=segments)


def protect(values: Tensor, settings: PrivacySettings, keys: Tensor) -> Tensor:
    """Clip each coordinate to ``[-clip, clip]`` and add Laplace noise, drawn per row by ``keys`` [T].

    ``values`` [T, d]. The clip bound holds exactly for what the noise is added to.
    """
    if settings.clip is not None:
        values = values.clamp(-settings.clip, settings.clip)
    if settings.noise_scale:
        values = laplace(keys, values.shape[-1]).mul_(settings.noise_scale).add_(values)
    return values
