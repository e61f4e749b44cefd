"""The privacy ledger: every release of a run, and what all releases together reveal about one user.

Epsilon refers to one user's data added or removed (that the user takes part is public), at a delta, and is computed by
the PLD accountant of dp-accounting. There are two views. A **recipient** of the model does not know who took part in a
round, so Poisson sampling amplifies. The **coordinator** knows who took part: there is no amplification, and epsilon
depends on how often a user takes part at most.

A limit on participations only removes a user's parts, and cannot increase what a recipient learns. Given the earlier
rounds, the likelihood ratio of the next one is affine in that of a single participation, ``1 + s (l - 1)``, with a
slope s between 0 and the sampling rate. A smaller slope is smaller in convex order, and so is every convex divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from math import exp, sqrt
from typing import TYPE_CHECKING, Literal

from scipy.optimize import brentq
from scipy.stats import norm

from perfedrec.core.errors import PerfedrecError
from perfedrec.privacy.mechanisms import Guarantee

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Adjacency = Literal["add-or-remove", "replace"]
Party = Literal["coordinator", "recipients"]


class AccountingError(PerfedrecError):
    """Raised for an event for which the accountant would give a wrong result."""


@dataclass(frozen=True)
class Release:
    """Something that is published one or more times in a run.

    ``times`` is the number of releases. One user takes part in at most ``participations`` of them, under Poisson
    sampling in each with probability ``rate``. Sampling "everyone" and "fixed" (a cohort of fixed size) are not
    amplified. ``guarantee`` is that of a single release.
    """

    name: str
    times: int
    guarantee: Guarantee
    participations: int
    sampling: Literal["everyone", "poisson", "fixed"] = "everyone"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.sampling != "poisson" and self.rate < 1 and self.sampling != "fixed":
            raise AccountingError(f"{self.name}: everyone takes part, but the rate is {self.rate:g}; expected 1")
        if not 0 <= self.participations <= self.times:
            raise AccountingError(
                f"{self.name}: a user takes part {self.participations} times in {self.times} releases; "
                "expected at most one participation per release"
            )


@dataclass(frozen=True)
class Epsilon:
    """An epsilon; ``value`` is ``None`` if there is none, for the given ``reason``."""

    value: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"none ({self.reason})" if self.value is None else f"{self.value:.3g}"


class Ledger:
    """All releases of a run, at one delta."""

    def __init__(self, releases: Sequence[Release], delta: float) -> None:
        self.releases, self.delta = [each for each in releases if each.times], delta

    def epsilon(self, party: Party) -> Epsilon:
        """What ``party`` can learn about one user from all releases together."""
        exposed = [each for each in self.releases if each.guarantee.law is None and each.participations]
        if exposed:
            reasons = (reason for each in exposed for reason in each.guarantee.reason.split("; "))
            return Epsilon(None, "; ".join(dict.fromkeys(reasons)))
        parts = [part for each in self.releases if (part := self._event(each, party)) is not None]
        if not parts:
            return Epsilon(0.0)
        return Epsilon(account(_composed(parts), self.delta))

    def _event(self, release: Release, party: Party) -> tuple[str, float, float, int] | None:
        amplified = party == "recipients" and release.sampling == "poisson"
        count = release.times if amplified else release.participations
        if not count or release.guarantee.law is None:
            return None
        return release.guarantee.law, release.guarantee.multiplier, release.rate if amplified else 1.0, count

    def lines(self) -> list[dict[str, str | float]]:
        """The releases as plain dictionaries, for JSON."""
        return [
            {
                "release": each.name,
                "times": each.times,
                "participations": each.participations,
                "sampling": each.sampling,
                "rate": each.rate,
                "noise": each.guarantee.law or "none",
                "noise_multiplier": each.guarantee.multiplier,
                "reason": each.guarantee.reason,
            }
            for each in self.releases
        ]


def accountant_version() -> str:
    """Name and version of the accountant."""
    return f"dp-accounting {metadata.version('dp-accounting')}, PLD"


def _composed(parts: Sequence[tuple[str, float, float, int]]) -> DpEvent:
    import dp_accounting as dp

    events: list[DpEvent] = []
    for law, multiplier, rate, count in parts:
        event: DpEvent = (dp.GaussianDpEvent if law == "gaussian" else dp.LaplaceDpEvent)(multiplier)
        if rate < 1:
            event = dp.PoissonSampledDpEvent(rate, event)
        events.append(dp.SelfComposedDpEvent(event, count))
    gaussian = [(z, count) for law, z, rate, count in parts if law == "gaussian" and rate == 1]
    if len(gaussian) == len(parts):  # Gaussian releases without sampling compose to one Gaussian release, exactly
        return dp.GaussianDpEvent(sqrt(1 / sum(count / z**2 for z, count in gaussian)))
    return dp.ComposedDpEvent(events)


def account(
    event: DpEvent, delta: float, adjacency: Adjacency = "add-or-remove", sensitivity: Adjacency = "add-or-remove"
) -> float:
    """The epsilon of an event of dp-accounting, by its PLD accountant.

    ``sensitivity`` is the adjacency for which the event's noise multipliers were computed. Raises
    :class:`AccountingError` for what the accountant would get wrong: a cohort of fixed size (only Poisson sampling can
    be accounted for), an event that it does not support, and, under the replace adjacency, a multiplier that was
    computed for replacement, because the accountant doubles the sensitivity itself.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting import dp_event as dp
    from dp_accounting.pld import PLDAccountant

    for part in _parts(event):
        if isinstance(part, dp.SampledWithReplacementDpEvent | dp.SampledWithoutReplacementDpEvent):
            raise AccountingError(
                "a cohort of fixed size is no Poisson sample; expected Poisson sampling, or an event without sampling"
            )
    if adjacency == "replace" and sensitivity == "replace":
        raise AccountingError(
            "under the replace adjacency the PLD accountant doubles the sensitivity itself; expected multipliers for "
            "one user added or removed"
        )
    relation = NeighboringRelation.REPLACE_ONE if adjacency == "replace" else NeighboringRelation.ADD_OR_REMOVE_ONE
    if isinstance(event, dp.GaussianDpEvent):  # closed form: the accountant takes minutes for little noise
        return gaussian_epsilon(event.noise_multiplier / (2 if adjacency == "replace" else 1), delta)
    accountant = PLDAccountant(relation)
    if not accountant.supports(event):
        raise AccountingError(f"the PLD accountant does not know {type(event).__name__}; expected an event it supports")
    return float(accountant.compose(event).get_epsilon(delta))


