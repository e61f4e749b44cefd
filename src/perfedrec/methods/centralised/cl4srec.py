"""CL4SRec: contrastive learning for sequential recommendation (Xie et al., ICDE 2022)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.sasrec import SASRec, SASRecSettings
from perfedrec.methods.centralised.sequences import Histories
from perfedrec.nn.losses import info_nce


class CL4SRecSettings(SASRecSettings):
    """Options of CL4SRec."""

    weight: float = Field(0.1, ge=0, description="lambda, weight of the contrastive loss")
    temperature: float = Field(1.0, gt=0, description="tau, temperature of InfoNCE")
    crop: float = Field(0.6, gt=0, le=1, description="eta, share of a sequence that cropping keeps")
    mask: float = Field(0.3, ge=0, le=1, description="gamma, share of a sequence that masking hides")
    reorder: float = Field(0.6, ge=0, le=1, description="beta, share of a sequence that reordering shuffles")


class CL4SRec(SASRec):
    """SASRec with ``lambda`` times InfoNCE between two views of each user's sequence (section 3). A view is
    made by one of three operations that is drawn for it: crop keeps ``max(1, floor(eta c))`` items in a row of c, mask
    hides ``floor(gamma c)`` random ones, reorder shuffles ``floor(beta c)`` in a row.

    Departs from the paper: InfoNCE with cosine against the other view of the batch's users, not against both views of
    them; and what SASRec departs in.
    """

    Options = CL4SRecSettings
    settings: CL4SRecSettings

    def loss(self, weights: list[Tensor], users: Tensor, data: Training, key: Key) -> Tensor:
        own = Histories.of(data, users, self.settings.max_length)
        views = []
        for number in range(2):
            part = key.fold("view", number)
            view = self.view(own, users, data.n_items, part)
            views.append(self.encoded(weights, view, self.dropout(users, part))[view.last])
        contrasted = info_nce(views[0], views[1], self.settings.temperature)
        return super().loss(weights, users, data, key) + self.settings.weight * contrasted

    def view(self, own: Histories, users: Tensor, n_items: int, key: Key) -> Histories:
        """The sequences ``own`` after one operation each, by the draws of ``users`` [b]."""
        settings, counts, length = self.settings, own.counts[:, None], own.items.shape[1]
        draws = uniform(key.fold("operation").spread(users), length + 2)
        kind, start, noise = (draws[:, :1] * 3).long(), draws[:, 1:2], draws[:, 2:]
        place = torch.arange(length, device=users.device).expand_as(own.items)
        cropped, hidden, moved = (
            (counts.double() * share + 1e-9).long() for share in (settings.crop, settings.mask, settings.reorder)
        )
        cropped = cropped.clamp(min=1)
        first = [(start * (counts - part + 1)).long() for part in (cropped, moved)]
        inside = (place >= first[1]) & (place < first[1] + moved)
        shuffled = torch.where(inside, first[1] - 0.5 + noise * moved, place.to(noise.dtype)).argsort(1)
        rows = torch.where(kind == 0, (place + first[0]).clamp(max=length - 1), place)
        items = own.items.gather(1, torch.where(kind == 2, shuffled, rows))
        lowest = noise.masked_fill(~own.there, torch.inf).argsort(1).argsort(1) < hidden
        items = items.masked_fill((kind == 1) & lowest, n_items)
        return Histories(items, torch.where(kind == 0, cropped, counts).squeeze(1))
