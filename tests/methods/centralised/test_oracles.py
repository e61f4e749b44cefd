"""Fitted methods against naive dense computations, and losses against their definitions."""

from collections.abc import Callable
from itertools import combinations
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import ElasticNet

from perfedrec import Dataset, configure, load, train
from perfedrec.core import memory
from perfedrec.core.errors import ConfigError, DivergedError
from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, block_rows
from perfedrec.methods.centralised import ease, ials, slim
from perfedrec.methods.centralised.direct_au import DirectAU, DirectAUSettings
from perfedrec.methods.centralised.ease import EASE, EASESettings
from perfedrec.methods.centralised.gf_cf import GFCF, GFCFSettings
from perfedrec.methods.centralised.ials import IALS, IALSSettings
from perfedrec.methods.centralised.item_knn import ItemKNN, ItemKNNSettings
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.mf import MF, MFSettings
from perfedrec.methods.centralised.rp3beta import RP3Beta, RP3BetaSettings
from perfedrec.methods.centralised.sgl import SGL, SGLSettings
from perfedrec.methods.centralised.simgcl import SimGCL, SimGCLSettings
from perfedrec.methods.centralised.slim import SLIM, SLIMSettings
from perfedrec.methods.centralised.spectral_filter import SpectralFilter, SpectralFilterSettings
from perfedrec.methods.centralised.user_knn import UserKNN, UserKNNSettings
from perfedrec.methods.centralised.vectors import VectorSettings, batches
from perfedrec.methods.centralised.xsimgcl import XSimGCL, XSimGCLSettings
from perfedrec.runs.engine import Central

N_USERS, N_ITEMS = 60, 38


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=60,items=40,clusters=2,interactions_per_user=8,seed=1")


@pytest.fixture(scope="module")
def training(dataset: Dataset) -> Training:
    return Training.of(dataset, torch.device("cpu"))


def dense(dataset: Dataset) -> np.ndarray:
    matrix = np.zeros((dataset.n_users, dataset.n_items))
    for user in range(dataset.n_users):
        matrix[user, dataset.train.items[dataset.train.offsets[user] : dataset.train.offsets[user + 1]]] = 1
    return matrix


def scores(method: Method, dataset: Dataset) -> np.ndarray:
    engine = Central(method, dataset, device="cpu")
    return engine.recommender().raw_scores(torch.arange(dataset.n_users)).numpy()


def test_item_knn(dataset: Dataset) -> None:
    matrix = dense(dataset)
    lengths = np.sqrt(matrix.sum(0).clip(min=1))
    similar = matrix.T @ matrix / (np.outer(lengths, lengths) + 3.0)
    np.fill_diagonal(similar, 0)
    given = scores(ItemKNN(ItemKNNSettings(n_neighbours=40, shrink=3.0)), dataset)
    np.testing.assert_allclose(given, matrix @ similar, rtol=1e-5)


def test_only_the_nearest_neighbours_count(dataset: Dataset) -> None:
    matrix = dense(dataset)
    lengths = np.sqrt(matrix.sum(1).clip(min=1))
    similar = matrix @ matrix.T / (np.outer(lengths, lengths) + 1.0)
    np.fill_diagonal(similar, 0)
    smallest = np.sort(similar, axis=1)[:, -5]
    kept = np.where(similar >= smallest[:, None], similar, 0)
    given = scores(UserKNN(UserKNNSettings(n_neighbours=5, shrink=1.0)), dataset)
    np.testing.assert_allclose(given, kept @ matrix, rtol=1e-5, atol=1e-6)


def test_rp3beta_by_walking(dataset: Dataset) -> None:
    """With alpha 1 and beta 0 the scores are probabilities of three random steps."""
    matrix = dense(dataset)
    users, items = matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)
    back = (matrix / items).T @ (matrix / users[:, None])
    np.fill_diagonal(back, 0)
    given = scores(RP3Beta(RP3BetaSettings(alpha=1.0, beta=0.0, n_neighbours=40)), dataset)
    np.testing.assert_allclose(given, matrix @ back, rtol=1e-5)
    given = scores(RP3Beta(RP3BetaSettings(alpha=1.0, beta=0.5, n_neighbours=40)), dataset)
    np.testing.assert_allclose(given, matrix @ back / items**0.5, rtol=1e-5)


