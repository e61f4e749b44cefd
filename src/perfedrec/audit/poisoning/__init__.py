"""Malicious clients: attacks on the training of a federated method, in simulation."""

from perfedrec.audit.poisoning.attacks import ATTACKS
from perfedrec.audit.poisoning.campaign import attack
from perfedrec.audit.poisoning.exposure import Exposure
from perfedrec.audit.poisoning.play import Scenario, poisoned
from perfedrec.audit.poisoning.record import Attacked, read_attacks

__all__ = ["ATTACKS", "Attacked", "Exposure", "Scenario", "attack", "poisoned", "read_attacks"]
