"""The minimum protection that the owner of a node requires of every coordinator, checked option by option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.privacy.ledger import Ledger
from perfedrec.privacy.settings import PrivacySettings


@dataclass(frozen=True)
class Policy:
    """Requires at least the protection ``privacy`` of a ``profile``, and at most ``participations`` of a user in a run.

    It does not ask for what a node cannot check: how cohorts are drawn, and who else is in a sum.
    """

    profile: str
    privacy: PrivacySettings
    participations: int | None = None

    def objection(self, algorithm: AnyAlgorithm) -> str | None:
        """The first option of an ``algorithm`` that protects less, in a few words; ``None`` if there is no
        objection."""
        if self.privacy.aggregation == "sparse" and algorithm.protection.secure:
            return None  # hides uploads better than decoys, masking and noise do
        return next(self._objections(algorithm), None)

    def objection_to(self, phase: str, algorithm: AnyAlgorithm) -> str | None:
        """If the policy requires noise on everything that is released: the objection to a ``phase`` without noise, else
        ``None``."""
        if self.privacy.epsilon is None or algorithm.protection.multiplier(phase):
            return None
        return f"there is no noise in phase {phase}"

    def _objections(self, algorithm: AnyAlgorithm) -> Iterator[str]:
        own, asked = self.privacy, algorithm.settings.privacy
        cap = algorithm.settings.selection.max_participations
        if asked.aggregation != own.aggregation:
            yield f"privacy.aggregation is {asked.aggregation}, not {own.aggregation}"
        if asked.norm != own.norm:
            yield f"privacy.norm is {asked.norm}, not {own.norm}"
        if own.clip is not None and (asked.clip is None or asked.clip > own.clip):
            yield f"privacy.clip is {_shown(asked.clip)}, above {own.clip:g}"
        if own.low_rank and not 0 < asked.rank <= own.rank:
            yield f"privacy.rank is {asked.rank}, not from 1 to {own.rank}"
        for name in ("min_contributors", "min_clients"):
            if own.low_rank and getattr(asked, name) < getattr(own, name):
                yield f"privacy.{name} is {getattr(asked, name)}, below {getattr(own, name)}"
        if own.low_rank and (size := algorithm.protection.group_size):
            yield f"defence.group_size = {size} opens sums of few clients by item, and privacy.rank here allows none"
        if asked.noise_scale < own.noise_scale:
            yield f"privacy.noise_scale is {asked.noise_scale:g}, below {own.noise_scale:g}"
        flips = asked.randomised_response and 1 / (1 + exp(asked.randomised_response))  # share of items that change
        for name in ("pseudo_items", "masking"):
            share, least = (getattr(asked, name) if flips is None else flips), getattr(own, name)
            if share < least:
                yield f"privacy.{name if flips is None else 'randomised_response'} changes {share:.3g}, below {least:g}"
        if self.participations is not None and (cap is None or cap > self.participations):
            yield f"selection.max_participations is {_shown(cap)}, above {self.participations}"
        if own.noisy and asked.noise_source != "opendp":
            yield f"privacy.noise_source is {asked.noise_source}, not opendp"
        if own.epsilon is not None:
            # The same ledger that the node keeps: each phase before training once, and training as often as the limit
            # allows, or never if it has no noise, because a node with this policy refuses such a phase.
            releases = algorithm.releases(cap if asked.noise.training else 0, 1)
            epsilon = Ledger(releases, own.delta).epsilon("coordinator")
            if epsilon.value is None or epsilon.value > own.epsilon * (1 + 1e-6):
                yield f"epsilon against the coordinator is {epsilon}, above {own.epsilon:g}"


def _shown(value: float | None) -> str:
    return "off" if value is None else f"{value:g}"
