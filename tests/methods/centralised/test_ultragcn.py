"""UltraGCN against its three sums, written out pair by pair."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.ultragcn import UltraGCN, UltraGCNSettings, similar_items
from perfedrec.methods.centralised.vectors import batches


def weights(data: Training) -> np.ndarray:
    """``w_ik`` of all pairs of items, 0 where i = k."""
    matrix = data.matrix.toarray()
    shared = matrix.T @ matrix
    sums, m = shared.sum(1), data.n_items
    found = np.zeros((m, m))
    for i in range(m):
        for k in range(m):
            if i != k and shared[i, k]:
                found[i, k] = shared[i, k] / (sums[i] - shared[i, i]) * sqrt(sums[i] / sums[k])
    return found


def test_weights_between_items(toy: Training) -> None:
    """By hand: items 0 and 1 share one user; ``g`` is 5 and 4, and item 0 shares 3 users with other items."""
    assert weights(toy)[0, 1] == pytest.approx(1 / 3 * sqrt(5 / 4))
    np.testing.assert_allclose(similar_items(toy, 5).matrix().toarray(), weights(toy), rtol=1e-6)


def test_only_the_greatest_weights_are_kept(toy: Training) -> None:
    best = similar_items(toy, 1).matrix().toarray()
    expected = weights(toy)
    assert best[0].nonzero()[0].tolist() == [1, 3]  # equal; item 2 has the same user in common, but a greater g
    for row in range(4):
        np.testing.assert_allclose(best[row][best[row] > 0], expected[row].max(), rtol=1e-6)


@pytest.mark.parametrize("plain", [1.0, 0.0, 0.25])
def test_loss(toy: Training, toy_vectors: tuple[Tensor, Tensor], plain: float) -> None:
    settings = UltraGCNSettings(
        l2=0,
        n_negatives=5,
        negative_weight=3.0,
        plain_weight=plain,
        constraint=0.7,
        item_constraint=0.4,
        n_neighbours=5,
    )
    method, batch = UltraGCN(settings), batches(toy, 5, Key(3))[0]
    method.begin(*toy_vectors, toy, Key(0))
    users, items = (each.tolist() for each in toy_vectors)
    own = {user: toy.matrix.toarray()[user].nonzero()[0].tolist() for user in range(4)}
    degrees, between, total = toy.matrix.toarray().sum(0), weights(toy), 0.0

    def cross_entropy(user: int, item: int, sign: float) -> float:
        return log(1 + exp(-sign * sum(a * b for a, b in zip(users[user], items[item], strict=True))))

    def beta(user: int, item: int) -> float:
        return sqrt((len(own[user]) + 1) / (degrees[item] + 1)) / len(own[user])

    for u, i in zip(batch.users.tolist(), batch.positives.tolist(), strict=True):
        total += (plain + 0.7 * beta(u, i)) * cross_entropy(u, i, 1)
        others = [j for j in range(5) if j not in own[u]]
        total += 3.0 * float(np.mean([(plain + 0.7 * beta(u, j)) * cross_entropy(u, j, -1) for j in others]))
        total += 0.4 * sum(between[i, k] * cross_entropy(u, k, 1) for k in range(5))
    assert float(method.loss(*toy_vectors, batch, toy)) == pytest.approx(total / 5, rel=1e-5)


def test_the_item_graph_is_made_once_for_each_data_set(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = UltraGCN(UltraGCNSettings(n_neighbours=2))
    method.begin(*toy_vectors, toy, Key(0))
    first = method.similar
    method.begin(*toy_vectors, toy, Key(1))
    assert method.similar is first
    other = Training(toy.rows, toy.n_items + 1)
    method.begin(toy_vectors[0], torch.zeros(6, 3), other, Key(1))
    assert method.similar.offsets.numel() == 7
