"""Explicit boosting: malicious clients raise the targets' scores for their own vectors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Knowledge, Lying, Sight
from perfedrec.audit.poisoning.fillers import popular_fillers
from perfedrec.core.keys import Key


class ExplicitBoosting(Lying):
    """Explicit boosting (the baseline EB of Zhang et al., PipAttack, WSDM 2022, eq. 6): malicious clients send the
    gradient of ``L_exp = -sum_u sum_t log sigmoid(y_ut)`` over themselves and the targets, and nothing else.

    Their own vectors come from honest work on lists of targets and popular items, and so lie where many honest users'
    vectors lie. Knows which items are popular. Departs from the paper: the sigmoid's factor is left out, because only
    the direction is kept; vectors that are reported point to the mean of the malicious users' vectors; in a method that
    does not score with vectors, what honest work changes in the targets is sent alone, and longer.
    """

    name = "boosting"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({"popularity"})

    def fillers(self, n: int, key: Key) -> Tensor:
        return popular_fillers(self.known.popular, n, key)

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        own = sight.vectors()
        if own is None:
            return self.known.targets, honest_changes(sight, self.known.targets)
        return self.known.targets, own.mean(0).expand(self.known.targets.numel(), -1)

    def reported(self, sight: Sight) -> Tensor | None:
        reports = sight.work.reports
        return None if reports is None else reports.mean((0, 1))


def honest_changes(sight: Sight, items: Tensor) -> Tensor:
    """[r, d] what the malicious clients' honest work changes in ``items`` [r] together."""
    work = sight.work
    assert work.deltas is not None
    assert work.items is not None
    table = torch.zeros_like(sight.broadcast.items[:, : work.deltas.shape[1]])
    return table.index_add_(0, work.items, work.deltas)[items]
