"""Attacks that know nothing but what every client receives: they find popular items by how far rows move."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.audit.poisoning.adversary import Known, Lying, Sight
from perfedrec.audit.poisoning.aims import Mined, mean_direction
from perfedrec.audit.poisoning.boosting import honest_changes
from perfedrec.core.keys import uniform
from perfedrec.core.settings import Settings
from perfedrec.core.types import Update


class MiningOptions(Settings):
    """Options of attacks that mine popular items."""

    mined: int = Field(10, ge=1, description="number of items that are taken for the most popular ones")
    rounds: int = Field(2, ge=1, description="item tables whose changes are watched for it")


class Mining(Lying):
    """An adversary that mines popular items in the first rounds of training, and follows the method until then."""

    Options: ClassVar[type[Settings]] = MiningOptions
    options: MiningOptions

    def __init__(self, known: Known, options: Settings | None = None) -> None:
        super().__init__(known, options)
        self.mined = Mined(self.options.mined, self.options.rounds)

    def popular(self, items: Tensor) -> Tensor | None:
        """[p, d] the rows of the mined items; ``None`` before they are known."""
        found = self.mined.popular(self.known.targets)
        return None if found is None else items[found]

    def forge(self, sight: Sight) -> Update:
        if sight.training:
            self.mined.see(sight.broadcast.items)
            if self.popular(sight.broadcast.items) is None:
                return sight.work
        return super().forge(sight)

    def reported(self, sight: Sight) -> Tensor | None:
        popular = self.popular(sight.broadcast.items)
        return None if popular is None else mean_direction(popular)

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        popular = self.popular(sight.broadcast.items)
        assert popular is not None
        if sight.work.deltas is not None and sight.work.deltas.shape[1] != popular.shape[1]:
            return self.known.targets, honest_changes(sight, self.known.targets)
        return self.known.targets, self.aim(sight.broadcast.items[self.known.targets], popular)

    def aim(self, targets: Tensor, popular: Tensor) -> Tensor:
        """[t, d] the direction in which the rows ``targets`` [t, d] move, by those of ``popular`` [p, d] items."""
        raise NotImplementedError


class PieckIPE(Mining):
    """PIECK with item popularity enhancement (Zhang et al., "Preventing the Popular Item Embedding Based Attack in
    Federated Recommendations", ICDE 2024): the targets' rows are drawn to those of mined popular items, with weights
    ``w_p`` that fall with the rank of p.

    Knows nothing. Departs from the paper: the gradient is that of ``-sum_p w_p |q_t - q_p|^2``, where the paper has
    cosines, because a row that only turns stays short; items of similar and of opposite direction are not weighted
    apart; all malicious clients share what they mine.
    """

    name = "pieck-ipe"

    def aim(self, targets: Tensor, popular: Tensor) -> Tensor:
        weights = torch.arange(popular.shape[0], 0, -1, dtype=popular.dtype)
        wanted: Tensor = (weights / weights.sum()) @ popular
        return wanted - targets


class PieckUEA(Mining):
    """PIECK with user embedding approximation (ICDE 2024): mined popular items' rows stand for the vectors of honest
    users, and malicious clients send the gradient of ``sum_p log sigmoid(q_t q_p)`` with respect to the targets' rows.

    Knows nothing. Departs from the paper: the mean is over all mined items, not over batches of them; all malicious
    clients share what they mine.
    """

    name = "pieck-uea"

    def aim(self, targets: Tensor, popular: Tensor) -> Tensor:
        found: Tensor = torch.sigmoid(-(targets @ popular.T)) @ popular
        return found


class PoisonFRSOptions(MiningOptions):
    """Options of PoisonFRS."""

    factor: float = Field(10.0, gt=0, description="length of the rows that are aimed at, as a multiple of popular ones")


class PoisonFRS(Mining):
    """PoisonFRS (Yin et al., WWW 2024): fake users choose the rows that the targets shall have, those of popular items
    and ``factor`` times as long, and send the difference to the rows that the targets have now.

    Knows nothing. Departs from the paper, of which only a summary was at hand: popular items are mined as PIECK does,
    and the rows that are aimed at are their mean; the difference is sent at the length that the scenario sets.
    """

    name = "poisonfrs"
    Options = PoisonFRSOptions
    options: PoisonFRSOptions

    def aim(self, targets: Tensor, popular: Tensor) -> Tensor:
        wanted = mean_direction(popular) * popular.norm(dim=1).mean() * self.options.factor
        found: Tensor = wanted - targets
        return found


class HidAttackOptions(MiningOptions):
    """Options of HidAttack."""

    exploration: float = Field(0.1, ge=0, le=1, description="share of rounds in which a random arm is chosen (epsilon)")
    spread: float = Field(0.5, ge=0, description="length of what is random in a client's part, beside the aim")


class HidAttack(Mining):
    """HidAttack ("An Effective and Undetectable Model Poisoning Attack to Federated Recommenders", TKDE 2025): a bandit
    chooses in each round how the poisoned gradient is made, so that gradients differ, and prefers what has worked.

    The arms are the aims of PIECK-IPE, PIECK-UEA and PoisonFRS. The reward of an arm is by how much the targets' mean
    score rose for the mined items' rows, in standard deviations of all items' scores, in the next item table. Knows
    nothing. Departs from the paper, of which only a summary was at hand: the arms are those that this package has; the
    bandit is epsilon-greedy; clients differ by random parts that are orthogonal to the aim.
    """

    name = "hidattack"
    Options = HidAttackOptions
    options: HidAttackOptions

    def __init__(self, known: Known, options: Settings | None = None) -> None:
        super().__init__(known, options)
        plain = MiningOptions(mined=self.options.mined, rounds=self.options.rounds)
        self.arms = (PieckIPE(known, plain), PieckUEA(known, plain), PoisonFRS(known))
        self.rewards, self.pulls = torch.zeros(len(self.arms)), torch.zeros(len(self.arms))
        self._arm, self._standing, self._round, self._table = 0, 0.0, 0, torch.zeros(0)

    def standing(self, items: Tensor, popular: Tensor) -> float:
        """How far the targets' scores are above those of all items, for users like popular items."""
        scores = items @ mean_direction(popular)
        return float((scores[self.known.targets].mean() - scores.mean()) / scores.std().clamp(min=1e-12))

    def choose(self, items: Tensor, popular: Tensor) -> int:
        """The arm of this round; a new item table rewards the last one."""
        if torch.equal(items, self._table):
            return self._arm
        now = self.standing(items, popular)
        if self._round:
            self.pulls[self._arm] += 1
            self.rewards[self._arm] += (now - self._standing - self.rewards[self._arm]) / self.pulls[self._arm]
        drawn = uniform(self.known.key.fold("arm").spread(torch.tensor([self._round])), 2)[0]
        untried = (self.pulls == 0).nonzero().squeeze(1)
        if untried.numel():
            self._arm = int(untried[0])
        elif float(drawn[0]) < self.options.exploration:
            self._arm = min(int(drawn[1] * len(self.arms)), len(self.arms) - 1)
        else:
            self._arm = int(self.rewards.argmax())
        self._standing, self._round, self._table = now, self._round + 1, items.clone()
        return self._arm

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        targets, items = self.known.targets, sight.broadcast.items
        popular = self.popular(items)
        assert popular is not None
        if sight.work.deltas is not None and sight.work.deltas.shape[1] != items.shape[1]:
            return super().changes(sight)
        aim = functional.normalize(self.arms[self.choose(items, popular)].aim(items[targets], popular), dim=1)
        n, (t, dim) = sight.work.users.numel(), aim.shape
        keys = self.known.key.fold("spread", self._round).spread(sight.work.users)
        noise = (uniform(keys, t * dim) - 0.5).view(n, t, dim)
        noise = noise - (noise * aim).sum(2, keepdim=True) * aim
        return targets, aim + functional.normalize(noise, dim=2) * self.options.spread

    def aim(self, targets: Tensor, popular: Tensor) -> Tensor:
        return self.arms[self._arm].aim(targets, popular)
