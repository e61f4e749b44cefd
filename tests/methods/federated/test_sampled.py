"""Pre-training that asks a sample of the users, as with many users."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from perfedrec import configure
from perfedrec.core.records import flatten
from perfedrec.data import Dataset, load
from perfedrec.methods.federated.state import Service
from perfedrec.runtimes.simulator import Simulator

SMALL = ["model.embedding_dim=8", "selection.n_clients_per_round=32", "clusters.n_clusters=3"]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=400,items=150,clusters=3,interactions_per_user=15")


def pretrained(dataset: Dataset, clients: int, rounds: int = 0, block_size: int = 1024) -> Simulator[Any, Any, Any]:
    algorithm = configure("recommended", overrides=[*SMALL, f"pretraining.clients={clients}"]).build()
    simulator: Simulator[Any, Any, Any] = Simulator(algorithm, dataset, seed=1, device="cpu", block_size=block_size)
    for _ in range(simulator.n_phases + rounds):
        simulator.play()
    return simulator


def starts(simulator: Simulator[Any, Any, Any]) -> torch.Tensor:
    """The first vectors of all users."""
    broadcast, rows, client_state = simulator.recommender().given(simulator.population.everyone())
    placed = simulator.algorithm.placed(broadcast, rows, client_state)  # type: ignore[attr-defined]
    vectors: torch.Tensor = simulator.algorithm.private_of(placed, client_state)  # type: ignore[attr-defined]
    return vectors


def test_where_all_fit_into_the_sample_nothing_changes(dataset: Dataset) -> None:
    for clients in (0, 400):
        simulator = pretrained(dataset, clients)
        assert simulator.state.service.users is None
        assert simulator.state.service.near is not None
        assert simulator.algorithm.remarks(400) == []


def test_the_service_knows_the_sample_alone(dataset: Dataset) -> None:
    simulator = pretrained(dataset, 100)
    service = simulator.state.service
    assert service.users.numel() == 100
    assert torch.equal(service.users, service.users.unique())
    assert service.share == 0.25
    tensors = flatten(simulator.state)[0]
    assert all(tensor.shape[0] not in (400, 401) for tensor in tensors.values())  # nothing grows with all users
    assert [line[:47] for line in simulator.algorithm.remarks(400)] == [
        "pre-training asks a sample of 100 of 400 client"
    ]


def test_what_it_publishes_is_scaled_to_all_users(dataset: Dataset) -> None:
    """From a quarter of the users: sums of all users, and first vectors, are expected to be as long as from all. Wrong
    scales would be off by 2 or 4."""
    whole, part = pretrained(dataset, 0), pretrained(dataset, 100)
    ratio = part.state.neighbours.norm() / whole.state.neighbours.norm()
    assert float(ratio) == pytest.approx(1, abs=0.15)
    lengths = starts(part).norm() / starts(whole).norm()
    assert float(lengths) == pytest.approx(1, abs=0.3)
    alike = torch.nn.functional.cosine_similarity(starts(part), starts(part).roll(1, 0))
    assert float(alike.abs().mean()) < 0.9  # each user has a vector of its own


def test_blocks_change_nothing_and_rounds_train(dataset: Dataset) -> None:
    one, other = pretrained(dataset, 100, rounds=3), pretrained(dataset, 100, rounds=3, block_size=7)
    found, wanted = flatten(one.state)[0], flatten(other.state)[0]
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    groups = one.algorithm.groups(one.state, torch.arange(5))
    assert groups.tolist() == [-1] * 5  # clients choose their cluster
    assert one.state.service.reports.any(2).all()


def test_places_of_users_in_the_tables_of_the_service() -> None:
    service = Service(torch.zeros(3, 1, 2), users=torch.tensor([2, 5, 9]))
    assert service.places(torch.tensor([9, 1, 5, 10])).tolist() == [2, -1, 1, -1]
    assert Service(torch.zeros(0, 1, 2), users=torch.zeros(0, dtype=torch.int64)).places(
        torch.tensor([4])
    ).tolist() == [-1]
    assert Service(torch.zeros(3, 1, 2)).places(torch.tensor([1])).tolist() == [1]


def test_users_without_a_list_are_ranked_last(dataset: Dataset) -> None:
    """In the turn of beta each of them needs a product for each exponent; the others need none."""
    simulator = pretrained(dataset, 0)
    state, users = simulator.state, torch.arange(400)
    without = torch.tensor([7, 300])
    near = state.service.near.clone()
    near[without] = -1
    state = replace(state, service=replace(state.service, near=near))
    alike = simulator.algorithm.ranked_alike(state, users)
    assert alike[without].min() > alike[(users != 7) & (users != 300)].max()
    simulator.state = state
    assert set(simulator.recommender().everyone()[-2:].tolist()) == {7, 300}
