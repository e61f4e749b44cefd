import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.federated.toys import World, settings, world

from perfedrec.core.aggregate import reduce
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Rows, Spec, Update
from perfedrec.methods.federated.contrastive import contrast
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.phases import SPECTRAL as SPECTRAL_PHASE
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.methods.federated.spectral import fill_clusters, gram_rows, neighbour_layers, orthonormal
from perfedrec.nn.losses import info_nce
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.views import noisy_lightgcn
from perfedrec.runtimes.population import Population

SPECTRAL: dict[str, Any] = {
    "pretraining__kind": "spectral",
    "model__encoder": "spectral",
    "model__embedding_dim": 3,
    "clusters__n_clusters": 0,
}
SUMS: dict[str, Any] = {"privacy__aggregation": "secure", "privacy__rank": 0, "privacy__min_clients": 2}
CONTRASTIVE: dict[str, Any] = {"pretraining__kind": "contrastive", "clusters__n_clusters": 0}
BLOCKS: dict[str, Any] = {
    "pretraining__kind": "spectral",
    "pretraining__passes": 3,
    "pretraining__cluster_passes": 1,
    "model__encoder": "lightgcn",
    "model__embedding_dim": 4,
    "clusters__n_clusters": 3,
}


def normalised(rows: Rows, n_items: int, exponents: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    matrix = np.zeros((rows.n_users, n_items))
    matrix[rows.segments.numpy(), rows.items.numpy()] = 1
    of_users, of_items = matrix.sum(1, keepdims=True), np.maximum(matrix.sum(0, keepdims=True), 1)
    return matrix / (of_users ** exponents[0] * of_items ** exponents[1])


def blocks(n_blocks: int, users: int, items: int, drop: float, seed: int = 0) -> Population:
    """Users who have most items of their own block: N has ``n_blocks`` singular values near 1."""
    generator = np.random.default_rng(seed)
    own = np.kron(np.eye(n_blocks), np.ones((users, items))) * (
        generator.random((n_blocks * users, n_blocks * items)) > drop
    )
    owners, columns = own.nonzero()
    offsets = np.concatenate([[0], np.bincount(owners, minlength=own.shape[0]).cumsum()])
    return Population(torch.from_numpy(offsets), torch.from_numpy(columns), own.shape[1])


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sines of the principal angles between the column spaces."""
    cosines = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0])[1]
    return np.sqrt(np.maximum(1 - cosines**2, 0))


def with_people(people: Population, **changes: Any) -> World:
    here = world(**changes)
    spec_degrees = torch.bincount(people.items, minlength=people.n_items)
    here.state = here.algorithm.init(Spec(people.n_users, people.n_items, spec_degrees), Key(0))
    here.population = people
    people.init_clients(here.algorithm, 0)
    return here


def test_passes_find_the_leading_singular_vectors() -> None:
    here = with_people(blocks(3, 15, 8, 0.1), pretraining__passes=8, **SPECTRAL, **SUMS)
    matrix = normalised(here.population.rows(here.population.everyone())[0], 24)
    values = np.linalg.svd(matrix)[1]
    assert values[2] > 0.99 > 0.5 > values[3]
    leading = np.linalg.svd(matrix)[2][:3].T
    before = angles(here.state.items.numpy(), leading).max()
    found = []
    while here.algorithm.phase(here.state) != "spectral":
        here.play(1)
    for _ in range(8):
        here.play(1)
        basis = here.state.items.double().numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)
        found.append(angles(basis, leading).max())
    assert before > 0.5
    assert found[0] < before
    assert found[1] < found[0] * (values[3] / values[2]) ** 2 * 1.5  # converges at the rate of the gap
    assert found[-1] < 1e-3


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.25, 0.4)])
def test_parts_of_the_clients_sum_to_the_gram_product_and_are_bounded(exponents: tuple[float, float]) -> None:
    here = world(**SPECTRAL)
    rows, _ = here.population.rows(here.population.everyone())
    matrix, basis = normalised(rows, 24, exponents), here.state.items
    parts = gram_rows(basis, rows, here.state.degrees, exponents)
    total = torch.zeros(24, 3).index_add_(0, rows.items, parts)
    np.testing.assert_allclose(total, matrix.T @ matrix @ basis.numpy(), atol=1e-6)
    for user in range(rows.n_users):
        mine = parts[rows.segments == user].double().numpy()
        exact = np.outer(matrix[user], matrix[user] @ basis.numpy())[rows.items[rows.segments == user].numpy()]
        np.testing.assert_allclose(mine, exact, atol=1e-6)
        assert np.linalg.norm(mine) <= np.linalg.norm(matrix[user]) ** 2 + 1e-6
        assert exponents != (0.5, 0.5) or np.linalg.norm(matrix[user]) <= 1 + 1e-6


def test_orthonormal() -> None:
    matrix = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    basis = orthonormal(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis @ (basis.T @ matrix), matrix, rtol=1e-5, atol=1e-5)


def fill(groups: torch.Tensor, people: Population, basis: torch.Tensor, n_groups: int) -> torch.Tensor:
    rows, _ = people.rows(people.everyone())
    degrees = torch.bincount(people.items, minlength=people.n_items)
    product = gram_rows(basis, rows, degrees)
    ones = torch.ones(rows.n_users)
    aggregate = reduce(Update(rows.users, groups, ones, rows.segments, rows.items, product), people.n_items, n_groups)
    offsets = torch.zeros(n_groups * people.n_items, basis.shape[1])
    fill_clusters(offsets, basis, aggregate)
    return offsets.view(n_groups, people.n_items, -1)


def test_a_cluster_table_spans_the_interactions_of_its_members() -> None:
    people = blocks(3, 15, 8, 0.1)
    matrix = normalised(people.rows(people.everyone())[0], 24)
    basis = torch.from_numpy(np.linalg.svd(matrix)[2][:3].T.copy()).float()
    groups = torch.arange(45) // 15
    tables = basis + fill(groups, people, basis, 4)
    for group in range(3):
        own = slice(8 * group, 8 * group + 8)
        others = [item for item in range(24) if not own.start <= item < own.stop]
        gram = (tables[group] @ tables[group].T).double().numpy()
        assert np.abs(gram[others]).max() < 1e-3  # items that nobody in the cluster has are not in it
        image = matrix[15 * group : 15 * group + 15]
        image = image.T @ image @ basis.double().numpy()
        left, values, _ = np.linalg.svd(image, full_matrices=False)
        expected = left @ np.diag(np.sqrt(values / values[0])) @ left.T
        np.testing.assert_allclose(gram, expected, atol=1e-3)
    assert torch.equal(tables[3], basis)  # it has no members


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_a_cluster_table_has_the_coordinates_of_the_global_table(scale: float) -> None:
    """A member's change updates both tables: a cluster of all users differs from the global table only by weights."""
    people = blocks(3, 15, 8, 0.3)
    matrix = normalised(people.rows(people.everyone())[0], 24)
    _, values, right = np.linalg.svd(matrix)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]  # any basis of the subspace will work
    basis = torch.from_numpy(right[:4].T @ turn * scale).float()
    table = basis + fill(torch.zeros(45, dtype=torch.int64), people, basis, 1)[0]
    expected = right[:4].T @ np.diag(np.sqrt(values[:4] / values[0])) @ turn * scale
    np.testing.assert_allclose(table, expected, atol=1e-4 * scale)


