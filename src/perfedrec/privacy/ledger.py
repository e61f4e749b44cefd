"""The privacy ledger: every release of a run, and what all releases together reveal about one user.

Epsilon refers to one user's data added or removed (that the user takes part is public), at a delta. Gaussian releases
without sampling are accounted for exactly, all else by dp-accounting: by its PLD accountant, and by its RDP accountant
where that gives less or where delta is too small for PLD. There are two views. A **recipient** of the model does not
know who took part in a round, so Poisson sampling amplifies. The **coordinator** knows who took part: there is no
amplification, and epsilon depends on how often a user takes part at most.

A limit on participations only removes a user's parts, and cannot increase what a recipient learns. Given the earlier
rounds, the likelihood ratio of the next one is affine in that of a single participation, ``1 + s (l - 1)``, with a
slope s between 0 and the sampling rate. A smaller slope is smaller in convex order, and so is every convex divergence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from math import ceil, exp, expm1, inf, log, log1p, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import erfcx, log_ndtr

from perfedrec.core.errors import PerfedrecError
from perfedrec.privacy.mechanisms import Guarantee

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Adjacency = Literal["add-or-remove", "replace"]
Party = Literal["coordinator", "recipients"]
Accountant = Literal["closed form", "PLD", "RDP"]
Part = tuple[str, float, float, int]
"""The law of a release's noise, its multiplier, the sampling rate (1: not sampled), and the number of releases."""

PLD_GRID = 1e-4
"""The distance of two privacy losses on the grid of the PLD accountant."""

PLD_SMALLEST, PLD_ROUNDING = 1e-12, 5e-15
"""The smallest delta at which PLD's epsilon is used: ``PLD_SMALLEST``, and at least ``PLD_ROUNDING`` per release. PLD
cuts off tails of mass 1e-15, below which its epsilon is infinite. Well above that, rounding errors of its Fourier
transforms, which grow with the number of releases, make it too small: against transforms of tilted distributions, by
1 % at delta 1e-14 after 200 releases, and by 0.02 % at 1e-12 after 200 and at 1e-10 after 20,000."""

RDP_ORDERS = tuple(range(2, 65))
"""The orders of the RDP accountant."""

RDP_HIGH_ORDERS = tuple(round(64 * 1.06**power) for power in range(1, 72))
"""Further orders, to about 4,000, where the highest is best."""

RDP_LOW_ORDERS, RDP_LOW_NOISE = tuple(1 + step / 10 for step in range(1, 100)), 5.0
"""Further orders where a low one is best, and the noise multiplier up to which RDP's series for them converge."""

RDP_ROUNDING = 1e-9
"""What is added to each Rényi divergence: with much noise rounding errors can leave 0 or less, that is, epsilon 0."""

STEP = 1.002
"""Noise for Poisson samples is solved as a power of this number, so that a smaller delta never needs less."""


LITTLE_NOISE = 0.2
"""The Gaussian multiplier below which PLD is not asked: its grid has a place for every step of a privacy loss that has
no bound, and takes minutes and many gigabytes. Epsilon is far above any use then, and RDP's bound says so."""


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
    """An epsilon, and the ``accountant`` that computed it; ``value`` is ``None`` if there is none, for the given
    ``reason``."""

    value: float | None
    reason: str = ""
    accountant: Accountant | None = None

    def __str__(self) -> str:
        return f"none ({self.reason})" if self.value is None else f"{self.value:.3g}"


