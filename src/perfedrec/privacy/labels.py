"""What a client trains on instead of its items: decoys, masked items, randomised response.

Decoys and masking give deniability but no guarantee. Fresh decoys average out within a few participations; sticky ones,
which are the same in every round, do not. Randomised response (Warner, 1965) on the item set has a guarantee per item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.compiled import usable
from perfedrec.core.keys import Key, bits, fold_in, uniform
from perfedrec.core.sampling import draw_outside, ranks
from perfedrec.core.types import Rows
from perfedrec.privacy.settings import PrivacySettings

Keys = Callable[[str], Tensor]


@dataclass(frozen=True)
class Labels:
    """What a block's users train on: ``rows`` labelled as interacted, and ``negatives`` [T] with the position
    ``owners`` [T] of their user.

    ``positions`` [R'] is the position of each labelled row among the real ones, -1 for a decoy.
    """

    rows: Rows
    positions: Tensor
    negatives: Tensor
    owners: Tensor


def label(
    rows: Rows, n_items: int, settings: PrivacySettings, n_negatives: int | None, key: Key, secrets: Tensor
) -> Labels:
    """Leave out a share of each user's items, label a share of random items as interacted, and draw negatives.

    Decoys and negatives are distinct items that the user does not have. So a masked item is never a negative and never
    a decoy. ``n_negatives`` is the number of negatives per user, ``None`` for one per label. A user keeps at least one
    real item. The number of decoys is rounded at random, so that its mean is the exact share. Under randomised response
    only the labels may depend on the items: negatives are drawn from all items that are not labelled, real ones
    included, and a user may keep no real item. Sticky decoys and masked items are drawn with the users' ``secrets`` [B]
    instead of the round's ``key``.
    """

    def keys(purpose: str) -> Tensor:
        if settings.sticky:
            return fold_in(secrets, torch.full_like(secrets, Key(0).fold(purpose).value >> 1))
        return key.fold(purpose).spread(rows.users)

    positions, kept = _kept(rows, settings, keys)
    decoys = _decoys(rows, n_items, settings, keys)
    wanted = kept + decoys if n_negatives is None else torch.full_like(kept, n_negatives)
    outside_keys = key.fold("outside").spread(rows.users)
    if settings.randomised_response is not None:
        chosen, chosen_owners = draw_outside(rows, n_items, decoys, keys("response"))
        kept_rows = replace(rows, items=rows.items[positions], segments=rows.segments[positions])
        negatives, owners = draw_outside(
            _with(kept_rows, chosen, chosen_owners, n_items), n_items, wanted, outside_keys
        )
    elif not bool(decoys.any()):
        negatives, owners = draw_outside(rows, n_items, wanted, outside_keys)
        chosen, chosen_owners = negatives[:0], owners[:0]
        if positions.numel() == rows.items.numel():
            return Labels(rows, positions, negatives, owners)
    elif settings.sticky:
        chosen, chosen_owners = draw_outside(rows, n_items, decoys, keys("outside"))
        negatives, owners = draw_outside(_with(rows, chosen, chosen_owners, n_items), n_items, wanted, outside_keys)
    else:  # decoys and negatives are one draw
        outside, every = draw_outside(rows, n_items, decoys + wanted, outside_keys)
        if usable(rows.items, positions):
            return _placed(rows, positions, kept, decoys, outside, every)
        decoy = ranks(every, rows.n_users) < decoys[every]
        chosen, chosen_owners = outside[decoy], every[decoy]
        negatives, owners = outside[~decoy], every[~decoy]
    limits = torch.zeros_like(rows.offsets)
    torch.cumsum(kept + decoys, 0, out=limits[1:])
    # A user's real items come first, in their order, and then its decoys.
    segments = torch.repeat_interleave(kept + decoys)
    own = torch.arange(positions.numel(), device=owners.device)
    own += (limits[:-1] - (kept.cumsum(0) - kept))[rows.segments[positions]]
    added = ranks(chosen_owners, rows.n_users) + (limits[:-1] + kept)[chosen_owners]
    items = torch.empty_like(segments).index_copy_(0, own, rows.items[positions])
    items.index_copy_(0, added, chosen)
    where = torch.full_like(segments, -1).index_copy_(0, own, positions)
    labelled = replace(rows, offsets=limits, items=items, segments=segments)
    return Labels(labelled, where, negatives, owners)


def _placed(rows: Rows, positions: Tensor, kept: Tensor, decoys: Tensor, outside: Tensor, every: Tensor) -> Labels:
    """The labels from real rows and from what was drawn for the users ``every`` [T]: decoys first, then negatives."""
    from perfedrec.privacy import kernels

    counts = torch.bincount(every, minlength=rows.n_users)
    taken, limits = torch.minimum(decoys, counts), torch.zeros_like(rows.offsets)
    torch.cumsum(kept + taken, 0, out=limits[1:])
    n_labelled = int(limits[-1])
    found = [rows.items.new_empty(n_labelled) for _ in range(3)]
    negatives = [rows.items.new_empty(positions.numel() + outside.numel() - n_labelled) for _ in range(2)]

    def arrays(*tensors: Tensor) -> tuple[NDArray[np.int64], ...]:
        return tuple(each.numpy() for each in tensors)

    kernels.place(
        rows.items.numpy(), arrays(positions, kept), arrays(outside, counts), arrays(limits, *found), arrays(*negatives)
    )
    items, where, segments = found
    return Labels(replace(rows, offsets=limits, items=items, segments=segments), where, *negatives)


def truth_probability(epsilon: float) -> float:
    """The probability with which symmetric randomised response reports an item truthfully: ``e^eps / (1 + e^eps)``."""
    return 1 / (1 + exp(-epsilon))


def _kept(rows: Rows, settings: PrivacySettings, keys: Keys) -> tuple[Tensor, Tensor]:
    """Positions of the real rows that stay, and [B] how many each user keeps."""
    positions, kept = torch.arange(rows.items.numel(), device=rows.items.device), rows.counts
    response = settings.randomised_response
    left_out = settings.masking if response is None else 1 - truth_probability(response)
    if left_out and response is None and usable(rows.offsets, rows.items):
        from perfedrec.privacy import kernels

        words, kept = keys("masking").numpy().view("uint64"), torch.empty_like(kept)
        given = (rows.offsets.numpy(), rows.items.numpy(), left_out, positions.numpy(), kept.numpy())
        return positions[: kernels.keep(words, *given)], kept
    if left_out:
        draws = uniform(fold_in(keys("masking")[rows.segments], rows.items), 1).squeeze(-1)
        stays = draws >= left_out
        if response is None:
            best = draws.new_zeros(rows.n_users).scatter_reduce_(0, rows.segments, draws, "amax")
            stays |= draws == best[rows.segments]
        positions = stays.nonzero().squeeze(1)
        kept = torch.bincount(rows.segments[positions], minlength=rows.n_users)
    return positions, kept


def _decoys(rows: Rows, n_items: int, settings: PrivacySettings, keys: Keys) -> Tensor:
    """[B] the number of decoys of each user."""
    decoys = torch.zeros_like(rows.counts)
    if settings.randomised_response is not None:
        from scipy.stats import binom  # 30 MB that only this needs

        chance = 1 - truth_probability(settings.randomised_response)
        words = bits(keys("decoys"), 1).squeeze(-1).cpu().numpy().view("uint64")
        numbers = binom.ppf(((words >> 11) + 0.5) * 2.0**-53, (n_items - rows.counts).cpu().numpy(), chance)
        decoys = torch.from_numpy(numbers).to(rows.counts)
    elif settings.pseudo_items and usable(rows.offsets):
        from perfedrec.privacy import kernels

        words = keys("decoys").numpy().view("uint64")
        kernels.count_decoys(words, rows.offsets.numpy(), settings.pseudo_items, n_items, decoys.numpy())
        return decoys
    elif settings.pseudo_items:
        fraction = uniform(keys("decoys"), 1).squeeze(-1)
        decoys = (rows.counts * settings.pseudo_items + fraction).floor().to(torch.int64)
    return torch.minimum(decoys, n_items - rows.counts)


def _with(rows: Rows, items: Tensor, owners: Tensor, n_items: int) -> Rows:
    """The rows with ``items`` [T] added for the users ``owners`` [T], ascending within a user."""
    joined = torch.cat([rows.segments * n_items + rows.items, owners * n_items + items]).sort().values
    segments = torch.div(joined, n_items, rounding_mode="floor")
    offsets = torch.zeros_like(rows.offsets)
    torch.cumsum(torch.bincount(segments, minlength=rows.n_users), 0, out=offsets[1:])
    return replace(rows, offsets=offsets, items=joined - segments * n_items, segments=segments)


def by_client(labels: Labels) -> tuple[Tensor, Tensor]:
    """[P + N] the client of each label and negative, and the order that sorts them by client."""
    segments = torch.cat([labels.rows.segments, labels.owners])
    return segments, segments.argsort(stable=True)
