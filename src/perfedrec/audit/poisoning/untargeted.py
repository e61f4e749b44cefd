"""Attacks on everybody's lists: they want no item in particular."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Knowledge, Lying, Sight, stretched
from perfedrec.core.keys import normal
from perfedrec.core.settings import Settings
from perfedrec.core.types import Update
from perfedrec.nn.clustering import first_centroids, k_means


class SignFlipping(Lying):
    """Sign flipping (Li et al., RSA, AAAI 2019; Damaskinos et al., AISTATS 2018): malicious clients send their honest
    work with the other sign, and longer. In phases before training, too.

    Knows nothing. Departs from the papers: lists are invented, because malicious clients are added to the users.
    """

    name = "sign-flipping"
    promotes = False

    def forge(self, sight: Sight) -> Update:
        work, length = sight.work, sight.length if sight.training else sight.before
        if work.deltas is None or (not sight.training and sight.phase == "degrees"):
            return work
        flipped = replace(work, deltas=-work.deltas, reports=None if work.reports is None else -work.reports)
        return stretched(flipped, work, length)


class Spattack(Lying):
    """Spattack (Zhang et al., "Rethinking Byzantine Robustness in Federated Recommendation from Sparse Aggregation
    Perspective", AAAI 2025), with limited knowledge (Spattack-L): malicious clients send the same random rows for all
    items, and so outnumber the honest contributors of rare items.

    Knows nothing. Departs from the paper: all malicious clients change all items (Spattack-L-D), at the length that the
    scenario sets.
    """

    name = "spattack"
    promotes = False

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        every = torch.arange(self.known.n_items)
        return every, normal(self.known.key.fold("rows").spread(every), _width(sight))


class SpattackO(Spattack):
    """Spattack with full knowledge (Spattack-O, AAAI 2025): malicious clients send the sum of what honest clients send
    in the same round with the other sign, for all items.

    Knows what the honest clients of the round send. Departs from the paper: it sees the honest clients of the block in
    which malicious clients are computed, which is the whole cohort unless ``run.block_size`` is smaller.
    """

    name = "spattack-o"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({"gradients"})

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        table, honest = torch.zeros(self.known.n_items, _width(sight)), sight.honest
        if honest is not None and honest.deltas is not None and honest.items is not None:
            table.index_add_(0, honest.items, honest.deltas)
        touched = table.any(1).nonzero().squeeze(1)
        if not touched.numel():
            return super().changes(sight)
        return touched, -table[touched]


class ClusterAttackOptions(Settings):
    """Options of ClusterAttack."""

    n_clusters: int = Field(5, ge=1, description="number of clusters to which items are drawn together")


class ClusterAttack(Lying):
    """ClusterAttack (Yu et al., "Untargeted Attack against Federated Recommendation Systems via Poisonous Item
    Embeddings and the Defense", AAAI 2023): items are clustered by their rows, and malicious clients send the gradient
    of the variance within clusters, so that the items of a cluster get similar scores.

    Knows nothing. Departs from the paper: the number of clusters is fixed, where the paper adapts it; the length is
    that of the scenario, where the paper imitates the lengths of honest gradients.
    """

    name = "clusterattack"
    promotes = False
    Options = ClusterAttackOptions
    options: ClusterAttackOptions

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        items = sight.broadcast.items
        n = min(self.options.n_clusters, items.shape[0])
        centres = first_centroids(items, n, self.known.key.fold("clusters"))
        labels, centres = k_means(items, centres)
        every = torch.arange(items.shape[0])
        return every, (centres[labels] - items)[:, : _width(sight)]


def _width(sight: Sight) -> int:
    """The length of the rows that clients change."""
    return sight.broadcast.items.shape[1] if sight.work.deltas is None else sight.work.deltas.shape[1]
