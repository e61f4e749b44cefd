"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key
from perfedrec.core.sampling import draw_outside, ranks
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.sequences import Histories, SequenceMethod, SequenceSettings
from perfedrec.nn.losses import softmax_loss, softplus
from perfedrec.nn.segments import dot


class SASRecSettings(SequenceSettings):
    """Options of SASRec."""

    loss: Literal["binary", "softmax"] = Field(
        "binary", description="binary: each next item against a random one, as in the paper; softmax: against all items"
    )


class SASRec(SequenceMethod):
    """``score_u = F_n q`` with ``F_t``, what a causal encoder makes of the items up to place t (sections III-A to
    III-D). Each place is trained to find the next item: ``-log sigmoid(F_t q_i) - log(1 - sigmoid(F_t q_j))`` for the
    next item i and a random item j that the user does not have (section III-E), as a mean over places.

    Departs from the paper: no dropout of the attention weights; a mean over places instead of a sum; negatives of a
    user do not repeat; Adam's second moment keeps .999 instead of .98. Item vectors are multiplied by the root of d
    before the encoder, as in the authors' code. ``loss = "softmax"`` is not in the paper.
    """

    Options = SASRecSettings
    settings: SASRecSettings

    def loss(self, weights: list[Tensor], users: Tensor, data: Training, key: Key) -> Tensor:
        whole = Histories.of(data, users, self.settings.max_length + 1)
        own = Histories(whole.items[:, :-1], whole.counts - 1)
        there, items = own.there, weights[0][:-1]
        if not bool(there.any()):  # nobody has a next item
            return weights[0].sum() * 0
        found = self.encoded(weights, own, self.dropout(users, key))[there]
        wanted = whole.items[:, 1:][there]
        if self.settings.loss == "softmax":
            return softmax_loss(found, items, wanted)
        drawn, some = negatives(data, users, own.counts, key)
        return (softplus(-dot(found, items[wanted])) + softplus(dot(found, items[drawn])) * some).mean()

    def vectors(self, weights: list[Tensor], own: Histories) -> tuple[Tensor, Tensor]:
        return self.encoded(weights, own, self.dropout(own.counts, Key(0)))[own.last], weights[0][:-1]


def negatives(data: Training, users: Tensor, counts: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """``counts`` [b] items for each of ``users`` [b], user by user, outside the user's training items: items [T], and
    bool [T] whether there is such an item. A user who has most items gets some of the others more than once."""
    rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
    drawn, owners = draw_outside(rows, data.n_items, counts, key.fold("negatives").spread(users))
    available = torch.bincount(owners, minlength=users.numel())
    segments = torch.repeat_interleave(torch.arange(users.numel(), device=users.device), counts)
    turn = ranks(segments, users.numel()) % available.clamp(min=1)[segments]
    places = (available.cumsum(0) - available)[segments] + turn
    return functional.pad(drawn, (0, 1))[places], available[segments] > 0
