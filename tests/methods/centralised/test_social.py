"""SEPT and MHCN against their views, channels and losses, in dense matrices and user by user."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.data import Relations
from perfedrec.methods.centralised import sept
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mhcn import MHCN, MHCNSettings
from perfedrec.methods.centralised.networked import Learned
from perfedrec.methods.centralised.sept import SEPT, SEPTSettings
from perfedrec.methods.centralised.vectors import batches

Table = NDArray[np.float64]


@pytest.fixture
def social(toy: Training) -> Training:
    """The toy with five relations, one of them mutual: users 0 and 1, 0 and 2, 1 and 2, 2 and 3 know each other."""
    return replace(toy, relations=Relations.of(4, np.array([0, 1, 0, 1, 3]), np.array([1, 0, 2, 2, 2])))


FRIENDS = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]], dtype=float)


def table(vectors: Tensor) -> Table:
    return vectors.numpy().astype(np.float64)


def lightgcn(adjacency: Table, users: Table, items: Table, n_layers: int = 2) -> tuple[Table, Table]:
    all_users, all_items = [users], [items]
    for _ in range(n_layers):
        users, items = adjacency @ items, adjacency.T @ users
        all_users.append(users)
        all_items.append(items)
    return np.mean(all_users, axis=0), np.mean(all_items, axis=0)


def unit(rows: Table) -> Table:
    result: Table = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def ranking(users: Table, items: Table, batch: object) -> float:
    drawn = (getattr(batch, name).tolist() for name in ("users", "positives", "negatives"))
    return float(
        np.mean([log(1 + exp(users[u] @ items[j] - users[u] @ items[i])) for u, i, j in zip(*drawn, strict=True)])
    )


def test_tri_training(social: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    settings = SEPTSettings(weight=2.0, temperature=0.3, n_positives=2, l2=0, drop=0.4)
    method, batch = SEPT(settings), batches(social, 8, Key(3))[0]
    method.begin(*toy_vectors, social, Key(5))
    perturbed = method.perturbed.to_users(torch.eye(5)).numpy().astype(np.float64)
    assert 0 < (perturbed > 0).sum() < 8
    matrix, (users, items) = social.matrix.toarray(), (table(each) for each in toy_vectors)
    views = []
    for weights in ((FRIENDS @ FRIENDS) * FRIENDS + np.eye(4), (matrix @ matrix.T) * FRIENDS + np.eye(4)):
        sums = weights.sum(1)
        graph = weights / np.sqrt(np.outer(sums, sums))
        views.append(np.mean([users, graph @ users, graph @ graph @ users], axis=0))
    normalised = matrix / np.sqrt(np.outer(matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)))
    final = lightgcn(normalised, users, items)
    views.append(final[0])
    other = unit(lightgcn(perturbed, users, items)[0])
    cosines = [unit(each) @ other.T for each in views]
    assert sorted(set(batch.users.tolist())) == [0, 1, 2, 3]
    expected = 0.0
    for number in range(3):
        for user in range(4):
            beliefs = [np.exp(cosines[v][user]) / np.exp(cosines[v][user]).sum() for v in range(3) if v != number]
            best = np.argsort(-np.mean(beliefs, axis=0))[:2]
            parts = np.exp(cosines[number][user] / 0.3)
            expected -= log(parts[best].sum() / parts.sum()) / 4
    given = float(method.loss(*toy_vectors, batch, social))
    assert given == pytest.approx(ranking(*final, batch) + 2 * expected, rel=1e-5)


def test_the_contrast_begins_after_the_warm_up(social: Training) -> None:
    """Two epochs of two batches without it, whatever is resumed: the state's number of steps decides."""
    plain, method = (  # with one positive, as all users of a small batch would be positives
        SEPT(SEPTSettings(weight=weight, warmup=2, n_positives=1, embedding_dim=3, batch_size=4))
        for weight in (0.0, 5.0)
    )
    state = other = method.init(social, Key(0))
    for number in range(3):
        (state, loss), (other, without) = (
            each.epoch(here, social, Key(number)) for each, here in ((method, state), (plain, other))
        )
        assert (loss == without) == (number < 2)
    assert not torch.equal(state.users, other.users)


def parts(method: MHCN) -> list[Tensor]:
    flat, _ = method.network()
    return flat.unpack(torch.randn(flat.size, generator=torch.Generator().manual_seed(1)))


def gated(vectors: Table, matrix: Tensor, bias: Tensor) -> Table:
    result: Table = vectors / (1 + np.exp(-(vectors @ table(matrix) + table(bias))))
    return result


def attended(channels: list[Table], vector: Tensor, matrix: Tensor) -> Table:
    mixed = np.zeros_like(channels[0])
    for user in range(mixed.shape[0]):
        scores = np.exp([float(table(vector) @ (each[user] @ table(matrix))) for each in channels])
        mixed[user] = sum(share * each[user] for share, each in zip(scores / scores.sum(), channels, strict=True))
    return mixed


def hypergraphs(matrix: Table) -> list[Table]:
    """The channels with counts of motifs divided by the sum of their row."""
    common = matrix @ matrix.T
    weights = (FRIENDS @ FRIENDS) * FRIENDS, common * FRIENDS, np.where((FRIENDS == 0) & (common >= 2), common, 0)
    sums = [each.sum(1, keepdims=True) for each in weights]
    return [
        np.divide(each, total, out=np.zeros_like(each), where=total > 0)
        for each, total in zip(weights, sums, strict=True)
    ]