def test_spectral_filter(dataset: Dataset) -> None:
    matrix = dense(dataset)
    users, items = matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)
    vectors = np.linalg.svd(matrix / np.sqrt(np.outer(users, items)))[2][:7].T
    expected = matrix / np.sqrt(items) @ vectors @ vectors.T * np.sqrt(items)
    given = scores(SpectralFilter(SpectralFilterSettings(n_components=7)), dataset)
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_gf_cf(dataset: Dataset) -> None:
    matrix = dense(dataset)
    users, items = matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)
    normal = matrix / np.sqrt(np.outer(users, items))
    vectors = np.linalg.svd(normal)[2][:7].T
    ideal = vectors @ vectors.T / np.sqrt(items)[:, None] * np.sqrt(items)
    given = scores(GFCF(GFCFSettings(n_components=7, weight=0.3)), dataset)
    np.testing.assert_allclose(given, matrix @ (normal.T @ normal + 0.3 * ideal), atol=1e-5)


@pytest.mark.parametrize("n_users", [N_USERS, 20])
@pytest.mark.parametrize("at_once", [1024, 7])
def test_ease(at_once: int, n_users: int, monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """With more users than items, and with fewer, where the inverse is one between users; in blocks and at once; and
    for users who were not in training."""
    monkeypatch.setattr(ease, "ROWS_AT_ONCE", at_once)
    matrix, data, method = dense(dataset)[:n_users], first_users(dataset, n_users), EASE(EASESettings(l2=7.0))
    inverse = np.linalg.inv(matrix.T @ matrix + 7.0 * np.eye(N_ITEMS))
    between = np.eye(N_ITEMS) - inverse / inverse.diagonal()
    state, users = method.init(data, Key(0)), torch.arange(n_users)
    assert isinstance(state, ease.BetweenItems) == (n_users >= N_ITEMS)
    np.testing.assert_allclose(method.scores(state, data, users), matrix @ between, atol=1e-5)
    everyone = first_users(dataset, N_USERS).rows
    np.testing.assert_allclose(method.scores_of_new_users(state, data, everyone), dense(dataset) @ between, atol=1e-5)


def test_ease_is_ridge_regression_of_each_item_on_the_others(dataset: Dataset) -> None:
    matrix, data = dense(dataset), first_users(dataset, N_USERS)
    state = EASE(EASESettings(l2=2.0)).init(data, Key(0))
    assert isinstance(state, ease.BetweenItems)
    for item in range(0, N_ITEMS, 5):
        others = np.delete(matrix, item, axis=1)
        fitted = np.linalg.solve(others.T @ others + 2.0 * np.eye(N_ITEMS - 1), others.T @ matrix[:, item])
        np.testing.assert_allclose(np.delete(state.weights.numpy()[:, item], item), fitted, atol=1e-5)


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * N_ITEMS**2 - 1)
    with pytest.raises(ConfigError, match=r"EASE.*38 items needs about 0\.0 GB of memory.*expected a machine"):
        scores(EASE(), dataset)
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * N_ITEMS**2)
    scores(EASE(), dataset)


