"""Planning: the noise that an epsilon needs, and the accuracy to expect with it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from perfedrec.core.errors import ConfigError
from perfedrec.privacy.ledger import gaussian_multiplier, poisson_multiplier, split_budget

MEASURED = (
    (11, 1.6, 0.44),
    (20, 2.2, 0.61),
    (36, 2.4, 0.66),
    (110, 2.8, 0.77),
    (364, 3.4, 0.94),
)
"""Profile private on Yelp and on Yelp with each user counted ten times (docs/privacy.md): users per unit of noise of
each of six passes, and the test NDCG@20 divided by that of popularity and by that without noise at d = 64. The
quotients are those of version 0.6.0, which had three passes, at the same epsilons."""

WORSE = 6
"""Users per unit of noise at which popularity was better (epsilon 1 on Yelp)."""


@dataclass(frozen=True)
class SpectralPlan:
    """A plan of pre-training without training: noise multipliers of the releases over all users, and ``signal``, users
    per unit of noise."""

    multipliers: dict[str, float]
    signal: float

    @property
    def expectation(self) -> str:
        """What was measured on Yelp at this signal."""
        if self.signal < MEASURED[0][0]:
            return f"not better than popularity, which was better at {WORSE} users per unit of noise"
        _, popularity, noiseless = max(each for each in MEASURED if each[0] <= self.signal)
        return f"at least {popularity:g} times the NDCG@20 of popularity, {noiseless:.0%} of that without noise"


@dataclass(frozen=True)
class TrainingPlan:
    """A plan of gradient training: at most ``cap`` participations of a user; the noise multiplier of a round that
    reaches the epsilon against the ``coordinator``, and against model ``recipients`` only, which is never more because
    they see less; and ``signal``, the largest norm that a cohort's sum can have divided by the norm of the noise."""

    cap: int
    rate: float
    coordinator: float
    recipients: float
    signal: float

    @property
    def expectation(self) -> str:
        """The expectation in words."""
        if self.signal < 1:
            return "not better than popularity: the noise of a round is larger than any sum of its cohort"
        return "unclear: the sum of a cohort can be larger than the noise of a round, so try it"


def plan_spectral(epsilon: float, delta: float, users: int, items: int, passes: int) -> SpectralPlan:
    """Spectral pre-training over ``users`` users and ``items`` items that is (epsilon, delta)-DP against the
    coordinator."""
    multipliers = split_budget(epsilon, delta, {"degrees": 1, "spectral": passes})
    return SpectralPlan(multipliers, users / (multipliers["spectral"] * sqrt(items)))


def plan_training(
    epsilon: float, delta: float, users: int, items: int, dim: int, rounds: int, cohort: int, cap: int | None
) -> TrainingPlan:
    """``rounds`` rounds of training with Poisson cohorts of mean size ``cohort``. ``cap`` defaults to the mean number
    of participations, rounded up. Raises :class:`ConfigError` for a cohort larger than the population."""
    if cohort > users:
        raise ConfigError(f"a cohort of {cohort} is larger than the population of {users}; expected at most as many")
    rate = cohort / users
    cap = min(rounds, max(1, ceil(rounds * rate))) if cap is None else min(cap, rounds)
    coordinator = gaussian_multiplier(epsilon, delta) * sqrt(cap)
    recipients = min(coordinator, poisson_multiplier(epsilon, delta, rate, rounds))
    return TrainingPlan(cap, rate, coordinator, recipients, cohort / (coordinator * sqrt(items * dim)))