def test_contrastive_pretraining_lowers_the_loss_between_the_views() -> None:
    here = world(**CONTRASTIVE)
    rows, _ = here.population.rows(here.population.everyone())
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(2):  # each view lacks a fifth of the edges
        kept = torch.rand(rows.items.numel(), generator=generator) > 0.2
        graphs.append(Bipartite.of(rows.segments[kept], rows.items[kept], 30, 24))
    users, items = (0.1 * torch.randn(n, 6, generator=generator) for n in (30, 24))

    def loss(users: torch.Tensor, items: torch.Tensor) -> float:
        values = []
        for number in range(20):
            views = [
                noisy_lightgcn(graph, users, items, 2, 0.1, Key(99).fold(number, i)) for i, graph in enumerate(graphs)
            ]
            values.append(sum(float(info_nce(views[0][side], views[1][side], 0.2)) for side in range(2)))
        return float(np.mean(values))

    path = [loss(users, items)]
    for steps in (5, 20, 60):
        options = PretrainingSettings(steps=steps, learning_rate=0.03, batch_size=64)
        path.append(loss(*contrast(graphs, users, items, 2, options, Key(1))))
    assert path == sorted(path, reverse=True)
    assert path[-1] < 0.8 * path[0]


def test_contrast_does_not_change_its_initial_vectors() -> None:
    here = world(**CONTRASTIVE)
    rows, _ = here.population.rows(here.population.everyone())
    graph = Bipartite.of(rows.segments, rows.items, 30, 24)
    users, items = torch.ones(30, 6) + torch.arange(6), torch.ones(24, 6) - torch.arange(6)
    before = users.clone(), items.clone()
    trained = contrast([graph, graph], users, items, 2, PretrainingSettings(), Key(0))
    assert torch.equal(users, before[0])
    assert torch.equal(items, before[1])
    assert not torch.equal(trained[0], users)
    assert not trained[0].requires_grad


