"""Attacks that know which items are popular, or the lists of a few users."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Knowledge, Known, Lying, Sight
from perfedrec.audit.poisoning.aims import fitted_users, mean_direction, popularity_direction
from perfedrec.audit.poisoning.fillers import popular_fillers
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings


class ExplicitBoosting(Lying):
    """Explicit boosting (the baseline EB of Zhang et al., PipAttack, WSDM 2022): malicious clients send the gradient of
    ``L_exp = -sum_u sum_t log sigmoid(y_ut)`` over themselves and the targets, and nothing else.

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


class PipAttackOptions(Settings):
    """Options of PipAttack."""

    popular: float = Field(0.1, gt=0, lt=1, description="share of the items that are taken for popular")
    boosting: float = Field(0.5, ge=0, le=1, description="weight of explicit boosting beside popularity")


class PipAttack(ExplicitBoosting):
    """PipAttack (Zhang et al., WSDM 2022): the targets' rows are moved to where a classifier takes them for popular
    items (popularity obfuscation, ``L_pop``), and along the malicious users' vectors (``L_exp``).

    Knows which items are popular. Departs from the paper: the classifier is linear, and solved anew in each round,
    where the paper trains a network with a level for each range of popularity; the two directions are mixed at equal
    length, instead of their losses; there is no third loss that keeps forged rows near to honest ones.
    """

    name = "pipattack"
    Options = PipAttackOptions
    options: PipAttackOptions

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        targets, own = super().changes(sight)
        items = sight.broadcast.items
        if own.shape[1] != items.shape[1]:
            return targets, own
        assert self.known.popular is not None
        n = max(round(self.options.popular * items.shape[0]), 1)
        aim = popularity_direction(items, self.known.popular[:n])
        share = self.options.boosting
        unit = own / own.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return targets, share * unit + (1 - share) * aim


class FedRecAttackOptions(Settings):
    """Options of FedRecAttack."""

    steps: int = Field(20, ge=1, description="steps by which users' vectors are fitted in each round")
    top: int = Field(10, ge=1, description="length of the lists from which other items are pushed out")
    rows: int = Field(60, ge=1, description="largest number of item rows that a malicious client changes (kappa)")


class FedRecAttack(Lying):
    """FedRecAttack (Rong et al., ICDE 2022): malicious clients fit vectors to the public lists of a few users, and send
    the gradient of ``sum_u sum_t g(min over the top items j of y_uj, minus y_ut)`` over these users, with ``g(x) = x``
    for x >= 0 and ``exp(x) - 1`` below. It raises the targets and lowers the last items of the users' lists.

    Knows the lists of a share of the honest users (``public`` of the scenario; the paper publishes a share of all
    interactions). Departs from the paper: scores are inner products with the item table as it is sent, whatever the
    method does with it; users' vectors have Adam steps on BPR, some in each round; lists are those of random fillers.
    """

    name = "fedrecattack"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({"public"})
    Options = FedRecAttackOptions
    options: FedRecAttackOptions

    def __init__(self, known: Known, options: Settings | None = None) -> None:
        super().__init__(known, options)
        self._users: Tensor | None = None
        self._round = 0

    def users(self, items: Tensor) -> Tensor:
        """[n, d] the vectors of the users whose lists are public, for an item table [m, d]."""
        assert self.known.public is not None
        start = self._users if self._users is not None and self._users.shape[1] == items.shape[1] else None
        key = self.known.key.fold("fit", self._round)
        self._users = fitted_users(items, list(self.known.public), key, self.options.steps, start)
        self._round += 1
        return self._users

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        items, targets = sight.broadcast.items, self.known.targets
        users = self.users(items)
        scores = users @ items.T
        hidden = scores.clone()
        assert self.known.public is not None
        for place, own in enumerate(self.known.public):
            hidden[place, own] = -torch.inf
        hidden[:, targets] = -torch.inf
        fewest = int((hidden > -torch.inf).sum(1).min())
        last, bottom = (each[:, -1] for each in hidden.topk(max(min(self.options.top, fewest), 1), dim=1))
        lacks = torch.stack([~torch.isin(targets, own) for own in self.known.public])
        slopes = (last[:, None] - scores[:, targets]).clamp(max=0).exp() * lacks
        table = torch.zeros_like(items)
        table[targets] = slopes.T @ users
        table.index_add_(0, bottom, -slopes.sum(1, keepdim=True) * users)
        longest = table.norm(dim=1).index_fill(0, targets, torch.inf).argsort(descending=True, stable=True)
        kept = longest[: max(self.options.rows, targets.numel())].sort().values
        kept = kept[(table[kept] != 0).any(1)]
        return kept, table[kept]

    def reported(self, sight: Sight) -> Tensor | None:
        return None if self._users is None else mean_direction(self._users)


def honest_changes(sight: Sight, items: Tensor) -> Tensor:
    """[r, d] what the malicious clients' honest work changes in ``items`` [r] together."""
    work = sight.work
    assert work.deltas is not None
    assert work.items is not None
    table = torch.zeros_like(sight.broadcast.items[:, : work.deltas.shape[1]])
    return table.index_add_(0, work.items, work.deltas)[items]
