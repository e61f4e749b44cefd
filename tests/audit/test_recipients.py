"""Attacks on the factor that all users receive, on lists where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from perfedrec.audit.recipients import attack_factor, by_passes
from perfedrec.core.keys import Key
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.spectral import orthonormal
from perfedrec.nn.propagation import Bipartite

N_USERS, N_ITEMS = 60, 40


def planted() -> tuple[np.ndarray, list[Tensor], list[Tensor]]:
    """[n, m] interactions at random, and the users' lists and held-out items."""
    random = np.random.default_rng(5)
    matrix, own, held = np.zeros((N_USERS, N_ITEMS)), [], []
    for user in range(N_USERS):
        drawn = random.permutation(N_ITEMS)[:8]
        own.append(torch.from_numpy(np.sort(drawn[:6])))
        held.append(torch.from_numpy(drawn[6:]))
        matrix[user, drawn[:6]] = 1
    return matrix, own, held


def attacked(factor: Tensor) -> dict[str, tuple[float, float]]:
    """The value of each attack on a factor, and its margin."""
    matrix, own, held = planted()
    together = sparse.csr_array((matrix.T @ matrix).astype(np.int32))
    degrees = torch.from_numpy(matrix.sum(0)).float()
    found = attack_factor(factor, own, held, together, degrees, "it")
    assert all(each.cases > 40 for each in found)
    return {each.attack.removesuffix(", by it"): (each.value, each.margin or 0.0) for each in found}


def shown(least: int) -> Tensor:
    """[m, m] the positive part of the matrix of pairs that enough users have, as a factor."""
    users, items = (torch.from_numpy(each) for each in planted()[0].nonzero())
    matrix = neighbourhood.shared(Bipartite.of(users, items, N_USERS, N_ITEMS), least).toarray()
    values, vectors = np.linalg.eigh(matrix)
    return torch.from_numpy(vectors * values.clip(min=0) ** 0.5).float()


def test_pairs_of_one_user_are_recognised_in_the_whole_matrix() -> None:
    assert attacked(shown(1))["pairs that one user alone has"][0] > 0.999


def test_pairs_of_one_user_are_not_recognised_without_pairs_of_few_users() -> None:
    value, margin = attacked(shown(neighbourhood.HOLDERS))["pairs that one user alone has"]
    assert abs(value - 0.5) < max(2 * margin, 0.1)


def test_a_factor_that_says_nothing_tells_nothing() -> None:
    """With random tastes and a factor of zeros everything is a tie."""
    found = attacked(torch.zeros(N_ITEMS, 2))
    assert found["one item that is missing in a known list"] == (0.5, 0.0)
    assert found["pairs that one user alone has"] == (0.5, 0.0)


def test_an_item_of_one_user_shows_the_list_in_the_whole_matrix_alone() -> None:
    """Item 40 has one user: the row of the whole matrix is this user's list."""
    matrix, own, held = planted()
    matrix = np.concatenate([matrix, np.zeros((N_USERS, 1))], axis=1)
    matrix[7, N_ITEMS] = 1
    own[7] = torch.cat([own[7], torch.tensor([N_ITEMS])])
    together = sparse.csr_array((matrix.T @ matrix).astype(np.int32))
    degrees = torch.from_numpy(matrix.sum(0)).float()
    users, items = (torch.from_numpy(each) for each in matrix.nonzero())
    graph, values = Bipartite.of(users, items, N_USERS, N_ITEMS + 1), {}
    for least in (1, neighbourhood.HOLDERS):
        found, vectors = np.linalg.eigh(neighbourhood.shared(graph, least).toarray())
        factor = torch.from_numpy(vectors * found.clip(min=0) ** 0.5).float()
        values[least] = attack_factor(factor, [own[7]], [held[7]], together, degrees, "it")[2].value
    assert values[1] == 1.0
    assert values[neighbourhood.HOLDERS] == pytest.approx(6 / N_ITEMS)  # all are equally near


def test_passes_give_the_matrix_that_they_multiply() -> None:
    random = np.random.default_rng(3)
    half = torch.from_numpy(random.normal(size=(12, 5))).float()
    matrix, basis, images = half @ half.T, orthonormal(torch.from_numpy(random.normal(size=(12, 6))).float()), []
    for _ in range(3):
        images.append(matrix @ basis)
        basis = orthonormal(images[-1])
    factor = by_passes(images)
    assert factor is not None
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=1e-3, atol=1e-3)
    assert by_passes(images[:1]) is None
    assert neighbourhood.low_rank(Bipartite.of(*torch.ones(5, 8).nonzero(as_tuple=True), 5, 8), Key(0)).shape == (8, 1)
