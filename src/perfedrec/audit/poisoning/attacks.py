"""All attacks, by the name that they have on the command line."""

from __future__ import annotations

from perfedrec.audit.poisoning.adversary import Adversary
from perfedrec.audit.poisoning.boosting import ExplicitBoosting, FedRecAttack, PipAttack
from perfedrec.audit.poisoning.collusion import Collusion
from perfedrec.audit.poisoning.fillers import PopularFillers, RandomFillers
from perfedrec.audit.poisoning.mining import HidAttack, PieckIPE, PieckUEA, PoisonFRS
from perfedrec.audit.poisoning.untargeted import ClusterAttack, SignFlipping, Spattack, SpattackO

ATTACKS: dict[str, type[Adversary]] = {
    each.name: each
    for each in (
        RandomFillers,
        PopularFillers,
        ExplicitBoosting,
        PipAttack,
        FedRecAttack,
        PieckIPE,
        PieckUEA,
        PoisonFRS,
        HidAttack,
        Collusion,
        SignFlipping,
        Spattack,
        SpattackO,
        ClusterAttack,
    )
}
