"""The paper's mechanisms: pseudo-item labelling, interacted-item masking, clipping and Laplace noise.

What they guarantee is narrow: ``2 clip / noise_scale`` is the epsilon of ONE coordinate of one upload. The upload as a
whole has no useful guarantee, and a sparse upload shows which rows were touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.core.keys import Key, fold_in, laplace, uniform
from perfedrec.core.sampling import draw_outside, ranks
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows


class PrivacySettings(Settings):
    """Protection of what leaves a client."""

    clip: float | None = Field(None, gt=0, description="bound of each coordinate that is uploaded; none: no bound")
    noise_scale: float = Field(0.0, ge=0, description="scale of the Laplace noise on each coordinate (needs clip)")
    pseudo_items: float = Field(0.0, ge=0, description="decoys labelled as interacted, as a share of a user's items")
    masking: float = Field(0.0, ge=0, lt=1, description="share of a user's items that is left out")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.noise_scale and self.clip is None:
            raise ValueError("noise_scale needs clip: noise without a bound on what it hides protects nothing")
        return self


@dataclass(frozen=True)
class Labels:
    """What a block's users train on: ``rows`` labelled as interacted, and ``negatives`` [T] with ``owners`` [T].

    ``positions`` [R'] tells where each labelled row stands among the real ones; it is -1 for a decoy.
    """

    rows: Rows
    positions: Tensor
    negatives: Tensor
    owners: Tensor


def label(rows: Rows, n_items: int, settings: PrivacySettings, n_negatives: int | None, key: Key) -> Labels:
    """Leave a share of a user's items out, label a share of random items as interacted, and draw negatives.

    Decoys and negatives are one draw of distinct items outside the user's own: a masked item is never a negative, and
    neither is a decoy. ``n_negatives`` is their number per user, or ``None`` for one per label. A user keeps at least
    one real item. The number of decoys is rounded at random, so that its mean is the exact share.
    """
    positions = torch.arange(rows.items.numel(), device=rows.items.device)
    kept, decoys = rows.counts, torch.zeros_like(rows.counts)
    if settings.masking:
        draws = uniform(fold_in(key.fold("masking").spread(rows.users)[rows.segments], rows.items), 1).squeeze(-1)
        best = draws.new_zeros(rows.n_users).scatter_reduce_(0, rows.segments, draws, "amax")
        positions = ((draws >= settings.masking) | (draws == best[rows.segments])).nonzero().squeeze(1)
        kept = torch.bincount(rows.segments[positions], minlength=rows.n_users)
    if settings.pseudo_items:
        fraction = uniform(key.fold("decoys").spread(rows.users), 1).squeeze(-1)
        decoys = (rows.counts * settings.pseudo_items + fraction).floor().to(torch.int64)
        decoys = torch.minimum(decoys, n_items - rows.counts)
    wanted = kept + decoys if n_negatives is None else torch.full_like(kept, n_negatives)
    outside, owners = draw_outside(rows, n_items, decoys + wanted, key.fold("outside").spread(rows.users))
    if not settings.masking and not settings.pseudo_items:
        return Labels(rows, positions, outside, owners)
    among = ranks(owners, rows.n_users)
    decoy = among < decoys[owners]
    chosen, negative = decoy.nonzero().squeeze(1), (~decoy).nonzero().squeeze(1)
    limits = torch.zeros_like(rows.offsets)
    torch.cumsum(kept + decoys, 0, out=limits[1:])
    # A user's real items come first, in their order, and then its decoys.
    segments = torch.repeat_interleave(kept + decoys)
    own = torch.arange(positions.numel(), device=owners.device)
    own += (limits[:-1] - (kept.cumsum(0) - kept))[rows.segments[positions]]
    added = among[chosen] + (limits[:-1] + kept)[owners[chosen]]
    items = torch.empty_like(segments).index_copy_(0, own, rows.items[positions])
    items.index_copy_(0, added, outside[chosen])
    where = torch.full_like(segments, -1).index_copy_(0, own, positions)
    labelled = replace(rows, offsets=limits, items=items, segments=segments)
    return Labels(labelled, where, outside[negative], owners[negative])


def protect(values: Tensor, settings: PrivacySettings, keys: Tensor) -> Tensor:
    """Clip each coordinate to ``[-clip, clip]`` and add Laplace noise, drawn per row by ``keys`` [T].

    ``values`` [T, d]. The clip bound holds exactly for what the noise is added to.
    """
    if settings.clip is not None:
        values = values.clamp(-settings.clip, settings.clip)
    if settings.noise_scale:
        values = laplace(keys, values.shape[-1]).mul_(settings.noise_scale).add_(values)
    return values
