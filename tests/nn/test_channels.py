"""Gates, attention over channels and agreement with neighbourhoods, against plain autograd in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from perfedrec.nn import channels

N, D = 70, 5


def plain_gated(vectors: Tensor, matrices: Tensor, biases: Tensor) -> Tensor:
    return torch.stack([vectors * torch.sigmoid(vectors @ w + b) for w, b in zip(matrices, biases, strict=True)])


def plain_attended(tables: Tensor, vector: Tensor, simple: Tensor) -> Tensor:
    shares = torch.stack([each @ vector for each in tables]).softmax(0)
    return (shares[:, :, None] * tables).sum(0) + simple / 2


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
GIVEN: dict[str, tuple[Part, Part, Sequence[tuple[int, ...]]]] = {
    "gated": (channels.gated, plain_gated, [(N, D), (2, D, D), (2, D)]),
    "attended": (channels.attended, plain_attended, [(3, N, D), (D,), (N, D)]),
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