class Ledger:
    """All releases of a run, at one delta."""

    def __init__(self, releases: Sequence[Release], delta: float) -> None:
        self.releases, self.delta = [each for each in releases if each.times], delta

    def epsilon(self, party: Party) -> Epsilon:
        """What ``party`` can learn about one user from all releases together.

        Recipients see what the coordinator publishes of what it has seen, so what holds against the coordinator holds
        against them. Theirs is the smaller of its epsilon and of the one amplified by sampling, which assumes that they
        do not know who took part but leaves out the limit on participations, and which small deltas make loose.
        """
        exposed = [each for each in self.releases if each.guarantee.law is None and each.participations]
        if exposed:
            return Epsilon(None, _against(exposed))
        value, accountant = self._figure("coordinator")
        if party == "recipients":
            value, accountant = min((value, accountant), self._figure("recipients"), key=lambda figure: figure[0])
        return Epsilon(value, accountant=accountant)

    def _figure(self, party: Party) -> tuple[float, Accountant | None]:
        parts = tuple(part for each in self.releases if (part := self._event(each, party)) is not None)
        return _figure_of(parts, self.delta) if parts else (0.0, None)

    def _event(self, release: Release, party: Party) -> Part | None:
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


def _against(exposed: Sequence[Release]) -> str:
    """The reasons why these releases have no guarantee, each one once. A reason that does not hold for all of them is
    preceded by their names, unless it has its release's name in it, as that of public degrees has."""
    holders: dict[str, list[str]] = {}
    for each in exposed:
        for reason in each.guarantee.reason.split("; "):
            holders.setdefault(reason, []).append(each.name)
    telling = {reason for reason, names in holders.items() if all(name in reason for name in names)}
    every = {name for reason, names in holders.items() if reason not in telling for name in names}
    return "; ".join(
        reason if reason in telling or every <= set(names) else f"in {_listed(names)}: {reason}"
        for reason, names in holders.items()
    )


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def accountant_version() -> str:
    """Name and version of the accountants. Which one gave a figure is in :class:`Epsilon`."""
    return f"dp-accounting {metadata.version('dp-accounting')}, PLD or RDP"


@lru_cache
def _figure_of(parts: tuple[Part, ...], delta: float) -> tuple[float, Accountant]:
    return _accounted(_composed(parts), delta, "add-or-remove")


def _composed(parts: Sequence[Part]) -> DpEvent:
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
    """The epsilon of an event of dp-accounting; infinite where no accountant has a finite one at this delta.

    ``sensitivity`` is the adjacency for which the event's noise multipliers were computed. Raises
    :class:`AccountingError` for what the accountant would get wrong: a cohort of fixed size (only Poisson sampling can
    be accounted for), an event that it does not support, and, under the replace adjacency, a multiplier that was
    computed for replacement, because the accountant doubles the sensitivity itself.
    """
    from dp_accounting import dp_event as dp

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
    return _accounted(event, delta, adjacency)[0]


def _accounted(event: DpEvent, delta: float, adjacency: Adjacency) -> tuple[float, Accountant]:
    """The smallest epsilon that holds for an event at ``delta``, and the accountant that gives it."""
    from dp_accounting import dp_event as dp

    if isinstance(event, dp.GaussianDpEvent):  # the PLD accountant takes minutes for little noise
        return gaussian_epsilon(event.noise_multiplier / (2 if adjacency == "replace" else 1), delta), "closed form"
    if adjacency == "replace":  # the RDP accountant does not double the sensitivity
        return _pld_epsilon(event, delta, adjacency), "PLD"
    bound = _rdp_epsilon(event, delta)
    noise = [part.noise_multiplier for part in _parts(event) if isinstance(part, dp.GaussianDpEvent)]
    if bound < inf and min(noise, default=1.0) < LITTLE_NOISE:
        return bound, "RDP"
    found = _pld_epsilon(event, delta, adjacency)
    return (bound, "RDP") if bound < found else (found, "PLD")


