from math import exp, tanh

import pytest
import torch

from perfedrec.core.keys import Key
from perfedrec.nn.crossing import Crossing

B, L, F, D = 3, 4, 5, 2


def inputs(seed: int = 0) -> tuple[Crossing, torch.Tensor, torch.Tensor, torch.Tensor]:
    net, generator = Crossing(F, D), torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return net, draw(B, net.size), draw(B, L, D), draw(B, L, F)


def naive(weights: list[float], vector: list[float], attributes: list[float]) -> list[float]:
    """One node of one client in plain Python: DCN-V2 crosses, and attention over {id, attribute, cross}."""
    numbers = iter(weights)
    take = lambda n: [next(numbers) for _ in range(n)]  # noqa: E731
    embedding = [take(F) for _ in range(D)]
    layers = [([take(D) for _ in range(D)], take(D)) for _ in range(2)]
    query = take(D)
    assert next(numbers, None) is None
    x = [sum(w * a for w, a in zip(row, attributes, strict=True)) for row in embedding]
    y = x
    for matrix, bias in layers:
        y = [x[i] * (sum(matrix[i][j] * y[j] for j in range(D)) + bias[i]) + y[i] for i in range(D)]
    candidates = [vector, x, y]
    strength = [exp(sum(h * tanh(z) for h, z in zip(query, each, strict=True))) for each in candidates]
    return [sum(s * each[i] for s, each in zip(strength, candidates, strict=True)) / sum(strength) for i in range(D)]


def test_every_client_has_its_own_network() -> None:
    net, weights, vectors, attributes = inputs()
    found = net(weights, vectors, attributes)
    for b in range(B):
        for node in range(L):
            expected = naive(weights[b].tolist(), vectors[b, node].tolist(), attributes[b, node].tolist())
            assert found[b, node].tolist() == pytest.approx(expected, abs=1e-12)


def test_shared_weights_and_shared_nodes() -> None:
    net, weights, vectors, attributes = inputs()
    shared = net(weights[:1], vectors[:1], attributes[:1])
    torch.testing.assert_close(shared, net(weights, vectors, attributes)[:1])
    same_nodes = net(weights, vectors, attributes[:1])
    torch.testing.assert_close(same_nodes, net(weights, vectors, attributes[:1].expand(B, -1, -1)))


def test_gradients() -> None:
    net, *leaves = inputs(1)
    assert torch.autograd.gradcheck(net, [leaf.requires_grad_() for leaf in leaves])


def test_first_weights() -> None:
    net = Crossing(300, 16)
    weights = net.init(Key(0), 0.1)
    assert weights.shape == (300 * 16 + 2 * (16 * 16 + 16) + 16,)
    assert float(weights[: 300 * 16].std()) == pytest.approx(0.1, rel=0.05)
    assert float(weights[300 * 16 :][: 16 * 16].std()) == pytest.approx(0.1 / 4, rel=0.2)
    assert weights[-16:].tolist() == [0.0] * 16  # equal attention: the mean of the three vectors
    assert torch.equal(weights, net.init(Key(0), 0.1))
    assert not torch.equal(weights, net.init(Key(1), 0.1))
