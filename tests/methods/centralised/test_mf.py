"""The compiled epoch of MF against Adam of torch."""

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from perfedrec import load
from perfedrec.core.keys import Key
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised import mf
from perfedrec.methods.centralised.descent import BETAS, EPSILON
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mf import MF, MFSettings, later_steps
from perfedrec.methods.centralised.vectors import VectorMethod, Vectors, batches

pytest.importorskip("numba")


def training(text: str) -> Training:
    return Training.of(load(text), torch.device("cpu"))


def of_lists(lists: list[list[int]], n_items: int) -> Training:
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    items = torch.tensor([item for own in lists for item in own])
    return Training(block_rows(offsets, items, torch.arange(len(lists)))[0], n_items)


def by_torch(method: MF, state: Vectors, data: Training, epochs: range) -> tuple[Vectors, float]:
    """The epochs in float64, by autograd and torch's Adam, which moves all rows in all steps."""
    tensors = {each.name: getattr(state, each.name) for each in fields(state) if each.name != "steps"}
    state, loss = replace(state, **{name: each.double() for name, each in tensors.items()}), 0.0
    for epoch in epochs:
        state, loss = VectorMethod.epoch(method, state, data, Key(5).fold(epoch))
    return state, loss


def compiled(method: MF, state: Vectors, data: Training, epochs: range) -> tuple[Vectors, float]:
    loss = 0.0
    for epoch in epochs:
        state, loss = method.epoch(state, data, Key(5).fold(epoch))
    return state, loss


def same(one: Vectors, two: Vectors) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(one, each.name)), torch.as_tensor(getattr(two, each.name)))
        for each in fields(one)
    )


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1", {"batch_size": 32}),
        ("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1", {"batch_size": 4096, "l2": 0.1}),
        ("synthetic:users=300,items=20,clusters=2,interactions_per_user=5,seed=2", {"batch_size": 7, "l2": 0}),
        ("synthetic:users=40,items=300,clusters=2,interactions_per_user=4,seed=3", {"batch_size": 2}),
    ],
)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_an_epoch_is_that_of_torch(data: str, options: dict[str, float], dim: int) -> None:
    given = training(data)
    method = MF(MFSettings(embedding_dim=dim, learning_rate=0.01, **options))
    first = method.init(given, Key(0))
    found, loss = compiled(method, first, given, range(3))
    expected, expected_loss = by_torch(method, first, given, range(3))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.steps == expected.steps > 0
    moved = (expected.users - first.users).abs().mean()
    assert moved > 0.01
    for name in ("users", "items"):
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-4)  # a hundredth of a step: gradients may cancel
        close(getattr(found, name).double(), getattr(expected, name))
        assert (getattr(found, name) - getattr(expected, name)).abs().mean() < 1e-6
    for name in ("first", "second"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-3, atol=1e-7)


def test_gradients_as_small_as_epsilon_are_damped_alike() -> None:
    data = training("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1")
    method = MF(MFSettings(embedding_dim=8, learning_rate=0.01, batch_size=16, init_scale=3e-7, l2=0))
    first = method.init(data, Key(0))
    found, _ = compiled(method, first, data, range(1))
    expected, _ = by_torch(method, first, data, range(1))
    steps = (expected.users - first.users).abs()
    assert 0.001 < steps.mean() < 0.9 * 0.01 * expected.steps  # epsilon matters, and does not stop everything
    assert (found.users - expected.users).abs().mean() < 0.01 * steps.mean()


def test_rows_without_an_interaction_go_on_as_adam_has_it() -> None:
    both = of_lists([[0, 1], [2, 3], [1, 4]], 9)
    method = MF(MFSettings(embedding_dim=4, learning_rate=0.1, batch_size=2))
    before, _ = compiled(method, method.init(both, Key(0)), both, range(2))
    fewer = of_lists([[0, 1], [2, 3], []], 9)
    found, _ = compiled(method, before, fewer, range(2, 4))
    expected, _ = by_torch(method, before, fewer, range(2, 4))
    assert (expected.users[2] - before.users[2]).abs().mean() > 0.01
    torch.testing.assert_close(found.users.double(), expected.users, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.second.double(), expected.second, rtol=1e-4, atol=1e-9)  # type: ignore[union-attr]