@pytest.mark.parametrize(
    "change",
    [
        {"node_dropout": 0.5},
        {"node_dropout": 0.0},
        {"edge_perturbation": False},
        {"noise": 0.0},
        {"noise": 0.3},
        {"steps": 6},
        {"learning_rate": 0.1},
        {"temperature": 0.5},
        {"batch_size": 8},
        {"init_scale": 0.1},
    ],
    ids=str,
)
def test_each_option_of_contrastive_pretraining_changes_the_table(change: dict[str, Any]) -> None:
    options = CONTRASTIVE | {"privacy__pseudo_items": 0.3, "privacy__masking": 0.2}
    tables = []
    for extra in ({}, {f"pretraining__{name}": value for name, value in change.items()}):
        here = world(**options | extra)
        here.play(1)
        tables.append(here.state.items)
    assert float((tables[0] - tables[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.25, 0.35)])
def test_neighbour_sums_that_a_server_makes_are_those_of_lists_of_equal_length(exponents: tuple[float, float]) -> None:
    drawn = np.random.default_rng(1)
    lists = np.stack([drawn.choice(9, 4, replace=False) for _ in range(12)])
    seen = torch.zeros(12, 9)
    seen[torch.arange(12)[:, None], torch.from_numpy(lists)] = 1.0
    degrees, table, (user, item) = seen.sum(0), torch.from_numpy(drawn.normal(size=(9, 3))).float(), exponents
    weighted, halves = seen * 4.0**-user * degrees**-item, seen * 4.0**-0.5 * degrees**-0.5
    factor = weighted.T  # N^T is a factor of N^T N
    layers = neighbour_layers(factor, table, degrees, exponents, 4.0, 1.7)
    wanted = [halves.T @ (1.7 * weighted @ table), halves.T @ (halves @ table)]
    for found, each in zip(layers, wanted, strict=True):
        assert torch.allclose(found, each, atol=1e-5)


def test_the_service_sees_tokens_and_not_items() -> None:
    here = world(**CONTRASTIVE)
    tokens = here.state.tokens
    assert sorted(tokens.tolist()) == list(range(24))
    assert int((tokens == torch.arange(24)).sum()) < 6
    rows, places = here.population.rows(here.population.everyone())
    broadcast, client_state = (
        here.algorithm.broadcast(here.state, rows.users),
        here.population.load_client_states(rows.users, places),
    )
    edges = here.algorithm.client("join", broadcast, rows, client_state, Key(0))[0].edges
    named = set(zip(rows.segments.tolist(), tokens[rows.items].tolist(), strict=True))
    assert named != set(zip(rows.segments.tolist(), rows.items.tolist(), strict=True))
    for number in (0, 1):  # without pseudo items and masking both views are the data themselves, renamed
        assert set(map(tuple, edges[edges[:, 0] == number][:, 1:].tolist())) == named
    here.play(1)
    graph = here.state.service.graph.by_item
    counts = torch.tensor([*graph.starts.tolist(), graph.columns.numel()]).diff()
    owners = torch.repeat_interleave(torch.arange(24), counts)
    assert set(zip(graph.columns.tolist(), owners.tolist(), strict=True)) == named


def test_table_rows_are_mapped_back_to_their_items() -> None:
    """An item that nobody has is in no view: training does not move it, but moves all others."""
    lonely = {3, 10, 17, 18, 22}
    own = [sorted({(7 * user + k * k) % 24 for k in range(1, 6)} - lonely) for user in range(30)]
    offsets = torch.tensor([0, *itertools.accumulate(len(each) for each in own)])
    people = Population(offsets, torch.tensor([item for each in own for item in each]), 24)
    assert set(people.items.tolist()) == set(range(24)) - lonely
    here = with_people(people, **CONTRASTIVE)
    here.play(1)
    lengths = here.state.items.norm(dim=1)
    assert set(lengths.argsort()[:5].tolist()) == lonely
    assert float(lengths.sort().values[4]) < 0.3 * float(lengths.sort().values[5])


