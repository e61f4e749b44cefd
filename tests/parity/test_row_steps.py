"""The bank and the largest step of a row over messages: those of the simulator, uploads seen or secret."""

from __future__ import annotations

from typing import Any

import pytest
from tests.parity.federation import UNEQUAL, Twins, settings

BASIS = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "rank": 6, "min_clients": 4}


@pytest.mark.parametrize("privacy", [{}, BASIS], ids=["seen", "secret"])
def test_the_coordinator_of_nodes_keeps_the_same_bank(privacy: dict[str, Any]) -> None:
    options = settings(
        pretraining={"kind": "spectral", "cluster_passes": 0},
        privacy=privacy,
        defence={"sparse": 0.3, "row_step": 0.001},
    )
    twins = Twins(options, UNEQUAL)
    for _ in range(len(twins.algorithm.phases) + 4):
        twins.simulate()
        twins.play()
        assert twins.difference() <= 1e-5
    assert twins.flower.bank is not None
    assert bool(twins.flower.bank.any())