def test_an_l2_that_is_too_small_is_named() -> None:
    """Items that the same users have make the matrix singular."""
    same = sparse.csr_array(np.ones((3, 2), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"method.l2 = 1e-12 is too small"):
        ease.inverse(same, 1e-12)


def test_slim_is_an_elastic_net_for_each_item(dataset: Dataset, training: Training) -> None:
    """Of scikit-learn, whose loss is divided by the number of users."""
    matrix = dense(dataset)
    given = SLIM(SLIMSettings(l1=0.7, l2=3.0, tolerance=1e-6)).init(training, Key(0)).matrix().toarray()
    net = ElasticNet(alpha=3.7 / N_USERS, l1_ratio=0.7 / 3.7, positive=True, fit_intercept=False, tol=1e-9)
    for item in range(N_ITEMS):
        others = matrix.copy()
        others[:, item] = 0
        np.testing.assert_allclose(given[:, item], net.fit(others, matrix[:, item]).coef_, atol=1e-5)
    assert 0 < np.count_nonzero(given) < N_ITEMS**2 / 3
    found = scores(SLIM(SLIMSettings(l1=0.7, l2=3.0, tolerance=1e-6)), dataset)
    np.testing.assert_allclose(found, matrix @ given, rtol=1e-5)


def test_slim_with_few_neighbours_is_an_elastic_net_on_these(dataset: Dataset, training: Training) -> None:
    matrix = dense(dataset)
    method = SLIM(SLIMSettings(l1=0.5, l2=3.0, tolerance=1e-6, n_neighbours=3))
    given = method.init(training, Key(0)).matrix().toarray()
    cosines = matrix.T @ matrix / np.sqrt(np.outer(matrix.sum(0), matrix.sum(0)))
    np.fill_diagonal(cosines, 0)
    net = ElasticNet(alpha=3.5 / N_USERS, l1_ratio=0.5 / 3.5, positive=True, fit_intercept=False, tol=1e-9)
    for item in range(N_ITEMS):
        third, fourth = np.sort(cosines[item])[-3:-5:-1]
        if third > fourth + 1e-6:  # otherwise other items are as similar as the third
            near = matrix * (cosines[item] >= third)
            np.testing.assert_allclose(given[:, item], net.fit(near, matrix[:, item]).coef_, atol=1e-5)
    assert (given > 0).sum(0).max() == 3


def test_slim_item_by_item_and_at_once(monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    """Each item is fitted until its own weights are final, and for long enough if others are fitted beside it."""
    method = SLIM(SLIMSettings(l1=0.3, l2=1.0, tolerance=1e-6))
    whole = method.init(training, Key(0)).matrix().toarray()
    monkeypatch.setattr(slim, "AT_ONCE", 1)
    np.testing.assert_allclose(method.init(training, Key(0)).matrix().toarray(), whole, atol=1e-5)


def test_slim_with_so_much_l1_that_no_weight_is_left(dataset: Dataset) -> None:
    assert not scores(SLIM(SLIMSettings(l1=1000.0)), dataset).any()


@pytest.mark.parametrize("at_once", [1 << 21, 1])
def test_ials_by_solving_for_each_user_and_item(
    at_once: int, monkeypatch: pytest.MonkeyPatch, dataset: Dataset, training: Training
) -> None:
    """An epoch in dense float64, with the weights of all pairs written out; in batches and one by one."""
    monkeypatch.setattr(ials, "AT_ONCE", at_once)
    settings = IALSSettings(embedding_dim=5, unobserved_weight=0.2, l2=0.1, l2_exponent=0.7)
    method, matrix = IALS(settings), dense(dataset)
    first = method.init(training, Key(3))
    state, loss = method.epoch(first, training, Key(4))

    def solved(interactions: np.ndarray, other: np.ndarray) -> np.ndarray:
        rows = []
        for row in interactions:
            l2 = 0.1 * (row.sum() + 0.2 * row.size) ** 0.7
            left = other.T @ np.diag(row + 0.2) @ other + l2 * np.eye(5)
            rows.append(np.linalg.solve(left, other.T @ row))
        return np.array(rows)

    users = solved(matrix, first.vectors.numpy().astype(np.float64))
    items = solved(matrix.T, users)
    np.testing.assert_allclose(state.vectors, items, atol=1e-4)
    predicted = users @ items.T
    expected = (matrix * (predicted - 1) ** 2 + 0.2 * predicted**2).sum() / matrix.sum()
    assert loss == pytest.approx(expected, rel=1e-4)
    given = method.scores(state, training, torch.arange(N_USERS))
    np.testing.assert_allclose(given, solved(matrix, items) @ items.T, atol=1e-4)


def test_ials_lowers_its_loss_and_serves_users_without_items(training: Training) -> None:
    method = IALS(IALSSettings(embedding_dim=8))
    state, losses = method.init(training, Key(3)), []
    for _ in range(6):
        state, loss = method.epoch(state, training, Key(0))
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    nobody = torch.zeros(0, dtype=torch.int64)
    rows = Rows(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 0]), nobody, nobody)
    assert not method.scores_of_new_users(state, training, rows).any()


