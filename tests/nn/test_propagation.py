import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.nn.models import LightGCN

from perfedrec.core.keys import Key
from perfedrec.core.settings import STEEPEST
from perfedrec.core.types import Rows, block_rows
from perfedrec.methods.federated.neighbourhood import neighbour_sums
from perfedrec.nn.propagation import Bipartite, edge_weights, lightgcn, lightgcn_star, power, spectral_star

N, M, D = 9, 12, 5


@pytest.fixture
def graph() -> tuple[Tensor, Rows]:
    """A random matrix R [n, m], in which one item has no users, and the rows of all users."""
    dense = (torch.rand(N, M, generator=torch.Generator().manual_seed(3)) < 0.35).float()
    dense[:, 4] = 0
    dense[torch.arange(N), torch.arange(N) % 4] = 1
    users, items = dense.nonzero().T
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(users, minlength=N).cumsum(0)])
    return dense, block_rows(offsets, items, torch.arange(N))[0]


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def normalised(dense: Tensor) -> Tensor:
    """``D_u^-1/2 R D_i^-1/2`` entry by entry."""
    result = torch.zeros_like(dense)
    for user in range(dense.shape[0]):
        for item in range(dense.shape[1]):
            if dense[user, item]:
                result[user, item] = 1 / float(dense[user].sum() * dense[:, item].sum()) ** 0.5
    return result


def test_walks_with_the_largest_exponents_give_numbers_above_0() -> None:
    step = power(np.array([2_000_000]), -STEEPEST)
    assert (step**3).astype(np.float32)[0] >= np.finfo(np.float32).tiny


def test_edge_weights_by_hand() -> None:
    rows, _ = block_rows(torch.tensor([0, 4, 5]), torch.tensor([0, 1, 2, 3, 0]), torch.arange(2))
    degrees = torch.tensor([9.0, 1.0, 4.0, 0.0])
    # A degree of 0 counts as 1: with noise, the degree of an item that a user has may be 0.
    expected = [1 / 6, 1 / 2, 1 / 4, 1 / 2, 1 / 3]
    torch.testing.assert_close(edge_weights(rows, degrees), torch.tensor(expected))
    expected = [1 / 2 / 3, 1 / 2, 1 / 2 / 2, 1 / 2, 1 / 3]
    torch.testing.assert_close(edge_weights(rows, degrees, (0.5, 0.5)), torch.tensor(expected))
    expected = [1 / 9, 1, 1 / 4, 1, 1 / 9]
    torch.testing.assert_close(edge_weights(rows, degrees, (0.0, 1.0)), torch.tensor(expected))


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.25, 0.4), (0.0, 1.0)])
def test_exponents_of_a_graph_equal_the_dense_matrix(
    graph: tuple[Tensor, Rows], exponents: tuple[float, float]
) -> None:
    dense, rows = graph
    items, users = vectors(M, D), vectors(N, D)
    weights = dense.sum(1).clamp(min=1)[:, None] ** -exponents[0] * dense.sum(0).clamp(min=1) ** -exponents[1]
    found = Bipartite.of(rows.segments, rows.items, N, M).normalised(exponents)
    torch.testing.assert_close(found.to_users(items), dense * weights @ items)
    torch.testing.assert_close(found.to_items(users), (dense * weights).T @ users)


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_whole_graph_equals_the_dense_matrix(graph: tuple[Tensor, Rows], n_layers: int) -> None:
    dense, rows = graph
    matrix, users, items = normalised(dense), vectors(N, D), vectors(M, D)
    layers = [(users, items)]
    for _ in range(n_layers):
        layers.append((matrix @ layers[-1][1], matrix.T @ layers[-1][0]))
    found = lightgcn(Bipartite.of(rows.segments, rows.items, N, M), users, items, n_layers)
    for side in range(2):
        torch.testing.assert_close(found[side], torch.stack([layer[side] for layer in layers]).mean(0))


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_whole_graph_equals_torch_geometric(graph: tuple[Tensor, Rows], n_layers: int) -> None:
    _, rows = graph
    model = LightGCN(N + M, D, n_layers)
    users, items = vectors(N, D), vectors(M, D)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.cat([users, items]))
        edges = torch.stack([rows.segments, rows.items + N])
        expected = model.get_embedding(torch.cat([edges, edges.flip(0)], dim=1))
    found = lightgcn(Bipartite.of(rows.segments, rows.items, N, M), users, items, n_layers)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_sparse_products(graph: tuple[Tensor, Rows]) -> None:
    dense, rows = graph
    matrix, bipartite = normalised(dense), Bipartite.of(rows.segments, rows.items, N, M)
    users, items = vectors(N, D).requires_grad_(), vectors(M, D).requires_grad_()
    factors = vectors(N + M, D)
    loss = (bipartite.to_users(items) * factors[:N]).sum() + (bipartite.to_items(users) * factors[N:]).sum()
    gradients = torch.autograd.grad(loss, (users, items))
    torch.testing.assert_close(gradients[0], matrix @ factors[N:])
    torch.testing.assert_close(gradients[1], matrix.T @ factors[:N])


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("block", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [5], [7, 2]])
def test_star_with_current_neighbour_sums_equals_the_whole_graph(
    graph: tuple[Tensor, Rows], n_layers: int, block: list[int]
) -> None:
    _, rows = graph
    users, items = vectors(N, D), vectors(M, D)
    bipartite, degrees = Bipartite.of(rows.segments, rows.items, N, M), torch.bincount(rows.items, minlength=M)
    expected = lightgcn(bipartite, users, items, n_layers)
    reports = torch.stack([users, bipartite.to_users(items)], dim=1)[:, : min(n_layers, 2)]
    sums = neighbour_sums(bipartite, reports, n_layers)

    own, _ = block_rows(rows.offsets, rows.items, torch.tensor(block))
    star = lightgcn_star(own, degrees, sums, n_layers)
    final = star.users(users[block], items[own.items], own.segments)
    torch.testing.assert_close(final, expected[0][block], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(star.items(items), expected[1], rtol=1e-5, atol=1e-6)
    some = torch.tensor([11, 4, 0])
    torch.testing.assert_close(star.items(items[some], some), expected[1][some], rtol=1e-5, atol=1e-6)


def test_star_without_neighbours_by_hand() -> None:
    rows, _ = block_rows(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.arange(2))
    items, degrees = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 8.0])
    star = lightgcn_star(rows, degrees, None, 3)
    # c_00 = 1 / sqrt(2 * 2), c_01 = 1 / sqrt(2 * 8), c_11 = 1 / sqrt(1 * 8)
    expected = torch.tensor([[(1 + 2 / 2) / 2, (1 + 4 / 4) / 2], [0.5, (1 + 4 / 8**0.5) / 2]])
    torch.testing.assert_close(star.users(torch.ones(2, 2), items[rows.items], rows.segments), expected)
    assert torch.equal(star.items(items), items)
    flat = lightgcn_star(rows, degrees, None, 0)  # no propagation: the user's own vector
    assert torch.equal(flat.users(torch.ones(2, 2), items[rows.items], rows.segments), torch.ones(2, 2))


