"""What each mechanism guarantees, and what several of them guarantee together.

A guarantee is that of ONE release, for one user, when that user's data are added or removed. Where there is no
guarantee the reason is given; it is never left empty. The functions that apply the mechanisms are in
:mod:`perfedrec.privacy.labels` and :mod:`perfedrec.privacy.protection`.
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
    """How much one user's data can change what is released: at most ``bound`` in a norm; infinite without a bound."""

    norm: Norm
    bound: float


@dataclass(frozen=True)
class Guarantee:
    """What one release guarantees to one user.

    ``law`` and ``multiplier`` are the distribution of the noise and its scale divided by the sensitivity (add or
    remove), from which an accountant computes epsilon. ``law`` is ``None`` if there is no guarantee, for the given
    ``reason``. ``narrower`` are statements that hold for less than a whole user.
    """

    law: Law | None = None
    multiplier: float = 0.0
    reason: str = ""
    narrower: tuple[str, ...] = ()


class Mechanism(Protocol):
    """A step of the protection: its name, its sensitivity, and its guarantee."""

    @property
    def name(self) -> str: ...

    @property
    def sensitivity(self) -> Sensitivity: ...

    @property
    def guarantee(self) -> Guarantee: ...


UNBOUNDED = Sensitivity("l2", float("inf"))


@dataclass(frozen=True)
class CoordinateLaplace:
    """Clips each coordinate and adds Laplace noise to each (the paper's mechanism)."""

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
            reason="the bound holds for one coordinate, but an upload has thousands",
            narrower=(f"per coordinate: epsilon {2 * self.clip / self.scale:.3g}",),
        )


@dataclass(frozen=True)
class JointNoise:
    """Clips the norm of everything that a client sends in a round, and adds noise to every number.

    ``local``: each upload has the full noise, so that the sensitivity is that of one upload replaced by another,
    ``2 clip``. Otherwise the sum has the noise, of which each client adds a share, and the sensitivity is that of one
    upload, ``clip``.
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
    """Random items labelled as interacted (decoys)."""

    share: float
    sticky: bool

    @property
    def name(self) -> str:
        return f"{self.share:.0%} {'sticky' if self.sticky else 'fresh'} decoys"

    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        held = "sticky ones stay, but a real item is always shown" if self.sticky else "fresh ones average out"
        return Guarantee(reason=f"decoys give deniability: {held}")


@dataclass(frozen=True)
class Masking:
    """Real items that are left out."""

    share: float
    sticky: bool

    @property
    def name(self) -> str:
        return f"{self.share:.0%} {'sticky' if self.sticky else 'fresh'} masked items"

    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        held = "one that is never a negative is found over time" if self.sticky else "the next one may show them"
        return Guarantee(reason=f"masking hides items in one upload, but {held}")


@dataclass(frozen=True)
class ItemResponse:
    """Symmetric randomised response on each item of the set: reported truthfully with probability p."""

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
            reason="it protects single items of the labels; a whole set of k items has 2 k times this epsilon",
            narrower=(f"per item{times}: epsilon {per_item:.3g}",),
        )


@dataclass(frozen=True)
class SparseUpload:
    """Clients send only the rows that they touched."""

    name: str = "sparse upload"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="the coordinator sees which rows a client touched")


@dataclass(frozen=True)
class DenseUpload:
    """Each client sends the coordinator a row for every item."""

    name: str = "dense upload"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="the coordinator sees each upload")


@dataclass(frozen=True)
class SecureAggregation:
    """The coordinator learns the cohort's sum, and nothing else about an upload."""

    name: str = "secure aggregation"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(
            reason="secure aggregation hides one upload in the cohort's sum, but the sum still depends on it"
        )


@dataclass(frozen=True)
class RowClip:
    """Bounds what a client changes in one row (``defence.row_clip``). The number of rows has no bound."""

    clip: float
    name: str = "a bound on each row"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="clipping alone hides nothing")


@dataclass(frozen=True)
class Unprotected:
    """No mechanism is applied."""

    name: str = "no mechanism"
    sensitivity = UNBOUNDED

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(reason="nothing is clipped and no noise is added")


def compose(mechanisms: Sequence[Mechanism]) -> Guarantee:
    """The guarantee of mechanisms that are applied to the same release, one after the other.

    Noise on a bounded release gives a guarantee that no step before or after it removes, except an upload that also
    shows which rows were touched. If two steps add noise to one release, the stronger noise counts.
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
