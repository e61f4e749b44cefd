"""SSL4Rec against its towers and losses, written out interaction by interaction."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.core.sampling import choose
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned
from perfedrec.methods.centralised.ssl4rec import SSL4Rec, SSL4RecSettings
from perfedrec.methods.centralised.vectors import batches

Table = NDArray[np.float64]
SMALL = {"embedding_dim": 3, "hidden_dim": 4, "output_dim": 2, "l2": 0.0}


def learned(method: SSL4Rec, vectors: tuple[Tensor, Tensor]) -> Learned:
    """Random weights, biases included."""
    flat, _ = method.network()
    return Learned(*vectors, flat.unpack(torch.randn(flat.size, generator=torch.Generator().manual_seed(1))))


def tower(vector: Table, weights: list[Tensor]) -> Table:
    into, bias, out, shift = (each.numpy().astype(np.float64) for each in weights)
    result: Table = np.tanh(np.maximum(vector @ into + bias, 0) @ out + shift)
    return result


def cosine(a: Table, b: Table) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def softmax_loss(similarities: list[float], own: int, temperature: float) -> float:
    parts = [exp(each / temperature) for each in similarities]
    return -log(parts[own] / sum(parts))


def test_an_interaction_among_the_items_of_the_batch(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = SSL4Rec(SSL4RecSettings(**SMALL, weight=0, temperature=0.3))
    given, batch = learned(method, toy_vectors), batches(toy, 6, Key(3))[0]
    users = [tower(toy_vectors[0][u].numpy(), given.weights[:4]) for u in batch.users]
    items = [tower(toy_vectors[1][i].numpy(), given.weights[4:]) for i in batch.positives]
    terms = [softmax_loss([cosine(user, each) for each in items], place, 0.3) for place, user in enumerate(users)]
    assert float(method.loss(given, batch, toy)) == pytest.approx(float(np.mean(terms)), rel=1e-4)


@pytest.mark.parametrize("contrasted", ["random", "batch"])
def test_contrast_between_two_views_of_items(
    contrasted: str, toy: Training, toy_vectors: tuple[Tensor, Tensor]
) -> None:
    settings = SSL4RecSettings(**SMALL, batch_size=3, weight=2.0, temperature=0.3, drop=0.4, contrasted=contrasted)
    method, batch = SSL4Rec(settings), batches(toy, 3, Key(3))[0]
    given, key = learned(method, toy_vectors), batch.key
    chosen = choose(5, 3, key.fold("contrasted")) if contrasted == "random" else batch.positives
    views = []
    for number in (0, 1):
        kept = uniform(key.fold("view", number).spread(torch.arange(3)), 3) >= 0.4
        rows = (toy_vectors[1][chosen] * kept / 0.6).numpy()
        views.append([tower(row, given.weights[4:]) for row in rows])
    terms = [softmax_loss([cosine(one, each) for each in views[1]], place, 0.3) for place, one in enumerate(views[0])]
    without = SSL4Rec(settings.model_copy(update={"weight": 0.0}))
    difference = float(method.loss(given, batch, toy)) - float(without.loss(given, batch, toy))
    assert difference == pytest.approx(2 * float(np.mean(terms)), rel=1e-4)


@pytest.mark.parametrize("scoring", ["cosine", "product"])
def test_scores_are_those_of_the_towers(scoring: str, toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = SSL4Rec(SSL4RecSettings(**SMALL, scoring=scoring))
    start = method.init(toy, Key(0))
    flat, _ = method.network()
    assert start.weights is not None
    assert start.weights.shape == (-(-flat.size // 3), 3)  # 52 weights in rows of three
    state = replace(start, users=toy_vectors[0], items=toy_vectors[1])
    weights = flat.unpack(start.weights.flatten()[: flat.size])
    users, items = (
        [tower(row.numpy(), part) for row in rows]
        for rows, part in zip(toy_vectors, (weights[:4], weights[4:]), strict=True)
    )
    score = cosine if scoring == "cosine" else np.dot
    expected = [[score(user, item) for item in items] for user in users]
    given = method.scores(method.serving(state, toy), toy, torch.arange(4))
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_an_epoch_learns_all_and_nothing_fills_up(toy: Training) -> None:
    method = SSL4Rec(SSL4RecSettings(**SMALL, batch_size=4, learning_rate=0.05))
    before = method.init(toy, Key(0))
    after, loss = method.epoch(before, toy, Key(1))
    assert (after.steps, loss > 0) == (2, True)
    assert after.weights is not None
    assert before.weights is not None
    assert not torch.equal(after.users, before.users)
    assert not torch.equal(after.weights, before.weights)
    beyond = method.network()[0].size
    assert not after.weights.flatten()[beyond:].any()
