"""The bytes that nodes send and receive in a round are those that the simulator counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message
from tests.parity.federation import N_USERS, PROTECTED, SEED, SERVICE, SINGLE, UNEQUAL, Twins, settings
from tests.parity.test_rounds import SPECTRAL, SUMS

from perfedrec.runs import config
from perfedrec.runs.config import open_data
from perfedrec.runs.training import train
from perfedrec.runtimes.flower import secagg
from perfedrec.runtimes.flower.codec import array_bytes, unpack
from perfedrec.runtimes.round import play_round

NOISE = {"degrees": 0.1, "spectral": 0.1, "join": 0.1, "training": 0.1}
DENSE = {"aggregation": "dense", "norm": "l2", "clip": 0.5, "noise": NOISE}
HEADER = 128
"""Bytes of numpy's header of an array."""

WORLDS: dict[str, dict[str, Any]] = {
    "clear": {"pretraining": {"kind": "spectral"}},
    "clear, protected": {"privacy": PROTECTED, "client": {"loss": "softmax", "n_negatives": 9}},
    "spectral": SPECTRAL,
    "attributes": {"model": {"attributes": True}},
    "secure": {"pretraining": SUMS, "privacy": {"aggregation": "secure", "norm": "l2", "clip": 0.5}},
    "dense, with noise": {"pretraining": SUMS, "privacy": DENSE},
}
BOUND = {"attributes": 1e-5, "dense, with noise": torch.inf}
"""How far nodes may be from the simulator: their networks round differently, and each adds its own noise."""


def sent(twins: Twins, up: bool) -> tuple[int, int]:
    """Bytes of the arrays that nodes sent or received, and those of headers among them."""
    contents = [each.message.content for each in twins.grid.sent if each.up == up]
    arrays = sum(len(record) for content in contents for record in content.array_records.values())
    return sum(array_bytes(content) for content in contents), HEADER * arrays


def names(twins: Twins) -> int:
    """Bytes of the whole numbers that nodes received: their users' identities and clusters, and the items' tokens,
    which a coordinator with a service on another node does not have."""
    contents = [each.message.content for each in twins.grid.sent if not each.up]
    tensors = [
        unpack(content.array_records[name]) for content in contents for name in ("own", "shared") if name in content
    ]
    return sum(4 * each.numel() for found in tensors for each in found.values() if each.dtype == torch.int64)


@pytest.mark.parametrize(
    ("world", "sizes"), [*((world, UNEQUAL) for world in WORLDS), ("clear", SINGLE), ("secure", SINGLE)]
)
def test_bytes_of_nodes_are_those_that_the_simulator_counts(
    world: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secagg, "MOST_PEERS", 4)  # Shamir's shares take most of the time
    twins = Twins(settings(**WORLDS[world]), sizes, attributes=world == "attributes")
    nodes = torch.empty(N_USERS, dtype=torch.int64)
    for node, users in twins.hosts.items():
        nodes[users] = node
    for _ in range(len(twins.algorithm.phases) + 3):
        twins.simulated, counted = play_round(
            twins.algorithm, twins.simulated, twins.population, SEED, block_size=3, nodes=nodes
        )
        twins.grid.sent.clear()
        report = twins.play()
        assert twins.difference() <= BOUND.get(world, 0.0)
        measured, headers = sent(twins, up=True)
        assert measured == report.bytes_up == counted.bytes_up + headers
        measured, headers = sent(twins, up=False)
        assert measured == report.bytes_down == counted.bytes_down + headers + names(twins)
    assert twins.flower.clusters.centroids is not None  # and clusters' tables were part of it


def test_what_a_service_apart_sends_and_receives_is_not_counted_as_the_nodes() -> None:
    up, service = Counter[int](), 0

    def weigh(reply: Message) -> Message:
        up[reply.metadata.src_node_id] += array_bytes(reply.content)
        return reply

    twins = Twins(settings(**WORLDS["clear"]), UNEQUAL, weigh, apart=True)
    for _ in range(len(twins.algorithm.phases) + 2):
        twins.grid.sent.clear()
        up.clear()
        report = twins.play()
        service += up[SERVICE]
        assert report.bytes_up == up.total() - up[SERVICE]
        assert report.bytes_up_max == max(size for node, size in up.items() if node != SERVICE)
        received = (each for each in twins.grid.sent if not each.up and each.node != SERVICE)
        assert report.bytes_down == sum(array_bytes(each.message.content) for each in received)
    assert service > 0


def test_an_option_counts_bytes_by_nodes_and_changes_nothing_else() -> None:
    def played(users_per_node: int) -> tuple[Any, list[Any]]:
        overrides = [
            "data.path=synthetic:users=40,items=50,interactions_per_user=8,clusters=2",
            "model.embedding_dim=8",
            "run.rounds=4",
        ]
        given = config.load("recommended", None, [*overrides, f"run.users_per_node={users_per_node}"])
        result = train(given.build(), open_data(given.data), given.run, config=given)
        return result.recommender.state.items, [each.report for each in result.history]  # type: ignore[attr-defined]

    (alone, by_user), (together, by_node) = played(1), played(10)
    assert torch.equal(alone, together)
    for user, node in zip(by_user, by_node, strict=True):
        nothing = {"bytes_up": 0, "bytes_up_max": 0, "bytes_down": 0}
        assert replace(user, **nothing) == replace(node, **nothing)
        assert user.bytes_up != node.bytes_up
        assert user.bytes_up_max < node.bytes_up_max
        assert user.bytes_down > 3 * node.bytes_down
