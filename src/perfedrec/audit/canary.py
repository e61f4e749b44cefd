"""An empirical lower bound on epsilon, from canaries that are sent through the mechanism.

Each canary is a client that sends as much as the bound allows, on a row of its own, so that one sum holds as many
independent trials as there are canaries (similar to Steinke, Nasr and Jagielski, NeurIPS 2023). Half of the canaries
are used to choose the threshold that separates "took part" from "did not". The other half are counted, and
Clopper-Pearson intervals bound the two error rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, norm

from perfedrec.core.aggregate import from_fixed, reduce
from perfedrec.core.keys import Key
from perfedrec.core.types import Update
from perfedrec.privacy.ledger import Ledger, Release, account
from perfedrec.privacy.protection import Protection

CONFIDENCE = 0.95
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """A claimed epsilon and what canaries show at least: ``lower`` for any mechanism, ``lower_gaussian`` for normal
    noise (``None`` for other noise). ``failed``: a lower bound is above the claim."""

    what: str
    claim: float
    delta: float
    lower: float
    lower_gaussian: float | None
    trials: int

    @property
    def failed(self) -> bool:
        return max(self.lower, self.lower_gaussian or 0.0) > self.claim


def bounds(protection: Protection, releases: Sequence[Release], trials: int, key: Key) -> list[Bound]:
    """Lower bounds for every claim against the coordinator that a run with these releases makes."""
    found, settings = [], protection.settings
    if settings.clip is not None and settings.norm == "coordinate" and settings.noise_scale:
        inside, outside = (_coordinate(protection, sign, trials, key.fold("coordinate", sign)) for sign in (1, 0))
        claim = 2 * settings.clip / settings.noise_scale
        found.append(_bound("one coordinate of one upload", claim, 0.0, inside, outside, gaussian=False))
    claim_ = Ledger(releases, settings.delta).epsilon("coordinator")
    accounted = [each for each in releases if each.participations and each.guarantee.law is not None]
    if claim_.value is not None and accounted:
        sides = [
            np.sum([_statistic(protection, each, sign, trials, key) for each in accounted], axis=0) for sign in (1, 0)
        ]
        gaussian = all(each.guarantee.law == "gaussian" for each in accounted)
        what = "all releases, against the coordinator"
        found.append(_bound(what, claim_.value, settings.delta, sides[0], sides[1], gaussian))
    return found


def _statistic(protection: Protection, release: Release, sign: int, trials: int, key: Key) -> Numbers:
    """[trials] the attacker's statistic: each canary's own number divided by the noise variance, summed over its
    participations."""
    phase = protection.phase_of(release.name)
    bound, total = protection.bound(phase) or 1.0, np.zeros(trials)
    scale = release.guarantee.multiplier
    for number in range(release.participations):
        own = key.fold(release.name, number).fold("in" if sign else "out")
        total += _canaries(protection, phase, sign, trials, bound, own) / bound / scale**2
    return total


def _canaries(protection: Protection, phase: str, sign: int, trials: int, bound: float, key: Key) -> Numbers:
    """[trials] each canary's number as the coordinator receives it. ``sign`` 1: the canaries take part; 0: they send
    nothing (or, if single uploads are seen, the opposite)."""
    every = torch.arange(trials)
    value = 100.0 * bound * (sign if protection.secure else 2 * sign - 1)
    change = torch.full((trials, 1), value)
    ones, zeros = torch.ones(trials), torch.zeros_like(every)
    if protection.secure:
        upload = protection.clip_update(phase, Update(every, zeros, ones, every, every, change))
        total = protection.add_noise(phase, reduce(upload, trials, 1), trials, key)
        return from_fixed(total.sums).double().squeeze(1).numpy()
    upload = protection.clip_update(phase, Update(every, zeros, ones, every, zeros, change))
    seen = protection.as_seen(phase, upload, 1, key)
    return seen.double().reshape(-1).numpy() / 2  # uploads are 2 bounds apart


def _coordinate(protection: Protection, sign: int, trials: int, key: Key) -> Numbers:
    """[trials] one coordinate of one upload with per-coordinate noise, at the upper (``sign`` 1) or lower (0) clip."""
    values = torch.full((trials, 1), 100.0 * (2 * sign - 1))
    return protection.protect(values, key.spread(torch.arange(trials))).double().squeeze(1).numpy()


def _bound(what: str, claim: float, delta: float, inside: Numbers, outside: Numbers, gaussian: bool) -> Bound:
    """The lower bounds from the statistics ``inside`` and ``outside`` [trials] of canaries that took part and that did
    not."""
    half = inside.size // 2
    threshold = _threshold(inside[:half], outside[:half], delta)
    lower = _epsilon(inside[half:] > threshold, outside[half:] > threshold, delta)
    normal = None
    if gaussian:
        middle = (np.median(inside[:half]) + np.median(outside[:half])) / 2
        hit, alarm = _rates(inside[half:] > middle, outside[half:] > middle)
        shift = float(norm.ppf(hit) - norm.ppf(alarm))
        normal = _gaussian_epsilon(shift, delta)
    return Bound(what, claim, delta, lower, normal, inside.size)


def _threshold(inside: Numbers, outside: Numbers, delta: float) -> float:
    """The threshold with the largest bound on these trials."""
    candidates = np.quantile(outside, 1 - np.geomspace(0.5, 4 / outside.size, 60))
    return float(max(candidates, key=lambda at: _epsilon(inside > at, outside > at, delta)))


def _rates(hits: NDArray[np.bool_], alarms: NDArray[np.bool_]) -> tuple[float, float]:
    """The lowest hit rate and the highest false-alarm rate that the counts allow (Clopper-Pearson)."""
    tail = (1 - CONFIDENCE) / 2
    n, k, f = hits.size, int(hits.sum()), int(alarms.sum())
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, f + 1, n - f)) if f < n else 1.0
    return low, high


def _epsilon(hits: NDArray[np.bool_], alarms: NDArray[np.bool_], delta: float) -> float:
    """``ln((TPR - delta) / FPR)``, which is at most epsilon for every (epsilon, delta)-DP mechanism."""
    low, high = _rates(hits, alarms)
    return max(0.0, log((low - delta) / high)) if low > delta else 0.0


def _gaussian_epsilon(shift: float, delta: float) -> float:
    """The epsilon of two normal distributions ``shift`` standard deviations apart."""
    if shift <= 0:
        return 0.0
    from dp_accounting import GaussianDpEvent

    return account(GaussianDpEvent(1 / shift), delta)