def naive(weights: list[Tensor], matrix: Table, users: Table, items: Table) -> tuple[Table, Table]:
    graphs = hypergraphs(matrix)
    channels = [gated(users, weights[2 * c], weights[2 * c + 1]) for c in range(3)]
    simple = gated(users, weights[6], weights[7])
    seen = [[each] for each in (*channels, simple, items)]
    to_users, to_items = (matrix.T / matrix.sum(1)).T, (matrix / matrix.sum(0).clip(min=1)).T
    for _ in range(2):
        mixed = attended(channels, *weights[-2:]) + simple / 2
        channels = [graph @ each for graph, each in zip(graphs, channels, strict=True)]
        simple, items = to_users @ items, to_items @ mixed
        for kept, each in zip(seen, (*channels, simple, items), strict=True):
            kept.append(each)
    means = [np.mean(each, axis=0) for each in seen]
    return attended(means[:3], *weights[-2:]) + means[3] / 2, means[4]


def test_channels_of_mhcn(social: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = MHCN(MHCNSettings(embedding_dim=3, fewest_shared=2))
    weights = parts(method)
    given = method.encode(Learned(*toy_vectors, weights), social)
    expected = naive(weights, social.matrix.toarray(), *(table(each) for each in toy_vectors))
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-6)
    assert method.graphs(social) is method.graphs(social)
    assert method.graphs(replace(social)) is not method.graphs(social)


def test_self_supervision_of_mhcn(social: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    settings = MHCNSettings(embedding_dim=3, fewest_shared=2, weight=2.0, l2=0)
    method, batch = MHCN(settings), batches(social, 8, Key(3))[0]
    weights, matrix = parts(method), social.matrix.toarray()
    users, items = naive(weights, matrix, *(table(each) for each in toy_vectors))
    expected = 0.0
    for c, graph in enumerate(hypergraphs(matrix)):
        own = gated(users, weights[8 + 2 * c], weights[9 + 2 * c])
        near, key = graph @ own, batch.key.fold("corrupted", c)
        rows, columns = (choose(size, size, key.fold(name)).numpy() for name, size in (("rows", 4), ("columns", 3)))
        other, centre = near[rows][:, columns], near.mean(0)
        for user in range(4):
            local = own[user] @ other[user] - own[user] @ near[user]
            whole = other[user] @ centre - near[user] @ centre
            expected += (log(1 + exp(local)) + log(1 + exp(whole))) / 4
    given = float(method.loss(Learned(*toy_vectors, weights), batch, social))
    assert given == pytest.approx(ranking(users, items, batch) + 2 * expected, rel=1e-4)


def test_an_epoch_of_mhcn_learns_vectors_and_weights(social: Training) -> None:
    method = MHCN(MHCNSettings(embedding_dim=3, batch_size=4, learning_rate=0.05))
    before = method.init(social, Key(0))
    after, loss = method.epoch(before, social, Key(1))
    assert (after.steps, loss > 0) == (2, True)
    for name in ("users", "items", "weights"):
        assert not torch.equal(getattr(after, name), getattr(before, name)), name


def plain_tri_training(vectors: list[Tensor], temperature: float, n_positives: int) -> Tensor:
    *views, other = (torch.nn.functional.normalize(each, dim=1) for each in vectors)
    cosines = [each @ other.T for each in views]
    beliefs = [each.detach().softmax(1) for each in cosines]
    parts = []
    for number, own in enumerate(cosines):
        positives = (beliefs[number - 1] + beliefs[number - 2]).topk(n_positives, dim=1).indices
        parts.append((own / temperature).logsumexp(1) - (own / temperature).gather(1, positives).logsumexp(1))
    return torch.stack(parts).sum(0).mean()


@pytest.mark.parametrize(
    ("n", "block", "dtype", "temperature"),
    [
        (7, 100, torch.float64, 0.2),
        (7, 3, torch.float64, 0.2),
        (70, 64, torch.float32, 0.2),
        (300, 128, torch.float32, 0.01),
    ],
)
def test_the_contrast_of_sept_and_its_gradient(
    n: int, block: int, dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of plain torch in float64, for any size of the blocks; in float32 by a kernel."""
    monkeypatch.setattr(sept, "BLOCK", block)
    method, generator = SEPT(SEPTSettings(n_positives=4, temperature=temperature)), torch.Generator().manual_seed(1)
    vectors, found = [torch.randn(n, 3, dtype=torch.float64, generator=generator) for _ in range(4)], []
    for kind in (dtype, None):
        leaves = [each.to(kind or torch.float64, copy=True).requires_grad_() for each in vectors]
        value = method.tri_training(leaves[:3], leaves[3]) if kind else plain_tri_training(leaves, temperature, 4)
        found.append((value.detach(), *torch.autograd.grad(2 * value, leaves)))
    for own, expected in zip(*found, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(
            (own / scale).double(), expected / scale, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5
        )


def test_a_contrast_of_sept_that_is_not_a_number_stays_so() -> None:
    method = SEPT(SEPTSettings(n_positives=2))
    vectors = [torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) for _ in range(4)]
    vectors[1][2] = torch.nan
    assert bool(method.tri_training(vectors[:3], vectors[3]).isnan())
