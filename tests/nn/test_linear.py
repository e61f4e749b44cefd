import pytest
import torch
from torch.nn import functional

from perfedrec.nn.linear import linear


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("shape", "out"), [((6, 3), 4), ((6, 4), 2), ((2, 5, 3), 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> None:
    given = [numbers(*each).to(dtype) for each in (shape, (out, shape[-1]), (out,), (*shape[:-1], out))]
    found = []
    for layer in (linear, functional.linear):
        leaves = [each.clone().requires_grad_() for each in given[:3]]
        value = layer(*leaves)
        value.backward(given[3])
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


def test_without_bias_and_where_the_weight_alone_has_a_gradient() -> None:
    x, weight = numbers(4, 3), numbers(2, 3).requires_grad_()
    value = linear(x, weight)
    torch.testing.assert_close(value, x @ weight.T)
    value.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(2, 3))
