"""What each mechanism guarantees, and what several of them guarantee together.

A guarantee is that of ONE release, to one user, when the user's data are added or removed. Where there is none, it says
why; nothing is ever left blank. The functions that do the work are in :mod:`perfedrec.privacy.labels` and
:mod:`perfedrec.privacy.protection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Literal, Protocol

from perfedrec.privacy.noise import Law

Norm = Literal["coordinate", "l1", "l2"]


@dataclass(frozen=True)
class Sensitivity:
    """How far one user's data can move what is released: ``bound`` in a norm; infinite where nothing bounds it."""

    norm: Norm
    bound: float


@dataclass(frozen=True)
class Guarantee:
    """What one release promises one user.

    ``law`` and ``multiplier``: the noise, and its scale over the sensitivity (add or remove), from which an accountant
    derives epsilon; ``None`` where there is no guarantee, for the ``reason`` given. ``narrower``: statements that hold
    for less than a user.
    """

    law: Law | None = None
    multiplier: float = 0.0
    reason: str = ""
    narrower: tuple[str, ...] = ()


class Mechanism(Protocol):
    """A step of the protection: what it is, how far one user can move what it lets through, what it guarantees."""

    @property
    def name(self) -> str: ...

    @property
    def sensitivity(self) -> Sensitivity: ...

    @property
    def guarantee(self) -> Guarantee: ...


UNBOUNDED = Sensitivity("l2", float("inf"))


@dataclass(frozen=True)
class CoordinateLaplace:
    """Clip each coordinate, add Laplace noise to each (the paper's mechanism)."""

    clip: float
    scale: float
    name: str = "Laplace noise per coordinate"

    @property
    def sensitivity(self) -> Sensitivity:
        return Sensitivity("coordinate", 2 * self.clip)

    @property
    def guarantee(self) -> Guarantee:
        if not self.scale:
            return Guarantee(reason="clipping alone hides nothing")
        return Guarantee(
            reason="the bound holds for one coordinate, and an upload has thousands",
            narrower=(f"per coordinate: epsilon {2 * self.clip / self.scale:.3g}",),
        )


@dataclass(frozen=True)
class JointNoise:
    """Clip the norm of everything a client sends in a round, add noise to every number.

    ``local``: each upload carries all the noise, so that the sensitivity is that of one upload replaced by another,
    ``2 clip``; otherwise the sum carries it, in shares, and the sensitivity is one upload's, ``clip``.
    """

    norm: Literal["l1", "l2"]
    clip: float
    multiplier: float
    local: bool

    @property
    def name(self) -> str:
        law = "Gaussian" if self.norm == "l2" else "Laplace"
        return f"{law} noise on the joint {self.norm.upper()} norm, {'each upload' if self.local else 'the sum'}"

    @property
    def sensitivity(self) -> Sensitivity:
        return Sensitivity(self.norm, 2 * self.clip if self.local else self.clip)

    @property
    def guarantee(self) -> Guarantee:
        if not self.multiplier:
            return Guarantee(reason="clipping alone hides nothing")
        scale = self.multiplier * self.clip / self.sensitivity.bound
        return Guarantee("gaussian" if self.norm == "l2" else "laplace", scale)


@dataclass(frozen=True)
class PseudoItems:
    """Random items labelled as interacted."""

    share: float
    sticky: bool

    @property
    def name(self) -> str:
        return f"{self.share:.0%} {'sticky' if self.sticky else 'fresh'} decoys"

    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        held = "they hold, but a real item is never denied" if self.sticky else "fresh ones are averaged away"
        return Guarantee(reason=f"decoys give deniability: {held}")


@dataclass(frozen=True)
class Masking:
    """Real items left out."""

    share: float
    sticky: bool

    @property
    def name(self) -> str:
        return f"{self.share:.0%} {'sticky' if self.sticky else 'fresh'} masked items"

    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        held = "one that never is a negative shows in the end" if self.sticky else "the next one may show them"
        return Guarantee(reason=f"masking hides items in one upload, and {held}")


@dataclass(frozen=True)
class ItemResponse:
    """Symmetric randomised response on each item of the set: kept with p, set with 1 - p."""

    epsilon: float
    sticky: bool
    n_items: int | None = None

    @property
    def name(self) -> str:
        return f"randomised response, epsilon {self.epsilon:g} per item"

    sensitivity = Sensitivity("coordinate", 1.0)

    @property
    def keeps(self) -> float:
        """p, the probability that an item is kept."""
        return 1 / (1 + exp(-self.epsilon))

    @property
    def guarantee(self) -> Guarantee:
        p, r = self.keeps, 1 - self.keeps
        per_item = log(max(p / r, (1 - r) / (1 - p)))
        times = "" if self.sticky else " and participation"
        return Guarantee(
            reason="it protects the labels' items, one by one; a whole set of k items has 2 k times that",
            narrower=(f"per item{times}: epsilon {per_item:.3g}",),
        )


@dataclass(frozen=True)
class SparseUpload:
    """Only touched rows are sent."""

    name: str = "sparse upload"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="the coordinator sees which rows a client touched")


@dataclass(frozen=True)
class DenseUpload:
    """A row for every item is sent, each client's to the coordinator."""

    name: str = "dense upload"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="the coordinator sees each upload")


@dataclass(frozen=True)
class SecureAggregation:
    """The coordinator learns the cohort's sum and nothing else of an upload."""

    name: str = "secure aggregation"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="secure aggregation hides one upload among the cohort, and a sum still tells of it")


@dataclass(frozen=True)
class Unprotected:
    """Nothing at all is done."""

    name: str = "no mechanism"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="nothing is clipped and no noise is added")


def compose(mechanisms: Sequence[Mechanism]) -> Guarantee:
    """What mechanisms guarantee that are applied to one release, one after the other.

    Noise on a bounded release gives a guarantee that nothing before or after it takes away, except an upload that shows
    the touched rows beside it. Two noises on one release: the stronger one counts.
    """
    guarantees = [mechanism.guarantee for mechanism in mechanisms]
    narrower = tuple(text for each in guarantees for text in each.narrower)
    reasons = [each.reason for each in guarantees if each.reason]
    accounted = [each for each in guarantees if each.law is not None]
    exposed = any(isinstance(mechanism, SparseUpload) for mechanism in mechanisms)
    if accounted and not exposed:
        best = max(accounted, key=lambda each: each.multiplier)
        return Guarantee(best.law, best.multiplier, narrower=narrower)
    return Guarantee(reason="; ".join(reasons) or Unprotected().guarantee.reason, narrower=narrower)
