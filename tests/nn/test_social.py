"""Graphs of users against the motifs of the papers, one by one and in dense matrices."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse

from perfedrec.nn import social
from perfedrec.nn.social import UserGraph, purchases, related, sharing, triangles

Matrix = NDArray[np.float64]
N, M = 30, 12


@pytest.fixture(scope="module")
def directed() -> Matrix:
    """Relations of 30 users, some of them mutual."""
    made = (np.random.default_rng(0).random((N, N)) < 0.2).astype(float)
    np.fill_diagonal(made, 0)
    return made


@pytest.fixture(scope="module")
def interactions() -> Matrix:
    return (np.random.default_rng(1).random((N, M)) < 0.4).astype(float)


def graph(directed: Matrix) -> sparse.csr_array:
    sources, targets = directed.nonzero()
    return related(N, sources, targets)


def test_related_in_either_direction(directed: Matrix) -> None:
    np.testing.assert_array_equal(graph(directed).toarray(), np.maximum(directed, directed.T))


def test_triangles_are_the_sum_of_the_seven_social_motifs(directed: Matrix) -> None:
    """Motifs M1 to M7 of MHCN (WWW 2021): ``b`` are mutual relations, ``u`` those of one direction."""
    b = directed * directed.T
    u = directed - b
    c1 = (u @ u) * u.T
    c2 = (b @ u) * u.T + (u @ b) * u.T + (u @ u) * b
    c3 = (b @ b) * u + (b @ u) * b + (u @ b) * b
    m4 = (b @ b) * b
    c5 = (u @ u) * u + (u @ u.T) * u + (u.T @ u) * u
    m6 = (u @ b) * u + (b @ u.T) * u.T + (u.T @ u) * b
    m7 = (u.T @ b) * u.T + (b @ u) * u + (u @ u.T) * b
    expected = sum(each + each.T for each in (c1, c2, c3, c5)) + m4 + m6 + m7
    assert expected.sum() > 1000
    np.testing.assert_array_equal(triangles(graph(directed)).toarray(), expected)


@pytest.mark.parametrize("at_once", [7, 1024])
def test_common_items_of_friends_and_of_others(
    at_once: int, directed: Matrix, interactions: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(social, "USERS_AT_ONCE", at_once)
    own, items = graph(directed), sparse.csr_array(interactions)
    common, friends = interactions @ interactions.T, own.toarray()
    np.testing.assert_array_equal(sharing(own, items).toarray(), common * friends)
    expected = np.where((friends == 0) & (common >= 3), common, 0)
    assert 0 < (expected > 0).sum() < N * N
    np.testing.assert_array_equal(purchases(own, items, 3).toarray(), expected)


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (1.0, 0.0)])
def test_a_user_graph_spreads_vectors_and_gradients(exponents: tuple[float, float], directed: Matrix) -> None:
    weights = directed * np.arange(1, N * N + 1).reshape(N, N)
    weights[3] = 0  # a user without relations
    sums = weights.sum(1)
    inverse = np.where(sums > 0, sums.clip(min=1), np.inf)
    dense = weights * inverse[:, None] ** -exponents[0] * inverse[None, :] ** -exponents[1]
    made = UserGraph.of(sparse.csr_array(weights), exponents, torch.device("cpu"))
    vectors = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spread = made.spread(vectors)
    np.testing.assert_allclose(spread.detach().numpy(), dense @ vectors.detach().numpy(), rtol=1e-4, atol=1e-6)
    spread[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    np.testing.assert_allclose(vectors.grad[:, 0].numpy(), dense.sum(0), rtol=1e-4, atol=1e-6)
    if exponents == (1.0, 0.0):
        np.testing.assert_allclose(dense.sum(1), np.arange(N) != 3, rtol=1e-9)


def test_channels_of_a_graph_and_the_mean_of_its_layers(directed: Matrix) -> None:
    graphs = [sparse.csr_array(directed), sparse.csr_array(directed.T)]
    made, *single = (
        UserGraph.of(sparse.csr_array(each), (1.0, 0.0), torch.device("cpu"))
        for each in (sparse.block_diag(graphs), *graphs)
    )
    vectors = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([graph.spread(each) for graph, each in zip(single, vectors, strict=True)])
    torch.testing.assert_close(made.spread(vectors), expected)
    layers = [vectors[0], expected[0], single[0].spread(expected[0])]
    torch.testing.assert_close(single[0].propagated(vectors[0], 2), torch.stack(layers).mean(0))