def test_pretrained_vectors_are_for_users_who_have_not_trained() -> None:
    here = world(**CONTRASTIVE)
    here.play(1)
    start = here.state.service.start
    assert start.shape == (30, 6)
    broadcast, rows, client_state = here.block([0, 1])
    assert torch.equal(broadcast.start, start[:2])
    fresh = here.algorithm.scores(broadcast, rows, client_state)
    own = replace(client_state, private=client_state.private + 1)
    assert torch.equal(here.algorithm.scores(broadcast, rows, own), fresh)  # the users' own vectors are not used yet
    seasoned = replace(own, steps=torch.tensor([1, 0]))
    scores = here.algorithm.scores(broadcast, rows, seasoned)
    assert not torch.allclose(scores[0], fresh[0])
    assert torch.equal(scores[1], fresh[1])


@pytest.mark.parametrize(
    ("encoder", "exponents"), [("lightgcn", (0.5, 0.5)), ("lightgcn", (0.25, 0.4)), ("spectral", (0.5, 0.5))]
)
def test_the_service_finds_the_leading_singular_vectors(encoder: str, exponents: tuple[float, float]) -> None:
    people = blocks(3, 15, 8, 0.1)
    options = {"model__encoder": encoder, "personal__pretrained": 0.5, "pretraining__passes": 12}
    powers = dict(zip(("pretraining__user_exponent", "pretraining__item_exponent"), exponents, strict=True))
    here = with_people(people, **SPECTRAL | options | powers)
    everyone = people.rows(people.everyone())[0]
    matrix = normalised(everyone, 24, exponents)
    counts = (matrix > 0).T.astype(int) @ (matrix > 0)
    assert counts[counts > 0].min() >= 3  # there are no rare pairs
    right = np.linalg.svd(matrix)[2]
    here.play(1)
    table = here.state.items.double().numpy()
    length = np.linalg.norm(table[:, 0])
    np.testing.assert_allclose(table.T @ table, np.eye(3) * length**2, atol=1e-5 * length**2)
    assert angles(table, right[:3].T).max() < 1e-3
    assert torch.equal(here.state.pretrained.table, here.state.items)
    assert here.state.pretrained.table.data_ptr() != here.state.items.data_ptr()  # training changes the latter
    start, scale = here.state.service.start, here.state.pretrained.user_init_scale
    if encoder == "spectral":
        assert start is None
        assert scale is None
        assert length == pytest.approx(1)
        return
    first = here.algorithm.settings.model.init_scale  # the size of LightGCN's first vectors
    assert float(here.state.items.square().mean().sqrt()) == pytest.approx(first, rel=1e-4)
    np.testing.assert_allclose(start, scale * matrix @ table, rtol=1e-4, atol=1e-5)
    assert float(start.square().mean().sqrt()) == pytest.approx(first, rel=1e-4)
    # A new user's first vector is made of its items in the same way, by its own client.
    broadcast, rows, client_state = here.block([4, 40])
    new = here.algorithm.broadcast(here.state, torch.tensor([NEWCOMER, NEWCOMER]))
    own = here.algorithm.init_new_user(new, rows, client_state)
    torch.testing.assert_close(own.private, start[[4, 40]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        here.algorithm.scores(new, rows, own),
        here.algorithm.scores(broadcast, rows, client_state),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.25, 0.4)])
def test_passes_of_clients_weigh_interactions_by_the_exponents(exponents: tuple[float, float]) -> None:
    people = blocks(3, 15, 8, 0.1)
    options = {"model__encoder": "lightgcn", "pretraining__passes": 12, "model__n_layers": 2}
    powers = dict(zip(("pretraining__user_exponent", "pretraining__item_exponent"), exponents, strict=True))
    here = with_people(people, **SPECTRAL | SUMS | options | powers)
    here.play(here.algorithm.phases.index(SPECTRAL_PHASE) + 12)
    table, everyone = here.state.items.double().numpy(), people.rows(people.everyone())[0]
    matrix = normalised(everyone, 24, exponents)
    assert angles(table, np.linalg.svd(matrix)[2][:3].T).max() < 1e-3
    # A user's first vector is made with these weights too, and first vectors of users and items have one size.
    broadcast, rows, client_state = here.block(list(range(45)))
    start = here.algorithm.init_new_user(broadcast, rows, client_state).private
    np.testing.assert_allclose(start, here.state.pretrained.user_init_scale * matrix @ table, rtol=1e-4, atol=1e-5)
    first = here.algorithm.settings.model.init_scale
    assert float(start.square().mean().sqrt()) == pytest.approx(first, rel=1e-3)


