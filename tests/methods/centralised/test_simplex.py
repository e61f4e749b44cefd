"""SimpleX against its loss and its pooling, written out pair by pair."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.simplex import MappedVectors, SimpleX, SimpleXSettings
from perfedrec.methods.centralised.vectors import batches, shared_negatives

MATRIX = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 1.0]])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pooled(data: Training, users: Tensor, items: Tensor, gamma: float) -> np.ndarray:
    matrix, table = data.matrix.toarray(), items.numpy()
    means = [table[matrix[user].nonzero()[0]].mean(0) for user in range(data.n_users)]
    return np.stack([gamma * users[u].numpy() + (1 - gamma) * MATRIX.numpy() @ means[u] for u in range(data.n_users)])


def test_pooling(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    (users, items), own = toy_vectors, toy.matrix.toarray()
    means = torch.stack([items[own[user].nonzero()[0]].mean(0) for user in range(toy.n_users)])
    given = SimpleX(SimpleXSettings(gamma=0.3)).pooled(users, means, MATRIX)
    np.testing.assert_allclose(given.numpy(), pooled(toy, *toy_vectors, 0.3), rtol=1e-5)


def test_loss(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = SimpleX(SimpleXSettings(n_negatives=5, negative_weight=7.0, margin=-0.2, gamma=0.3, l2=0.4))
    batch, items = batches(toy, 5, Key(3))[0], toy_vectors[1].numpy()
    users, terms = pooled(toy, *toy_vectors, 0.3), []
    for u, i in zip(batch.users.tolist(), batch.positives.tolist(), strict=True):
        others = [j for j in range(5) if not toy.matrix.toarray()[u, j]]
        above = [max(0.0, cosine(users[u], items[j]) + 0.2) for j in others]
        terms.append(1 - cosine(users[u], items[i]) + 7.0 * float(np.mean(above)))
    squares = sum(
        float(table[place].square().sum())
        for table, place in zip(
            (*toy_vectors, toy_vectors[1]), (batch.users, batch.positives, batch.negatives), strict=True
        )
    )
    expected = float(np.mean(terms)) + 0.2 * squares / 5
    assert float(method.loss(*toy_vectors, MATRIX, batch, toy)) == pytest.approx(expected, rel=1e-5)


def test_dropout_leaves_out_numbers_of_users(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    """Without negatives the loss is 1 minus a sum of products. Dropout leaves out some and scales the rest: the mean
    over draws is the loss without it."""
    batch = batches(toy, 8, Key(3))[0]

    def loss(dropout: float, key: Key) -> float:
        method = SimpleX(SimpleXSettings(negative_weight=0.0, dropout=dropout, l2=0))
        drawn = type(batch)(batch.users, batch.positives, batch.negatives, key)
        return float(method.loss(*toy_vectors, MATRIX, drawn, toy))

    draws = [loss(0.5, Key(number)) for number in range(400)]
    assert len(set(draws)) > 100
    assert loss(0.5, Key(1)) == loss(0.5, Key(1))
    error = float(np.std(draws)) / 20
    assert float(np.mean(draws)) == pytest.approx(loss(0.0, Key(0)), abs=4 * error)


def test_scores_are_cosines(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = SimpleX(SimpleXSettings(gamma=0.3))
    served = method.serving(MappedVectors(*toy_vectors, matrix=MATRIX), toy)
    own = pooled(toy, *toy_vectors, 0.3)
    expected = [[cosine(own[u], toy_vectors[1][i].numpy()) for i in range(5)] for u in range(4)]
    np.testing.assert_allclose(method.scores(served, toy, torch.arange(4)).numpy(), expected, rtol=1e-5)


def test_an_epoch_learns_vectors_and_matrix(toy: Training) -> None:
    method = SimpleX(SimpleXSettings(embedding_dim=3, batch_size=4, learning_rate=0.05))
    before = method.init(toy, Key(0))
    after, loss = method.epoch(before, toy, Key(1))
    assert after.steps == 2
    assert loss > 0
    assert before.matrix is not None
    assert after.matrix is not None
    assert not torch.equal(after.matrix, before.matrix)
    assert not torch.equal(after.users, before.users)


def test_negatives_are_shared_but_never_items_of_the_user(toy: Training) -> None:
    batch, matrix, drawn = batches(toy, 8, Key(3))[0], toy.matrix.toarray(), set()
    for number in range(20):
        here = type(batch)(batch.users, batch.positives, batch.negatives, Key(number))
        items, outside = shared_negatives(here, toy, 3)
        assert len(set(items.tolist())) == 3
        np.testing.assert_array_equal(outside.numpy(), matrix[batch.users.numpy()][:, items.numpy()] == 0)
        drawn |= set(items.tolist())
    assert drawn == set(range(5))
    assert shared_negatives(batch, toy, 9)[0].numel() == 5