def _pld_epsilon(event: DpEvent, delta: float, adjacency: Adjacency = "add-or-remove") -> float:
    """Epsilon by the PLD accountant; infinite below the smallest delta at which it can be relied on."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    relation = NeighboringRelation.REPLACE_ONE if adjacency == "replace" else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation)
    if not accountant.supports(event):
        raise AccountingError(f"the PLD accountant does not know {type(event).__name__}; expected an event it supports")
    if delta < max(PLD_SMALLEST, PLD_ROUNDING * _count(event)):
        return inf
    return float(accountant.compose(event).get_epsilon(delta))


def _rdp_epsilon(event: DpEvent, delta: float) -> float:
    """Epsilon by the RDP accountant, for one user added or removed; infinite for an event that it does not support."""
    from dp_accounting.rdp import RdpAccountant

    noise = [part.noise_multiplier for part in _parts(event) if hasattr(part, "noise_multiplier")]
    if 0 in noise or not RdpAccountant().supports(event):
        return inf
    found, best = _rdp_of(event, delta, RDP_ORDERS)  # the best of all is near: epsilon is quasi-convex in the order
    if best == RDP_ORDERS[-1]:
        return min(found, _rdp_of(event, delta, RDP_HIGH_ORDERS)[0])
    if best <= RDP_LOW_ORDERS[-1] and max(noise, default=0.0) <= RDP_LOW_NOISE:
        return min(found, _rdp_of(event, delta, RDP_LOW_ORDERS)[0])
    return found


def _rdp_of(event: DpEvent, delta: float, orders: tuple[float, ...]) -> tuple[float, float]:
    from dp_accounting.rdp import RdpAccountant, compute_epsilon

    with _quiet():
        divergences = np.maximum(RdpAccountant(orders).compose(event).rdp, 0.0) + RDP_ROUNDING
    epsilon, order = compute_epsilon(orders, divergences, delta)
    return float(epsilon), float(order)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of the accountant about orders whose series does not converge. It takes their divergence as
    infinite, so that the bound on epsilon comes from other orders and still holds."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parts(event: DpEvent) -> list[DpEvent]:
    return [event, *(part for each in _inner(event) for part in _parts(each))]


def _count(event: DpEvent) -> int:
    """The number of releases in an event."""
    return int(getattr(event, "count", 1)) * max(1, sum(map(_count, _inner(event))))


def _inner(event: DpEvent) -> list[DpEvent]:
    inner = [getattr(event, "event", None), *(getattr(event, "events", None) or [])]
    return [each for each in inner if each is not None]


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """The exact delta of one Gaussian release at an epsilon (Balle and Wang, ICML 2018, theorem 8). It is the
    hockey-stick divergence of two normal distributions, which the accountant approximates on a grid."""
    return exp(_log_gaussian_delta(multiplier, epsilon))


def _log_gaussian_delta(multiplier: float, epsilon: float) -> float:
    """The logarithm of :func:`gaussian_delta`, which does not underflow."""
    near, far = 0.5 / multiplier - epsilon * multiplier, -0.5 / multiplier - epsilon * multiplier
    if near < 0:  # e^epsilon is the ratio of the two densities, so that only Mills ratios are left to compare
        ratio = log(erfcx(-far / sqrt(2)) / erfcx(-near / sqrt(2)))
    else:
        ratio = epsilon + log_ndtr(far) - log_ndtr(near)
    return float(log_ndtr(near)) + log(-expm1(ratio)) if ratio < 0 else -inf


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The epsilon of one Gaussian release at ``delta``; infinite without noise."""
    if multiplier == 0:
        return inf
    if _log_gaussian_delta(multiplier, 0.0) <= log(delta):
        return 0.0
    from scipy.optimize import brentq  # 8 MB that only Gaussian noise needs

    most = 0.5 / multiplier**2 + 40 / multiplier  # 40 standard deviations above the privacy loss's mean
    found = brentq(
        lambda epsilon: _log_gaussian_delta(multiplier, epsilon) - log(delta), 0.0, most, xtol=1e-16 * most, rtol=1e-12
    )
    return float(found)