def test_the_service_pretrains_on_what_clients_show() -> None:
    """Decoys and masks protect the edges that it has, and it has nothing else."""
    tables = []
    for changes in ({}, {"privacy__pseudo_items": 0.5, "privacy__masking": 0.3}):
        here = world(**SPECTRAL | {"model__embedding_dim": 6, "pretraining__passes": 60}, **changes)
        here.play(1)
        graph, spread = here.state.service.graph, here.state.items.double().numpy()
        dense = graph.to_items(torch.eye(30)).double().numpy()[here.state.tokens]
        gram = dense @ dense.T * ((dense > 0).astype(int) @ (dense > 0).T >= 3)  # pairs of three users and more
        size, directions = np.linalg.eigh(gram)
        assert angles(spread, directions[:, np.abs(size).argsort()[-6:]]).max() < 0.05
        tables.append(spread)
    assert angles(*tables).max() > 0.5


@pytest.mark.parametrize("encoder", ["lightgcn", "spectral"])
def test_clusters_before_training_follow_tastes_and_stay(encoder: str) -> None:
    """Users' own vectors, which are random numbers then, have no part in it."""
    people = blocks(3, 20, 15, 0.6)
    here = with_people(people, **BLOCKS | {"model__encoder": encoder, "clusters__start": 1, "clusters__every": 1})
    here.play(3)
    labels = here.state.clusters.labels
    of_blocks = [labels[20 * block : 20 * block + 20].unique().tolist() for block in range(3)]
    assert sorted(of_blocks) == [[0], [1], [2]]
    here.play(len(here.algorithm.phases))
    assert here.algorithm.trained(here.state) == 3
    assert torch.equal(here.state.clusters.labels, labels)


def test_clients_choose_their_cluster_by_taste_where_sums_show_items() -> None:
    here = with_people(blocks(3, 20, 15, 0.6), **BLOCKS, **SUMS)
    while here.algorithm.phase(here.state) != "clusters":
        here.play(1)
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = here.algorithm.client("clusters", broadcast, rows, client_state, Key(0))
    other = replace(client_state, private=client_state.private + 5)
    again, _ = here.algorithm.client("clusters", broadcast, rows, other, Key(0))
    assert torch.equal(sent.groups, again.groups)
    assert [sent.groups[20 * block : 20 * block + 20].unique().numel() for block in range(3)] == [1, 1, 1]
    assert sent.groups.unique().numel() > 1
    here.play(1)
    assert here.state.offsets.any()
    centroids = here.state.clusters.centroids
    here.play(3)
    assert torch.equal(here.state.clusters.centroids, centroids)


def test_phases_before_training() -> None:
    def phases(**changes: Any) -> list[str]:
        return [each.name for each in PerFedRecPP(settings(**changes)).phases]

    assert phases(pretraining__kind="none", model__neighbours=False) == []
    assert phases(pretraining__kind="none") == ["join"]
    assert phases(pretraining__kind="contrastive", model__neighbours=False) == ["join"]
    spectral = {"pretraining__kind": "spectral", "pretraining__passes": 2}
    assert phases(**spectral) == ["join"]  # the service makes the passes
    assert phases(**spectral, model__encoder="spectral") == ["join"]
    assert phases(**spectral, pretraining__cluster_passes=1) == ["join", "clusters"]
    assert phases(**spectral, pretraining__cluster_passes=1, clusters__n_clusters=0) == ["join"]
    assert phases(**spectral, pretraining__at="clients", pretraining__cluster_passes=1) == [
        *("spectral", "spectral", "clusters", "join")
    ]
    assert phases(**spectral, **SUMS) == ["degrees", "spectral", "spectral", "join"]
    assert phases(**spectral, **SUMS, pretraining__cluster_passes=1) == [
        *("degrees", "spectral", "spectral", "clusters", "join")
    ]
