"""Malicious clients: attacks on the training of a federated method, in simulation."""

from perfedrec.audit.poisoning.attacks import ATTACKS
from perfedrec.audit.poisoning.exposure import Exposure
from perfedrec.audit.poisoning.play import Scenario, poisoned

__all__ = ["ATTACKS", "Exposure", "Scenario", "poisoned"]