def _parts(event: DpEvent) -> list[DpEvent]:
    inner = [getattr(event, "event", None), *(getattr(event, "events", None) or [])]
    return [event, *(part for each in inner if each is not None for part in _parts(each))]


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """The exact delta of one Gaussian release at an epsilon (Balle and Wang, ICML 2018, theorem 8). It is the
    hockey-stick divergence of two normal distributions, which the accountant approximates on a grid."""
    near, far = 0.5 / multiplier - epsilon * multiplier, -0.5 / multiplier - epsilon * multiplier
    return float(norm.cdf(near) - exp(epsilon + norm.logcdf(far)))


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The epsilon of one Gaussian release at ``delta``."""
    if gaussian_delta(multiplier, 0.0) <= delta:
        return 0.0
    most = 0.5 / multiplier**2 + 40 / multiplier  # 40 standard deviations above the privacy loss's mean
    return float(brentq(lambda epsilon: gaussian_delta(multiplier, epsilon) - delta, 0.0, most, rtol=1e-12))


@lru_cache
def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The noise multiplier with which one Gaussian release is (epsilon, delta)-DP, rounded up slightly."""
    low, high = 1e-3 / (1 + epsilon), 50.0 / epsilon + 50.0
    found = brentq(lambda multiplier: gaussian_delta(multiplier, epsilon) - delta, low, high, rtol=1e-12)
    return float(found) * (1 + 1e-9)


@lru_cache
def poisson_multiplier(epsilon: float, delta: float, rate: float, times: int) -> float:
    """The noise multiplier with which ``times`` Gaussian releases over Poisson samples of ``rate`` are (epsilon,
    delta)-DP against recipients, who do not know who took part."""
    import dp_accounting as dp

    def event(multiplier: float) -> DpEvent:
        return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(multiplier)), times)

    return _calibrated(event, epsilon, delta, tol=1e-2)


def _calibrated(event: Callable[[float], DpEvent], epsilon: float, delta: float, tol: float) -> float:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    def accountant() -> PLDAccountant:
        return PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)

    start = dp.LowerEndpointAndGuess(0.0, 1.0)
    return float(dp.calibrate_dp_mechanism(accountant, event, epsilon, delta, start, tol=tol))


SHARES = {"degrees": 0.2, "spectral": 0.8, "join": 0.1, "training": 0.8}
"""The shares of a budget by release, chosen on Yelp's validation data. A share for degrees between 7 and 30 % makes
little difference at epsilon 8; below epsilon 8 a larger share is better."""


def split_budget(
    epsilon: float, delta: float, participations: Mapping[str, int], shares: Mapping[str, float] = SHARES
) -> dict[str, float]:
    """Noise multipliers of several Gaussian releases that are together (epsilon, delta)-DP against the coordinator.

    A user takes part in release r ``participations[r]`` times. Gaussian releases compose to one with
    ``1 / z^2 = sum_r count_r / z_r^2``. Each release gets its share of this sum; the shares of the releases that take
    place are normalised to 1.
    """
    z = gaussian_multiplier(epsilon, delta)
    present = {name: shares[name] for name, count in participations.items() if count and shares.get(name)}
    total = sum(present.values())
    return {name: z * sqrt(participations[name] * total / share) for name, share in present.items()}