def test_spectral_scores_equal_those_of_the_dense_filter(graph: tuple[Tensor, Rows]) -> None:
    dense, rows = graph
    user_degrees, item_degrees = dense.sum(1), dense.sum(0)
    basis = torch.linalg.qr(vectors(M, D))[0]
    star = spectral_star(rows, item_degrees)
    scores = star.users(torch.zeros(N, D), basis[rows.items], rows.segments) @ star.items(basis).T
    left = torch.diag(user_degrees**-0.5) @ dense @ torch.diag(item_degrees.clamp(min=1) ** -0.5)
    expected = left @ basis @ basis.T @ torch.diag(item_degrees.clamp(min=1) ** 0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    shifted = star.users(vectors(N, D), basis[rows.items], rows.segments) @ star.items(basis).T
    torch.testing.assert_close(shifted - scores, vectors(N, D) @ star.items(basis).T, rtol=1e-4, atol=1e-5)


def test_a_thinned_graph_keeps_both_directions_of_an_edge_or_none() -> None:
    """Of 2,000 edges about 30 % are left out (four standard errors), and the others weigh 1 / 0.7 times as much."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randperm(4000, generator=generator)[:2000]
    graph = Bipartite.of(pairs // 50, pairs % 50, 80, 50)
    thin = graph.thinned(0.3, Key(5))
    before, after = graph.to_users(torch.eye(50)), thin.to_users(torch.eye(50))
    torch.testing.assert_close(after, thin.to_items(torch.eye(80)).T)
    kept = after > 0
    torch.testing.assert_close(after[kept], before[kept] / 0.7)
    assert int(kept.sum()) == pytest.approx(1400, abs=4 * (2000 * 0.3 * 0.7) ** 0.5)
    part = Bipartite.of(pairs[:500] // 50, pairs[:500] % 50, 80, 50).thinned(0.3, Key(5))  # an edge is decided alone
    assert torch.equal(part.by_user.values > 0, kept[part_rows(part), part.by_user.columns])
    assert not torch.equal(kept, graph.thinned(0.3, Key(6)).to_users(torch.eye(50)) > 0)


def part_rows(graph: Bipartite) -> Tensor:
    return torch.repeat_interleave(graph.by_user.degrees)
