"""BUIR and SelfCF against their losses, targets and scores, written out node by node."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.bootstrap import Bootstrap, BootstrapVectors
from perfedrec.methods.centralised.buir import BUIR, BUIRSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.networked import Learned
from perfedrec.methods.centralised.selfcf import SelfCF, SelfCFSettings
from perfedrec.methods.centralised.vectors import Batch, batches
from perfedrec.nn.propagation import Bipartite

Table = NDArray[np.float64]
MATRIX = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 1.0]])
BIAS = torch.tensor([0.1, -0.2, 0.3])


def given(vectors: tuple[Tensor, Tensor]) -> Learned:
    return Learned(*vectors, [MATRIX, BIAS])


def table(vectors: Tensor) -> Table:
    return vectors.numpy().astype(np.float64)


def propagated(adjacency: Table, users: Table, items: Table) -> tuple[Table, Table]:
    """LightGCN of two layers with the dense normalised adjacency [n, m]."""
    all_users, all_items = [users], [items]
    for _ in range(2):
        users, items = adjacency @ items, adjacency.T @ users
        all_users.append(users)
        all_items.append(items)
    return np.mean(all_users, axis=0), np.mean(all_items, axis=0)


def dense(graph: Bipartite, data: Training) -> Table:
    return graph.to_users(torch.eye(data.n_items)).numpy().astype(np.float64)


def predicted(vector: Table) -> Table:
    result: Table = MATRIX.numpy() @ vector + BIAS.numpy()
    return result


def cosine(a: Table, b: Table) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def mean_cosine(online: tuple[Table, Table], target: tuple[Table, Table], batch: Batch) -> float:
    pairs = list(zip(batch.users.tolist(), batch.positives.tolist(), strict=True))
    users, items = (
        np.mean([cosine(predicted(online[0][u]), target[1][i]) for u, i in pairs]),
        np.mean([cosine(predicted(online[1][i]), target[0][u]) for u, i in pairs]),
    )
    return float(users + items) / 2


def test_loss_of_buir(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    """Each encoder has a graph of its own, and the online one predicts the target one."""
    method, batch = BUIR(BUIRSettings(drop=0.9)), batches(toy, 5, Key(4))[0]
    method.past = toy_vectors[0].flip(0), toy_vectors[1].flip(0)
    graphs = [dense(method.view(batch, number, toy), toy) for number in (0, 1)]
    assert not np.allclose(*graphs)
    online = propagated(graphs[0], *(table(each) for each in toy_vectors))
    target = propagated(graphs[1], *(table(each) for each in method.past))
    expected = 4 - 4 * mean_cosine(online, target, batch)
    assert float(method.loss(given(toy_vectors), batch, toy)) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_the_targets_of_buir(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = BUIR()
    method.past = tuple(each.clone().requires_grad_() for each in toy_vectors)  # type: ignore[assignment]
    learned = given(tuple(each.clone().requires_grad_() for each in toy_vectors))  # type: ignore[arg-type]
    method.loss(learned, batches(toy, 5, Key(4))[0], toy).backward()  # type: ignore[no-untyped-call]
    assert learned.users.grad is not None
    assert [each.grad for each in method.past] == [None, None]


def test_the_target_encoder_follows_the_online_one(toy: Training) -> None:
    """After each of the steps of an epoch: ``x <- t x + (1 - t) theta``, beginning with the first online vectors."""
    settings = BUIRSettings(momentum=0.7, embedding_dim=3, batch_size=4, learning_rate=0.05)
    seen: list[Tensor] = []

    class Watched(BUIR):
        def after(self, learned: Learned, batch: Batch, data: Training) -> None:
            seen.append(learned.users.clone())
            super().after(learned, batch, data)

    start = Watched(settings).init(toy, Key(0))
    done, _ = Watched(settings).epoch(start, toy, Key(1))
    assert len(seen) == done.steps == 2
    assert start.past_users is not None
    assert torch.equal(start.past_users, start.users)
    expected = 0.7 * (0.7 * start.users + 0.3 * seen[0]) + 0.3 * seen[1]
    torch.testing.assert_close(done.past_users, expected)
    assert torch.equal(seen[1], done.users)


def test_loss_of_selfcf(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    """The second of two equal batches has the first one's vectors as its history; the first has none."""
    method, batch = SelfCF(SelfCFSettings(momentum=0.4)), batches(toy, 4, Key(4))[0]
    method.past = torch.zeros(4, 3), torch.zeros(5, 3)
    before = propagated(dense(toy.graph, toy), *(table(each) for each in toy_vectors))
    first = float(method.loss(given(toy_vectors), batch, toy))
    assert first == pytest.approx(1 - mean_cosine(before, before, batch), rel=1e-5)
    moved = toy_vectors[0].flip(0), toy_vectors[1].flip(0)
    now = propagated(dense(toy.graph, toy), *(table(each) for each in moved))
    targets = tuple(0.4 * old + 0.6 * new for old, new in zip(before, now, strict=True))
    second = float(method.loss(given(moved), batch, toy))
    assert second == pytest.approx(1 - mean_cosine(now, (targets[0], targets[1]), batch), rel=1e-5)
    others = sorted(set(range(4)) - set(batch.users.tolist()))
    assert torch.equal(method.past[0][others], torch.zeros(len(others), 3))


@pytest.mark.parametrize("method", [BUIR(BUIRSettings(embedding_dim=3)), SelfCF(SelfCFSettings(embedding_dim=3))])
def test_scores_are_those_of_both_directions(
    method: Bootstrap, toy: Training, toy_vectors: tuple[Tensor, Tensor]
) -> None:
    state = replace(method.init(toy, Key(0)), users=toy_vectors[0], items=toy_vectors[1])
    state = replace(state, weights=torch.cat([MATRIX, BIAS[None]]))
    users, items = propagated(dense(toy.graph, toy), *(table(each) for each in toy_vectors))
    expected = [[predicted(user) @ item + user @ predicted(item) for item in items] for user in users]
    served = method.serving(state, toy)
    np.testing.assert_allclose(method.scores(served, toy, torch.arange(4)).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [BUIR, SelfCF])
def test_an_epoch_learns_vectors_and_predictor(kind: type[Bootstrap], toy: Training) -> None:
    options = {"embedding_dim": 3, "batch_size": 4, "learning_rate": 0.05}
    method = kind(kind.Options(**options))
    before = method.init(toy, Key(0))
    kept = replace(before, past_users=before.past_users.clone())  # type: ignore[union-attr]
    after, loss = method.epoch(before, toy, Key(1))
    assert isinstance(after, BootstrapVectors)
    assert 0 < loss < 8
    for name in ("users", "items", "weights", "past_users", "past_items"):
        assert not torch.equal(getattr(after, name), getattr(before, name)), name
    assert torch.equal(before.past_users, kept.past_users)  # type: ignore[arg-type]
    heavy = kind(kind.Options(**options, l2=1.0)).epoch(before, toy, Key(1))[1]
    assert heavy > loss
