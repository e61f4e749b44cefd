"""All attacks, by the name that they have on the command line."""

from __future__ import annotations

from perfedrec.audit.poisoning.adversary import Adversary
from perfedrec.audit.poisoning.boosting import ExplicitBoosting
from perfedrec.audit.poisoning.fillers import PopularFillers, RandomFillers

ATTACKS: dict[str, type[Adversary]] = {each.name: each for each in (RandomFillers, PopularFillers, ExplicitBoosting)}
