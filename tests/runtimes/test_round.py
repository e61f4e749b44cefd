"""A round: equal for all block sizes and thread counts; drop-outs; centralised and spectral references."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from perfedrec import configure, synthetic
from perfedrec.core.keys import Key
from perfedrec.core.records import flatten
from perfedrec.data import split
from perfedrec.methods.federated.local import LocalResult, LocalTask
from perfedrec.runtimes.simulator import Simulator

SMALL = ["model.embedding_dim=8", "selection.n_clients_per_round=50", "clusters.start=1", "clusters.every=1"]


def play(preset: str, rounds: int, *more: str, **options: Any) -> Simulator:
    interactions, _ = synthetic(users=120, items=200, seed=3)
    simulator = Simulator(configure(preset, overrides=[*SMALL, *more]).build(), split(interactions), seed=5, **options)
    for _ in range(rounds):
        simulator.play()
    return simulator


def tensors(simulator: Simulator) -> dict[str, torch.Tensor]:
    client_state = {f"memory.{name}": value for name, value in flatten(simulator.population.client_state)[0].items()}
    return flatten(simulator.state)[0] | client_state


def assert_same(one: Simulator, other: Simulator) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_block_size_changes_no_bit(preset: str) -> None:
    whole = play(preset, 8)
    assert_same(whole, play(preset, 8, block_size=7))
    assert_same(whole, play(preset, 8, block_size=1))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_thread_count_changes_no_bit(preset: str, two_threads: None) -> None:
    two = play(preset, 8, threads=2)
    torch.set_num_threads(1)
    assert_same(two, play(preset, 8))


@pytest.mark.parametrize(("given", "expected"), [(0, 1), (2, 2)])
def test_a_small_round_is_played_on_one_thread_unless_a_number_is_given(
    given: int, expected: int, two_threads: None
) -> None:
    simulator, seen = play("recommended", 0, threads=given), set()
    algorithm: Any = simulator.algorithm
    steps = algorithm.local_steps

    def counted(task: LocalTask) -> LocalResult:
        seen.add(torch.get_num_threads())
        return steps(task)

    algorithm.local_steps = counted
    for _ in range(len(algorithm.phases) + 2):
        simulator.play()
    assert seen == {expected}
    assert torch.get_num_threads() == 2


def test_another_seed_gives_another_run() -> None:
    one = play("paper", 4)
    other = play("paper", 4)
    assert_same(one, other)
    other.seed = 6
    one.play()
    other.play()
    assert not torch.equal(one.state.items, other.state.items)


def test_a_client_that_drops_out_keeps_its_state() -> None:
    simulator = play("paper", 1, dropout_rate=0.5)
    before = simulator.population.client_state.steps.clone()
    cohort = simulator.algorithm.plan(simulator.state, Key(5).fold("round", 1).fold("plan")).cohort
    report = simulator.play()
    trained = simulator.population.client_state.steps > before
    assert report.cohort == 50
    assert 0 < report.clients == int(trained.sum()) < 50
    assert set(trained.nonzero().squeeze(1).tolist()) < set(cohort.tolist())


def test_fedavg_with_everybody_is_one_centralised_step() -> None:
    options = ["pretraining.kind=none", "model.neighbours=false", "clusters.n_clusters=0", "server.optimizer=fedavg"]
    options += ["server.learning_rate=1", "client.local_steps=1", "client.learning_rate=0.5", "privacy.clip=off"]
    options += ["privacy.noise_scale=0", "privacy.pseudo_items=0", "privacy.masking=0", "server.averaging=0"]
    options += ["selection.n_clients_per_round=120"]
    simulator = play("paper", 0, *options)
    state, population = simulator.state, simulator.population
    start, degrees = state.items.clone().requires_grad_(), state.degrees.clamp(min=1)
    rows, _ = population.rows(population.everyone())
    update, _ = simulator.algorithm.client(
        "train",
        simulator.algorithm.broadcast(state, rows.users),
        rows,
        population.client_state,
        Key(5).fold("round", 0).fold("client"),
    )
    loss = torch.zeros(())
    for user in range(rows.n_users):
        own = rows.items[rows.segments == user]
        negatives = update.items[update.segments == user][own.numel() :]
        weights = (own.numel() * degrees[own]).rsqrt()
        vector = (population.client_state.private[user] + weights @ start[own]) / 2
        loss = loss - torch.nn.functional.logsigmoid(start[own] @ vector - start[negatives] @ vector).sum()
    (gradient,) = torch.autograd.grad(loss / rows.n_users, start)
    expected = (start - 0.5 * gradient).detach()
    simulator.play()
    torch.testing.assert_close(simulator.state.items, expected, rtol=1e-4, atol=1e-6)


def test_spectral_pretraining_finds_the_leading_directions_of_pairs_that_three_users_have() -> None:
    simulator = play("recommended", 1, "model.embedding_dim=3", "pretraining.passes=400", "model.encoder=spectral")
    population = simulator.population
    rows, _ = population.rows(population.everyone())
    matrix = np.zeros((120, 200))
    matrix[rows.segments.numpy(), rows.items.numpy()] = 1
    matrix /= np.sqrt(matrix.sum(1, keepdims=True) * np.maximum(matrix.sum(0, keepdims=True), 1))
    known = (matrix > 0).astype(int)
    gram = matrix.T @ matrix * (known.T @ known >= 3)
    basis = simulator.state.items.numpy().astype(np.float64)
    best = np.sort(np.linalg.eigvalsh(gram))[-3:].sum()
    assert best * 0.9995 < np.trace(basis.T @ gram @ basis) <= best * (1 + 1e-6)


SWITCHES = [
    "clusters.n_clusters=0",
    "clusters.learning_rate=0.9",
    "clusters.proportional=false",
    "model.neighbours=false",
    "model.refresh_every=2",
    "model.n_layers=1",
    "model.n_layers=3",
    "pretraining.kind=none",
    "pretraining.kind=spectral",
    "pretraining.node_dropout=0",
    "pretraining.edge_perturbation=false",
    "pretraining.noise=0",
    "pretraining.steps=2",
    "personal.learned=true",
    "privacy.clip=0.01",
    "privacy.noise_scale=0",
    "privacy.pseudo_items=0",
    "privacy.masking=0",
    "client.loss=softmax",
    "client.local_steps=1",
    "client.l2=0.5",
    "client.leave_one_out=true",
    "client.similarity=cosine",
    "server.optimizer=fedavg",
    "server.optimizer=fedyogi",
    "server.optimizer=fedadagrad",
    "server.averaging=0",
    "server.weighting=interactions",
]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_the_scores(switch: str) -> None:
    scores = []
    for overrides in ((), (switch,)):
        simulator = play("paper", 6, *overrides)
        scores.append(simulator.recommender().scores(simulator.population.everyone()))
    assert not torch.allclose(scores[0], scores[1])


@pytest.mark.parametrize("name", ["local", "cluster", "global"])
def test_each_of_the_three_models_has_its_own_scores(name: str) -> None:
    simulator = play("paper", 8)
    everyone = simulator.population.everyone()
    parts = simulator.recommender().explain(everyone)
    rows, positions = simulator.population.rows(everyone)
    whole = simulator.algorithm.scores(
        simulator.algorithm.broadcast(simulator.recommender().state, everyone),
        rows,
        simulator.population.load_client_states(everyone, positions),
    )
    torch.testing.assert_close(sum(parts.values()), whole, rtol=1e-4, atol=1e-5)
    for other in parts.keys() - {name}:
        assert not torch.allclose(parts[name], parts[other])