def test_users_with_nearly_all_items() -> None:
    data = of_lists([[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 2, 4]], 5)  # the second has nothing left to compare with
    method = MF(MFSettings(embedding_dim=4, learning_rate=0.05, batch_size=3))
    first = method.init(data, Key(0))
    found, loss = compiled(method, first, data, range(4))
    expected, expected_loss = by_torch(method, first, data, range(4))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert torch.equal(found.users[1], first.users[1])
    torch.testing.assert_close(found.items.double(), expected.items, rtol=0, atol=1e-5)


def test_an_epoch_with_nothing_to_compare_changes_nothing() -> None:
    data = of_lists([[0, 1, 2], []], 3)
    method = MF(MFSettings(embedding_dim=4))
    first = method.init(data, Key(0))
    found, loss = compiled(method, first, data, range(1))
    assert same(found, first)
    assert loss == 0


def test_a_continued_run_has_the_same_bits_for_any_number_of_threads() -> None:
    data = training("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1")
    method = MF(MFSettings(embedding_dim=16, batch_size=64))
    first = method.init(data, Key(0))
    kept = replace(first, users=first.users.clone(), items=first.items.clone())
    whole, _ = compiled(method, first, data, range(4))
    assert same(first, kept)  # a state that is stored is not changed afterwards
    half, _ = compiled(method, first, data, range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        continued, _ = compiled(method, half, data, range(2, 4))
    finally:
        torch.set_num_threads(threads)
    assert same(continued, whole)
    assert not same(half, whole)


def test_torch_trains_where_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    data = training("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1")
    method = MF(MFSettings(embedding_dim=4, batch_size=64))
    first = method.init(data, Key(0))
    monkeypatch.setattr(mf, "usable", lambda *tensors: False)
    found, loss = compiled(method, first, data, range(1))
    expected, expected_loss = VectorMethod.epoch(method, first, data, Key(5).fold(0))
    assert same(found, expected)
    assert loss == expected_loss


SGD = {"optimizer": "sgd", "learning_rate": 0.2, "l2": 0.05}


def test_a_plain_step_by_hand() -> None:
    """One user with one of two items: ``x = p . (q_j - q_i)``, and all rows move from where they were."""
    data, method = of_lists([[1]], 2), MF(MFSettings(embedding_dim=2, **SGD))
    before = Vectors(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]]))
    found, loss = method.epoch(before, data, Key(0))
    x = 1 * (0 - 1) + 2 * (3 - 1)
    slope = 1 / (1 + math.exp(-x))
    assert loss == pytest.approx(math.log1p(math.exp(x)) + 0.05 / 2 * (5 + 9 + 2), rel=1e-6)
    user = [1 - 0.2 * (slope * (0 - 1) + 0.05 * 1), 2 - 0.2 * (slope * (3 - 1) + 0.05 * 2)]
    other = [0 - 0.2 * (slope * 1 + 0.05 * 0), 3 - 0.2 * (slope * 2 + 0.05 * 3)]
    item = [1 - 0.2 * (-slope * 1 + 0.05 * 1), 1 - 0.2 * (-slope * 2 + 0.05 * 1)]
    torch.testing.assert_close(found.users, torch.tensor([user]))
    torch.testing.assert_close(found.items, torch.tensor([other, item]))
    assert found.steps == 1


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_plain_steps_are_those_of_torch(dim: int) -> None:
    data = training("synthetic:users=30,items=40,clusters=2,interactions_per_user=6,seed=1")
    method = MF(MFSettings(embedding_dim=dim, **SGD))
    first = method.init(data, Key(0))
    assert (first.first, first.second) == (None, None)
    found, loss = compiled(method, first, data, range(2))
    double = replace(first, users=first.users.double(), items=first.items.double())  # for which there is no kernel
    expected, expected_loss = compiled(method, double, data, range(2))
    assert expected.users.dtype == torch.float64
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.steps == expected.steps == 2 * data.rows.items.numel()
    assert (expected.users - first.users).abs().mean() > 0.005
    torch.testing.assert_close(found.users.double(), expected.users, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.items.double(), expected.items, rtol=1e-4, atol=1e-5)


def test_torch_takes_plain_steps_by_autograd() -> None:
    """The oracle of the oracle: the gradient of :meth:`MF.loss`, triple by triple."""
    data = training("synthetic:users=8,items=14,clusters=2,interactions_per_user=3,seed=1")
    method = MF(MFSettings(embedding_dim=3, **SGD))
    first = method.init(data, Key(0))
    users, items = (each.double().requires_grad_() for each in (first.users, first.items))
    for batch in batches(data, 1, Key(5).fold(0)):
        gradients = torch.autograd.grad(method.loss(users, items, batch, data), (users, items))
        users, items = (
            (each - 0.2 * one).detach().requires_grad_() for each, one in zip((users, items), gradients, strict=True)
        )
    found, _ = compiled(method, first, data, range(1))
    torch.testing.assert_close(found.users.double(), users.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.items.double(), items.detach(), rtol=1e-4, atol=1e-6)


