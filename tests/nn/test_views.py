import pytest
import torch

from perfedrec.core.keys import Key
from perfedrec.nn.propagation import Bipartite, lightgcn
from perfedrec.nn.views import noisy_lightgcn, perturb


@pytest.fixture
def vectors() -> torch.Tensor:
    result = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    result[3, 5] = 0.0
    return result


def test_noise_has_the_given_length_and_the_signs_of_the_vector(vectors: torch.Tensor) -> None:
    added = perturb(vectors, 0.3, Key(1)) - vectors
    lengths = added.norm(dim=1)
    others = [each for each in range(200) if each != 3]
    torch.testing.assert_close(lengths[others], torch.full((199,), 0.3), rtol=1e-5, atol=1e-6)
    assert float(added[3, 5]) == 0.0  # sign(0) = 0
    assert torch.equal(torch.sign(added), torch.sign(vectors))
    assert added.abs().unique(dim=0).shape[0] == 200  # each node has its own noise


def test_noise_is_keyed_by_node_and_grows_with_its_setting(vectors: torch.Tensor) -> None:
    assert torch.equal(perturb(vectors, 0.3, Key(1))[:7], perturb(vectors[:7], 0.3, Key(1)))
    assert not torch.equal(perturb(vectors, 0.3, Key(1)), perturb(vectors, 0.3, Key(2)))
    small, large = (perturb(vectors, noise, Key(1)) - vectors for noise in (0.1, 0.2))
    torch.testing.assert_close(2 * small, large, rtol=1e-4, atol=1e-6)


def test_noise_is_a_constant_for_the_gradient(vectors: torch.Tensor) -> None:
    leaf = vectors.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(perturb(leaf, 0.3, Key(1)).sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(vectors))


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_a_view_is_the_mean_of_its_layers_without_layer_0(n_layers: int) -> None:
    generator = torch.Generator().manual_seed(2)
    users, items = torch.randn(5, 3, generator=generator), torch.randn(6, 3, generator=generator)
    edges = (torch.rand(5, 6, generator=generator) < 0.5).nonzero().T
    graph = Bipartite.of(edges[0], edges[1], 5, 6)
    whole = lightgcn(graph, users, items, n_layers)
    exact = noisy_lightgcn(graph, users, items, n_layers, 0.0, Key(0))
    for start, mean, view in zip((users, items), whole, exact, strict=True):
        torch.testing.assert_close(view * n_layers, mean * (n_layers + 1) - start)
    key, a, b = Key(4), users, items
    totals = [torch.zeros_like(users), torch.zeros_like(items)]
    for layer in range(n_layers):
        a, b = graph.to_users(b), graph.to_items(a)
        a, b = perturb(a, 0.2, key.fold("users", layer)), perturb(b, 0.2, key.fold("items", layer))
        totals = [totals[0] + a, totals[1] + b]
    noisy = noisy_lightgcn(graph, users, items, n_layers, 0.2, key)
    for total, view, without in zip(totals, noisy, exact, strict=True):
        torch.testing.assert_close(view, total / n_layers)
        assert float((view - without).norm(dim=1).min()) > 0.01