@lru_cache
def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The noise multiplier with which one Gaussian release is (epsilon, delta)-DP, rounded up slightly."""
    from scipy.optimize import brentq

    low, high = 1e-3 / (1 + epsilon), 50.0 / epsilon + 50.0
    found = brentq(
        lambda multiplier: _log_gaussian_delta(multiplier, epsilon) - log(delta),
        low,
        high,
        xtol=1e-12 * low,
        rtol=1e-12,
    )
    return float(found) * (1 + 1e-9)


@lru_cache
def poisson_multiplier(epsilon: float, delta: float, rate: float, times: int) -> float:
    """The noise multiplier with which ``times`` Gaussian releases over Poisson samples of ``rate`` are (epsilon,
    delta)-DP against recipients, who do not know who took part; rounded up to a power of :data:`STEP`.

    It lies between what one release needs (and 0.2) and what all need without sampling, both of which are exact.
    Between them, RDP gives an upper bound, and PLD what is enough of it. Raises :class:`AccountingError` if the two
    contradict each other.
    """
    import dp_accounting as dp

    def event(power: int) -> DpEvent:
        return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(STEP**power)), times)

    @lru_cache
    def by_pld(power: int) -> float:
        return _pld_epsilon(event(power), delta)

    most = gaussian_multiplier(epsilon, delta) * sqrt(times)
    if rate == 1:
        return most
    low, high = (ceil(log(each) / log(STEP)) for each in (_least(epsilon, delta, rate), most))
    enough = _first(low, high, lambda power: _rdp_epsilon(event(power), delta), epsilon)
    found = _first(low, enough, by_pld, epsilon)
    _check_agreement(by_pld(found), _rdp_epsilon(event(found), delta), times, f"noise {STEP**found:.3g}")
    return float(min(most, STEP**found))


def _first(low: int, high: int, epsilon: Callable[[int], float], limit: float) -> int:
    """The first power from ``low`` on whose ``epsilon`` is at most the ``limit``, where epsilon falls from power to
    power; ``high`` counts as one.

    An accountant takes seconds, so that few powers are asked for: the logarithm of epsilon is nearly a line, and the
    two powers that came nearest say where it meets the limit. Where it would be beyond what is left, the step into what
    is left is doubled. The search begins above, because the less noise there is, the longer an accountant takes.
    """
    known, power, step = dict[int, float](), high, 1
    while low < high:
        found = epsilon(power)
        if 0 < found < inf:
            known[power] = log(found / limit)
        low, high = (low, min(power, high)) if found <= limit or power == high else (power + 1, high)
        guess = _root(known, (low + high) // 2)
        least, most = low + step - 1, high - step
        power = min(max(guess, least), most) if least <= most else (low + high) // 2
        step = 1 if power == guess else 2 * step
    return high


def _root(known: Mapping[int, float], otherwise: int) -> int:
    """The power at which a line through the two smallest logarithms is 0. One alone is taken to fall as 1 / noise."""
    near = sorted(known, key=lambda power: abs(known[power]))[:2]
    if not near:
        return otherwise
    slope = -log(STEP)
    if len(near) == 2 and known[near[0]] != known[near[1]]:
        slope = (known[near[0]] - known[near[1]]) / (near[0] - near[1])
    return ceil(near[0] - known[near[0]] / slope)


def _least(epsilon: float, delta: float, rate: float) -> float:
    """The noise multiplier that a single release over a Poisson sample needs, exactly: the divergence of the mixture is
    the rate times that of its Gaussian part, at a larger epsilon. At least 0.2, below which PLD takes minutes."""
    if delta >= rate:
        return 0.2
    inside = epsilon + log1p(-(1 - rate) * exp(-epsilon)) - log(rate)
    return max(0.2, gaussian_multiplier(inside, delta / rate))


def _check_agreement(pld: float, rdp: float, times: int, what: str) -> None:
    """Raises :class:`AccountingError` if PLD, which is tight but for its grid, exceeds RDP, which is an upper bound."""
    grid = 5 * PLD_GRID * sqrt(times)  # what rounding ``times`` losses to a grid can add at any delta in question
    if pld < inf and pld > 1.01 * rdp + grid:
        raise AccountingError(
            f"the accountants contradict each other for {what}: epsilon {pld:.4g} by PLD, {rdp:.4g} by RDP; expected "
            "at most the latter"
        )


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