def test_a_continued_run_with_plain_steps_has_the_same_bits() -> None:
    data = training("synthetic:users=50,items=70,clusters=2,interactions_per_user=8,seed=1")
    method = MF(MFSettings(embedding_dim=16, **SGD))
    first = method.init(data, Key(0))
    kept = replace(first, users=first.users.clone(), items=first.items.clone())
    whole, _ = compiled(method, first, data, range(4))
    assert torch.equal(first.users, kept.users)
    assert torch.equal(first.items, kept.items)
    half, _ = compiled(method, first, data, range(2))
    continued, _ = compiled(method, half, data, range(2, 4))
    assert torch.equal(continued.users, whole.users)
    assert torch.equal(continued.items, whole.items)
    assert not torch.equal(half.items, whole.items)


def test_the_visits_of_an_epoch() -> None:
    from perfedrec.methods.centralised import kernels

    # Triples (user, item, other item) of 2 users (rows 0, 1) and 3 items (rows 2 to 4), in order 2, 0, 1, two a batch.
    users, positives, negatives = np.array([0, 1, 0]), np.array([0, 1, 0]), np.array([1, 0, 2])
    places, upcoming, limits = np.zeros((3, 3), np.int32), np.zeros(5, np.int32), np.zeros(3, np.int64)
    rows, counts, following = visits = tuple(np.full(9, -9, np.int32) for _ in range(3))
    triples = users, positives, negatives, np.array([2, 0, 1])
    kernels.find_visits(triples, 2, 2, places, visits, limits, upcoming)
    assert limits.tolist() == [0, 4, 7]
    assert rows.tolist() == [0, 2, 4, 3, 1, 3, 2, -9, -9]
    assert counts.tolist() == [2, 2, 1, 1, 1, 1, 1, -9, -9]
    assert following.tolist() == [2, 1, 2, 1, 2, 2, 2, -9, -9]  # 2: not again
    assert upcoming.tolist() == [0, 1, 0, 0, 0]
    assert places.tolist() == [[~0, ~1, ~2], [0, 1, ~3], [~0, ~1, ~2]]


@pytest.mark.parametrize("first", [1, 2, 5000])
def test_weights_of_the_steps_to_come(first: int) -> None:
    paths, epsilons = later_steps(first, 3)
    assert paths.size == epsilons.size == 4
    for place in range(4):
        step = first + place
        moments, path, mean = [1.0, 1.0], 0.0, 0.0
        for later in range(step, step + 3000):  # what Adam adds to a number whose gradient is 0 from here on
            unbiased = 1 - BETAS[0] ** later, 1 - BETAS[1] ** later
            weight = (moments[0] / unbiased[0]) / np.sqrt(moments[1] / unbiased[1])
            path += weight
            mean += weight * EPSILON * np.sqrt(unbiased[1] / moments[1])
            moments = [moments[0] * BETAS[0], moments[1] * BETAS[1]]
        assert paths[place] == pytest.approx(path, rel=1e-12)
        assert epsilons[place] == pytest.approx(mean, rel=1e-12)


def test_an_option_without_effect_is_said() -> None:
    assert MF(MFSettings(batch_size=512)).remarks(10) == MF(MFSettings(**SGD)).remarks(10) == []
    (said,) = MF(MFSettings(**SGD, batch_size=512)).remarks(10)
    assert said == "method.batch_size: without effect with method.optimizer = sgd"


TWO_EPOCHS = """
import torch

from perfedrec import Key, Training, configure, load

data = Training.of(load("synthetic:users=60,items=300"), torch.device("cpu"))
method = configure("mf", overrides=["method.batch_size=256"]).build()
state = method.init(data, Key(0))
for epoch in range(2):
    state, _ = method.epoch(state, data, Key(1).fold(epoch))
print(torch.cat([state.users, state.items, state.first, state.second]).numpy().tobytes().hex())
"""


def test_the_process_that_compiles_rounds_as_those_that_find_the_kernel(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    runs = [
        subprocess.run(
            [sys.executable, "-c", TWO_EPOCHS], env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        for _ in range(2)
    ]
    assert any(path.is_file() for path in tmp_path.rglob("*bpr_epoch*"))  # the second one has compiled nothing
    assert runs[0].stdout == runs[1].stdout
