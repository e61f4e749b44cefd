"""LightGCN++ against a loop over nodes and neighbours."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.lightgcn_pp import LightGCNPP, LightGCNPPSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import batches


def looped(
    data: Training, users: Tensor, items: Tensor, n_layers: int, alpha: float, beta: float, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Every node sums its neighbours one by one."""
    pairs = list(zip(data.rows.segments.tolist(), data.rows.items.tolist(), strict=True))
    of_users = {user: [i for u, i in pairs if u == user] for user in range(data.n_users)}
    of_items = {item: [u for u, i in pairs if i == item] for item in range(data.n_items)}
    layers = [(users.numpy().astype(np.float64), items.numpy().astype(np.float64))]
    for _ in range(n_layers):
        before = layers[-1]
        sums = []
        for own, theirs, other in ((of_users, of_items, before[1]), (of_items, of_users, before[0])):
            table = np.zeros((len(own), users.shape[1]))
            for node, neighbours in own.items():
                for each in neighbours:
                    table[node] += other[each] / np.linalg.norm(other[each]) * len(theirs[each]) ** -beta
                table[node] *= max(len(neighbours), 1) ** -alpha
            sums.append(table)
        layers.append((sums[0], sums[1]))
    final = [gamma * layers[0][k] + (1 - gamma) * np.mean([each[k] for each in layers[1:]], axis=0) for k in (0, 1)]
    return final[0], final[1]


@pytest.mark.parametrize(("alpha", "beta", "gamma", "n_layers"), [(0.6, -0.1, 0.2, 2), (0.3, 0.4, 0.0, 1)])
def test_final_vectors(
    alpha: float, beta: float, gamma: float, n_layers: int, toy: Training, toy_vectors: tuple[Tensor, Tensor]
) -> None:
    settings = LightGCNPPSettings(alpha=alpha, beta=beta, gamma=gamma, n_layers=n_layers)
    given = LightGCNPP(settings).encode(*toy_vectors, toy)
    expected = looped(toy, *toy_vectors, n_layers, alpha, beta, gamma)
    for side in (0, 1):
        np.testing.assert_allclose(given[side].numpy(), expected[side], rtol=1e-5, atol=1e-6)


def test_unit_vectors_and_lightgcn_exponents_give_the_first_layer_of_lightgcn(
    toy: Training, toy_vectors: tuple[Tensor, Tensor]
) -> None:
    users, items = (torch.nn.functional.normalize(each, dim=1) for each in toy_vectors)
    given = LightGCNPP(LightGCNPPSettings(alpha=0.5, beta=0.5, gamma=0.5, n_layers=1)).encode(users, items, toy)
    expected = LightGCN(LightGCNSettings(n_layers=1)).encode(users, items, toy)
    torch.testing.assert_close(given, expected)


def test_a_node_without_neighbours_keeps_its_layer_0_alone(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    users, items = (each.clone().requires_grad_() for each in toy_vectors)
    method = LightGCNPP(LightGCNPPSettings(gamma=0.25, n_layers=3, l2=0.0))
    torch.testing.assert_close(method.encode(users, items, toy)[1][4], items[4] * 0.25)
    torch.autograd.backward(method.loss(users, items, batches(toy, 8, Key(0))[0], toy))
    assert users.grad is not None
    assert items.grad is not None
    assert bool(users.grad.isfinite().all())
    assert bool(items.grad.isfinite().all())
