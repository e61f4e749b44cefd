import pytest
import torch

from perfedrec.core import products
from perfedrec.core.products import inner_products


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("n", "m", "k"), [(5, 7, 3), (64, 130, 64), (1, 1, 1), (0, 4, 2), (4, 0, 2), (3, 2, 0)])
def test_inner_products_against_double_precision(
    n: int, m: int, k: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(products, "_ONEDNN", None)
    first, second = numbers(n, k), numbers(m + 1, k)[1:]
    expected = first.double() @ second.double().T
    for a, b in ((first, second), (first.T.contiguous().T, second), (first, second.T.contiguous().T)):
        found = inner_products(a, b)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_inner_products_of_double_precision_stay_so() -> None:
    first, second = numbers(4, 3).double(), numbers(5, 3).double()
    torch.testing.assert_close(inner_products(first, second), first @ second.T, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("onednn", [True, False])
def test_a_bias_and_the_sigmoid(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(products, "_ONEDNN", None)
    first, second, bias = numbers(9, 4), numbers(6, 4), numbers(6)
    expected = first.double() @ second.double().T + bias.double()
    torch.testing.assert_close(inner_products(first, second, bias).double(), expected, rtol=1e-6, atol=1e-5)
    found = inner_products(first, second, bias, "sigmoid").double()
    torch.testing.assert_close(found, expected.sigmoid(), rtol=1e-6, atol=1e-6)


def test_onednn_is_given_matrices_that_lie_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take it hundreds of times as long: validation of the spectral filter on Yelp took 50 seconds."""
    given = []

    def product(first: torch.Tensor, second: torch.Tensor, *_: object) -> torch.Tensor:
        given.extend((first, second))
        return first @ second.T

    monkeypatch.setattr(products, "_ONEDNN", product)
    first, second = torch.randn(4, 3).T, torch.randn(4, 5).T
    assert torch.equal(products.inner_products(first, second), first.contiguous() @ second.contiguous().T)
    assert len(given) == 2
    assert all(each.is_contiguous() for each in given)
