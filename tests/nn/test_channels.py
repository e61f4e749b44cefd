"""Gates, layers of three channels and agreement with neighbourhoods, against plain autograd in float64."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from perfedrec.nn import channels
from perfedrec.nn.propagation import Adjacency, Bipartite
from perfedrec.nn.social import UserGraph

N, M, D = 70, 40, 5


def plain_gated(vectors: Tensor, matrices: Tensor, biases: Tensor) -> Tensor:
    return torch.stack([vectors * torch.sigmoid(vectors @ w + b) for w, b in zip(matrices, biases, strict=True)])


def dense(n: int, m: int, seed: int) -> Tensor:
    """A matrix [n, m] of which a tenth is not 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn, there = (torch.rand(n, m, dtype=torch.float64, generator=generator) for _ in range(2))
    return drawn * (there < 0.1)


FRIENDS = [dense(N, N, seed) for seed in (3, 4, 5)]
TO_USERS, TO_ITEMS = dense(N, M, 6), dense(M, N, 7)


def sparse(matrix: Tensor) -> Adjacency:
    rows, columns = matrix.nonzero(as_tuple=True)
    return Adjacency.of(rows, columns, matrix[rows, columns], (matrix.shape[0], matrix.shape[1]))


def graphs() -> channels.Graphs:
    friends, (to_users, to_items) = torch.block_diag(*FRIENDS), (TO_USERS, TO_ITEMS)
    return channels.Graphs(
        UserGraph(sparse(friends), sparse(friends.T)),
        Bipartite(sparse(to_users), sparse(to_users.T)),
        Bipartite(sparse(to_items.T), sparse(to_items)),
    )


def plain_mixed(tables: Sequence[Tensor], vector: Tensor) -> Tensor:
    *views, simple = tables
    shares = torch.stack([each @ vector for each in views]).softmax(0)
    return (shares[:, :, None] * torch.stack(views)).sum(0) + simple / 2


def plain_passed(starts: Tensor, items: Tensor, vector: Tensor, n_layers: int) -> Tensor:
    tables, layers = [*starts, items], []
    for _ in range(n_layers + 1):
        layers.append(tables)
        *users, items = tables
        views = [friends @ each for friends, each in zip(FRIENDS, users, strict=False)]
        tables = [*views, TO_USERS @ items, TO_ITEMS @ plain_mixed(users, vector)]
    *users, items = (torch.stack(each).mean(0) for each in zip(*layers, strict=True))
    return torch.cat([plain_mixed(users, vector), items])


def passed(starts: Tensor, items: Tensor, vector: Tensor, n_layers: int) -> Tensor:
    return torch.cat(channels.passed(starts, items, vector, graphs(), n_layers))


def orders() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.stack([torch.randperm(size, generator=generator) for _ in range(3)]) for size in (N, D))  # type: ignore[return-value]


def plain_agreement(vectors: Tensor, near: Tensor) -> Tensor:
    total = vectors.new_zeros(())
    for p, z, rows, columns in zip(vectors, near, *orders(), strict=True):
        other, centre = z[rows][:, columns], z.mean(0)
        local = softplus((p * other).sum(1) - (p * z).sum(1))
        total = total + (local + softplus(other @ centre - z @ centre)).mean()
    return total


def agreement(vectors: Tensor, near: Tensor) -> Tensor:
    return channels.agreement(vectors, near, *orders())


Part = Callable[..., Tensor]
PASSED = [(4, N, D), (M, D), (D,)]
GIVEN: dict[str, tuple[Part, Part, Sequence[tuple[int, ...]]]] = {
    "gated": (channels.gated, plain_gated, [(N, D), (2, D, D), (2, D)]),
    **{
        f"passed through {n} layers": (partial(passed, n_layers=n), partial(plain_passed, n_layers=n), PASSED)
        for n in range(3)
    },
    "agreement": (agreement, plain_agreement, [(3, N, D), (3, N, D)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the latter by kernels
@pytest.mark.parametrize("name", GIVEN)
def test_values_and_gradients_are_those_of_autograd(name: str, dtype: torch.dtype) -> None:
    own, plain, shapes = GIVEN[name]
    generator, found = torch.Generator().manual_seed(1), []
    given = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    weights = torch.randn(plain(*given).shape, dtype=torch.float64, generator=generator)
    for part, kind in ((own, dtype), (plain, torch.float64)):
        leaves = [each.to(kind, copy=True).requires_grad_() for each in given]
        value = part(*leaves)
        (value * weights.to(kind)).sum().backward()
        found.append([value.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(shapes) + 1
    for one, other in zip(*found, strict=True):
        precision = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(one, other, **precision)


def test_agreement_as_a_term_of_a_loss_has_its_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(3, N, D, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    term = channels.agreement(*given, *orders(), weight=0.3)
    expected = 0.3 * plain_agreement(*given)
    torch.testing.assert_close(term, expected)
    for one, other in zip(torch.autograd.grad(term, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(one, other)
