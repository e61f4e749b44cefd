"""Block size and thread count change no bit, with all options on."""

from typing import Any

import pytest
import torch
from tests.methods.federated.toys import World, assert_same, world

from perfedrec.core.records import copied

PROTECTED: dict[str, Any] = {
    "privacy__clip": 0.1,
    "privacy__noise_scale": 0.02,
    "privacy__pseudo_items": 0.3,
    "privacy__masking": 0.2,
    "personal__learned": True,
    "server__weighting": "interactions",
}
KINDS: dict[str, dict[str, Any]] = {
    "bpr": {"pretraining__kind": "contrastive", "client__local_steps": 2, "client__l2": 0.1},
    "softmax": {"client__loss": "softmax", "client__similarity": "cosine", "server__averaging": 0.9},
    "spectral": {
        "pretraining__kind": "spectral",
        "pretraining__cluster_passes": 1,
        "model__encoder": "spectral",
        "client__leave_one_out": True,
        "server__optimizer": "fedyogi",
    },
    "passes of clients": {
        "pretraining__kind": "spectral",
        "pretraining__at": "clients",
        "pretraining__user_exponent": 0.25,
        "pretraining__item_exponent": 0.35,
        "pretraining__cluster_passes": 1,
    },
}


def played(kind: str, **options: Any) -> World:
    here = world(**PROTECTED, **KINDS[kind])
    here.play(len(here.algorithm.phases) + 3, **options)
    assert here.state.clusters.labels is not None
    return here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 7])
def test_block_size_changes_neither_server_state_nor_client_states(kind: str, block_size: int) -> None:
    whole, blocks = played(kind), played(kind, block_size=block_size)
    assert_same(whole.population.client_state, blocks.population.client_state)
    assert_same(whole.state, blocks.state)


@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_changes_neither_server_state_nor_client_states(kind: str) -> None:
    one = played(kind)
    torch.set_num_threads(2)
    try:
        two = played(kind)
    finally:
        torch.set_num_threads(1)
    assert_same(one.population.client_state, two.population.client_state)
    assert_same(one.state, two.state)


def test_a_run_continues_from_a_state_as_if_uninterrupted() -> None:
    """There is no generator state: a round is a function of seed, number, server state and client states."""
    straight, halted = played("bpr"), played("bpr")
    straight.play(2)
    halted.state, halted.population.client_state = copied(halted.state), copied(halted.population.client_state)
    halted.play(2)
    assert_same(straight.state, halted.state)
    assert_same(straight.population.client_state, halted.population.client_state)