def first_users(dataset: Dataset, n: int) -> Training:
    rows, _ = block_rows(torch.tensor(dataset.train.offsets), torch.tensor(dataset.train.items), torch.arange(n))
    return Training(rows, dataset.n_items)


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_USERS, 8, generator=generator), torch.randn(N_ITEMS, 8, generator=generator)


def propagated(dataset: Dataset, layers: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over layers ``first`` to ``layers`` with the dense adjacency."""
    matrix = dense(dataset)
    degrees = np.sqrt(np.outer(matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)))
    users, items = (each.numpy().astype(np.float64) for each in vectors())
    stacks = [(users, items)]
    for _ in range(layers):
        users, items = matrix / degrees @ items, (matrix / degrees).T @ users
        stacks.append((users, items))
    return tuple(np.mean([each[side] for each in stacks[first:]], axis=0) for side in (0, 1))  # type: ignore[return-value]


def naive_bpr(users: np.ndarray, items: np.ndarray, batch: object) -> float:
    triples = zip(batch.users.tolist(), batch.positives.tolist(), batch.negatives.tolist(), strict=True)  # type: ignore[attr-defined]
    return float(np.mean([log(1 + exp(-(users[u] @ (items[i] - items[j])))) for u, i, j in triples]))


@pytest.mark.parametrize(("kind", "settings", "first", "layers"), [
    (MF, VectorSettings(l2=0), 0, 0),
    (LightGCN, LightGCNSettings(l2=0, n_layers=3), 0, 3),
    (SGL, SGLSettings(l2=0, n_layers=2, weight=0), 0, 2),
    (SimGCL, SimGCLSettings(l2=0, n_layers=2, weight=0), 1, 2),
    (XSimGCL, XSimGCLSettings(l2=0, n_layers=2, weight=0, noise=0), 1, 2),
])  # fmt: skip
def test_ranking_losses(
    kind: type[Method], settings: VectorSettings, first: int, layers: int, dataset: Dataset, training: Training
) -> None:
    method, (users, items) = kind(settings), vectors()
    batch = batches(training, 50, Key(3))[0]
    method.begin(users, items, training, Key(4))  # type: ignore[attr-defined]
    loss = float(method.loss(users, items, batch, training))  # type: ignore[attr-defined]
    assert loss == pytest.approx(naive_bpr(*propagated(dataset, layers, first), batch), rel=1e-5)


def test_decay_and_contrast_add_to_the_loss(training: Training) -> None:
    users, items = vectors()
    batch = batches(training, 50, Key(3))[0]

    def loss(kind: type[Method], settings: VectorSettings) -> float:
        method = kind(settings)
        method.begin(users, items, training, Key(4))  # type: ignore[attr-defined]
        return float(method.loss(users, items, batch, training))  # type: ignore[attr-defined]

    squares = sum(
        float(table[index].square().sum())
        for table, index in ((users, batch.users), (items, batch.positives), (items, batch.negatives))
    )
    assert loss(MF, VectorSettings(l2=0.1)) - loss(MF, VectorSettings(l2=0)) == pytest.approx(0.05 * squares / 50)
    for kind, options in ((SGL, SGLSettings), (SimGCL, SimGCLSettings), (XSimGCL, XSimGCLSettings)):
        parts = [loss(kind, options(weight=weight)) for weight in (0, 1, 2)]
        assert parts[1] > parts[0]
        assert parts[2] - parts[1] == pytest.approx(parts[1] - parts[0], rel=1e-4)


def test_direct_au(dataset: Dataset, training: Training) -> None:
    method, (users, items) = DirectAU(DirectAUSettings(n_layers=1, gamma=0.7)), vectors()
    batch = batches(training, 12, Key(3))[0]
    final = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in propagated(dataset, 1, 0)]
    chosen = final[0][batch.users.numpy()], final[1][batch.positives.numpy()]
    spread = [
        log(np.mean([exp(-2 * float(((a - b) ** 2).sum())) for a, b in combinations(side, 2)])) for side in chosen
    ]
    expected = ((chosen[0] - chosen[1]) ** 2).sum(1).mean() + 0.7 * sum(spread) / 2
    assert float(method.loss(users, items, batch, training)) == pytest.approx(expected, rel=1e-5)


def test_sgl_views_leave_edges_out(training: Training) -> None:
    method = SGL(SGLSettings(drop=0.3))
    method.begin(*vectors(), training, Key(4))
    sizes = [broadcast.by_user.columns.numel() / training.rows.items.numel() for broadcast in method.views]
    assert all(0.6 < size < 0.8 for size in sizes)
    assert not torch.equal(method.views[0].by_user.columns, method.views[1].by_user.columns)


def test_batches_hold_every_interaction_once_with_a_negative_of_its_user(training: Training) -> None:
    parts = batches(training, 64, Key(1))
    owned = set(zip(training.rows.segments.tolist(), training.rows.items.tolist(), strict=True))
    pairs = [pair for part in parts for pair in zip(part.users.tolist(), part.positives.tolist(), strict=True)]
    assert sorted(pairs) == sorted(owned)
    assert not owned & {
        pair for part in parts for pair in zip(part.users.tolist(), part.negatives.tolist(), strict=True)
    }


def test_batches_hold_every_interaction_of_a_user_with_most_items() -> None:
    """A user with 7 of 9 items uses two negatives by turns; a user with all items has none."""
    offsets = torch.tensor([0, 7, 16, 18])
    rows, _ = block_rows(offsets, torch.tensor([*range(1, 8), *range(9), 3, 4]), torch.arange(3))
    (batch,) = batches(Training(rows, 9), 64, Key(1))
    assert sorted(zip(batch.users.tolist(), batch.positives.tolist(), strict=True)) == [
        *((0, item) for item in range(1, 8)),
        (2, 3),
        (2, 4),
    ]
    assert sorted(batch.negatives[batch.users == 0].tolist()) in ([0, 0, 0, 0, 8, 8, 8], [0, 0, 0, 8, 8, 8, 8])
    assert not {3, 4} & set(batch.negatives[batch.users == 2].tolist())


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recall", "ndcg"),
    [("item_knn", 0.0575, 0.0230), ("rp3beta", 0.0702, 0.0271), ("spectral_filter", 0.0698, 0.0268)],
)
def test_yelp_as_in_the_literature(name: str, recall: float, ndcg: float, real_data: Callable[[str], Path]) -> None:
    config = configure(name)
    test = train(config.build(), load(str(real_data("yelp"))), config.run, config=config).evaluate("test")
    assert test["recall@20"] == pytest.approx(recall, abs=0.0036)  # a standard error over 5,144 users
    assert test["ndcg@20"] == pytest.approx(ndcg, abs=0.0016)


def test_a_last_batch_of_one_has_no_uniformity(dataset: Dataset) -> None:
    n = dataset.train.n_interactions
    engine = Central(DirectAU(DirectAUSettings(batch_size=n - 1, embedding_dim=4)), dataset, device="cpu")
    whole = Central(DirectAU(DirectAUSettings(batch_size=n, embedding_dim=4)), dataset, device="cpu")
    assert engine.play().loss == pytest.approx(whole.play().loss, rel=0.05)


def test_a_loss_that_is_not_finite_is_an_error(dataset: Dataset) -> None:
    engine = Central(MF(MFSettings(learning_rate=1e30, embedding_dim=4)), dataset, device="cpu")
    engine.play()
    with pytest.raises(DivergedError, match=r"loss of epoch 2 is (nan|inf); expected a finite number"):
        engine.play()


def test_the_contrasted_layer_of_xsimgcl_is_one_of_its_layers(dataset: Dataset) -> None:
    losses = [
        Central(XSimGCL(XSimGCLSettings(contrasted_layer=layer, embedding_dim=4)), dataset, device="cpu").play().loss
        for layer in (1, 2)
    ]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="expected at most n_layers = 2"):
        XSimGCLSettings(contrasted_layer=3)
