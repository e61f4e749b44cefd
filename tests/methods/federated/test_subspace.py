"""Sums in a basis of few columns: exact products, rows that stay with the clients, and what the server makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.federated.toys import SEED, World, protected, settings, world
from torch import Tensor

from perfedrec.core.aggregate import BASIS_GRID, DELTA_GRID, FIXED_POINT, Aggregate, from_fixed, reduce
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Spec
from perfedrec.methods.federated import subspace
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.settings import ClusterSettings, FedMFSettings
from perfedrec.methods.federated.spectral import nystroem
from perfedrec.methods.federated.subspace import krylov, lifted, projected, selected, spread
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import play_round

SECURE: dict[str, Any] = {
    "privacy__aggregation": "secure",
    "privacy__rank": 10,
    "privacy__min_contributors": 3,
    "pretraining__kind": "spectral",
    "pretraining__passes": 2,
}
M, DIM = 24, 4


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """These worlds have 24 items: enough for 3 columns. More are needed to see what a basis does."""
    monkeypatch.setattr(subspace, "ITEMS_PER_COLUMN", 1)
    monkeypatch.setattr(subspace, "LEVERAGE", 2.0)


def table(seed: int, tables: int = 1, rows: int = M) -> Aggregate:
    """A sum by item in which a third of the rows is missing, in multiples of 1 / DELTA_GRID."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(tables * rows, generator=generator)[: tables * rows * 2 // 3].sort().values
    values = torch.randint(-(2**24), 2**24, (keys.numel(), DIM), generator=generator).to(torch.float64)
    return Aggregate(rows, 5, keys, values * (FIXED_POINT / DELTA_GRID), torch.zeros(tables, dtype=torch.float64))


def basis(seed: int, rank: int = 6) -> Tensor:
    return krylov(torch.randn(M, rank, generator=torch.Generator().manual_seed(seed)), None, rank)


def dense(total: Aggregate) -> np.ndarray[Any, Any]:
    wide = np.zeros((total.weights.numel() * total.n_items, total.sums.shape[1]))
    wide[total.keys.numpy()] = total.sums.numpy() / FIXED_POINT
    return wide.reshape(total.weights.numel(), total.n_items, -1)


@pytest.mark.parametrize("tables", [1, 3])
def test_a_sum_is_projected_table_by_table_and_lifted_again(tables: int) -> None:
    total, v = table(1, tables), basis(2)
    exact = v.numpy().astype(float) / BASIS_GRID
    small = projected(total, v)
    assert (small.n_items, small.keys.numel()) == (6, tables * 6)
    np.testing.assert_array_equal(dense(small), np.einsum("mr,gmd->grd", exact, dense(total)))
    wide = np.einsum("mr,grd->gmd", exact, dense(small))
    np.testing.assert_allclose(dense(lifted(small, v)), wide, rtol=0, atol=1e-6 * np.abs(wide).max())


@given(st.integers(0, 2**20), st.integers(1, 5))
def test_projected_parts_add_up_to_the_projected_sum_bit_for_bit(seed: int, parts: int) -> None:
    many = [table(seed + part) for part in range(parts)]
    together, apart = many[0], projected(many[0], basis(3))
    for each in many[1:]:
        together, apart = together + each, apart + projected(each, basis(3))
    assert torch.equal(projected(together, basis(3)).sums, apart.sums)
    assert bool((apart.sums == apart.sums.round()).all())


def test_a_basis_keeps_norms_and_the_newest_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(200, 5, generator=generator) for _ in range(2))
    first[:50] = second[:50] = 0  # items whose rows do not leave the clients
    old = krylov(first, None, 8)
    new = krylov(second, old, 8)
    assert (old.shape, new.shape, new.dtype) == ((200, 5), (200, 8), torch.int16)
    assert not new[:50].any()
    v = new.to(torch.float64) / BASIS_GRID
    values = torch.linalg.svdvals(v)
    assert float(values[0]) <= 1
    assert float(values[-1]) > 0.999
    for image, missing in ((second, 1e-3), (first, 1.0)):
        unit = torch.linalg.qr(image.double())[0]
        left = (unit - v @ (v.T @ unit)).norm(dim=0)
        assert float(left.max()) < missing  # all of the newest image, and as much of the older as fits


def test_nystroem_is_exact_for_a_matrix_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    gram, probe = half @ half.T, torch.linalg.qr(torch.randn(30, 6, generator=generator))[0]
    factor = nystroem(probe, (gram @ probe.double()).float()).double()
    torch.testing.assert_close(factor @ factor.T, gram, rtol=0, atol=1e-3)


def test_rows_that_are_kept_back_come_back_as_no_rows() -> None:
    total, kept = table(4), torch.arange(M) % 3 == 0
    part = selected(total, kept)
    assert part.n_items == int(kept.sum())
    back = spread(part, kept)
    mine = kept[total.keys]
    assert torch.equal(back.keys, total.keys[mine])
    assert torch.equal(back.sums, total.sums[mine])


# --- a whole method ---


def opened(here: World) -> tuple[str, Aggregate]:
    """The phase, and the sum of all users' work that would be opened in the next round."""
    phase = here.algorithm.phase(here.state)
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = protected(here.algorithm, phase, broadcast, rows, client_state, Key(SEED))
    total = reduce(sent, M, here.algorithm.n_groups(here.state))
    return phase, here.algorithm.compress(broadcast, phase, total)


def test_what_is_opened_has_no_row_of_an_item_that_few_users_have() -> None:
    here, sizes = world(**SECURE), dict[str, set[int]]()
    degrees = torch.bincount(here.population.items, minlength=M)
    few = degrees < 3
    assert 0 < int(few.sum()) < M
    for _ in range(len(here.algorithm.phases) + 3):
        phase, total = opened(here)
        sizes.setdefault(phase, set()).add(total.n_items if total.sums.numel() else 0)
        assert total.n_items == here.algorithm.n_rows(here.state) or phase == "sizes"
        here.play(1)
        if phase == "spectral":
            assert here.state.basis is not None
            assert float(here.state.items[few].abs().max()) < 1e-12
            assert not here.state.basis[few].any()
    rank = here.state.basis.shape[1]  # type: ignore[union-attr]
    assert rank == 10  # of the 12 columns of two passes
    assert sizes == {
        "degrees": {M},
        "spectral": {M - int(few.sum())},
        "join": {rank},
        "sizes": {0},
        "clusters": {rank},
        "train": {rank},
    }


def test_training_moves_items_by_the_part_of_the_change_that_is_in_the_basis() -> None:
    here = world(**SECURE, server__optimizer="fedavg", server__learning_rate=1.0, clusters__n_clusters=0)
    here.play(len(here.algorithm.phases))
    before, v = here.state.items.clone().double(), here.state.basis.double() / BASIS_GRID  # type: ignore[union-attr]
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = protected(here.algorithm, "train", broadcast, rows, client_state, Key(SEED))
    by_item = torch.zeros(M, before.shape[1], dtype=torch.float64)
    by_item.index_add_(0, sent.items, sent.deltas.double())
    _, total = opened(here)
    after = here.algorithm.server(here.state, "train", total, Key(1))
    n = min(here.algorithm.settings.selection.n_clients_per_round, 30)
    torch.testing.assert_close(after.items.double(), before + v @ (v.T @ by_item) / n, rtol=0, atol=1e-5)


def test_neighbour_sums_are_those_of_everybody_in_the_basis_and_stay() -> None:
    here = world(**SECURE, clusters__n_clusters=0)
    n = len(here.algorithm.phases)
    here.play(n - 1)
    assert here.algorithm.phase(here.state) == "join"
    v = here.state.basis.double() / BASIS_GRID  # type: ignore[union-attr]
    here.play(1)
    broadcast, rows, client_state = here.block(here.population.everyone())
    layers = here.algorithm.layers(broadcast, rows, client_state.private).double()
    weights = (rows.counts.double()[rows.segments] * broadcast.degrees[rows.items]).rsqrt()
    sums = torch.zeros(2, M, layers.shape[2], dtype=torch.float64)
    for layer in range(2):
        sums[layer].index_add_(0, rows.items, weights[:, None] * layers[rows.segments, layer])
    first, second = (v @ (v.T @ each) for each in sums)
    assert here.state.neighbours is not None
    torch.testing.assert_close(here.state.neighbours[0].double(), first / 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(here.state.neighbours[1].double(), (first + second) / 3, rtol=0, atol=1e-5)
    published = here.state.neighbours.clone()
    here.play(5)
    assert torch.equal(here.state.neighbours, published)


def test_clusters_that_are_too_small_are_dissolved_before_their_sums_are_opened() -> None:
    here = world(**SECURE, clusters__n_clusters=5, privacy__min_clients=2)
    phases = [each.name for each in here.algorithm.phases]
    here.play(phases.index("sizes"))
    _, total = opened(here)
    assert total.dense is not None
    sizes = from_fixed(total.dense)
    assert float(sizes.sum()) == 30
    assert 0 < int((sizes < 4).sum()) < 4  # some are too small, and two or more are not
    here.play(1)
    _, total = opened(here)
    assert total.weights.numel() == int((sizes >= 4).sum())
    here.play(1)
    assert here.state.offsets is not None
    assert here.state.offsets.shape[0] == total.weights.numel() * M
    assert bool(here.state.offsets.any())

    few = world(**SECURE, clusters__n_clusters=5, privacy__min_clients=30, selection__n_clients_per_round=30)
    few.play(phases.index("sizes") + 3)
    assert few.state.clusters.centroids is None
    assert few.state.offsets is None


def test_of_the_options_of_clusters_their_number_alone_has_an_effect() -> None:
    others = {"start": 0, "stop": 1000, "every": 1, "learning_rate": 0.9, "proportional": False}
    assert {*others, "n_clusters"} == set(ClusterSettings.model_fields)
    tables = []
    for clusters in ({}, {f"clusters__{name}": value for name, value in others.items()}, {"clusters__n_clusters": 0}):
        here = world(**{**SECURE, "clusters__n_clusters": 3, "privacy__min_clients": 2, **clusters})
        here.play(len(here.algorithm.phases) + 4)
        tables.append((here.state.items, here.state.offsets))
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])
    assert tables[0][1].any()
    assert tables[2][1] is None or tables[2][1].numel() != tables[0][1].numel()
    said = {name for name, field in ClusterSettings.model_fields.items() if "(not with" in str(field.description)}
    assert said == set(others) - {"proportional"}
    assert "(only where user vectors are sent)" in str(ClusterSettings.model_fields["proportional"].description)


def test_a_basis_of_all_columns_changes_nothing() -> None:
    """With as many columns as items ``V V^T`` is the identity, so that the tables are those of sums by item."""
    generator = np.random.default_rng(5)
    lists = [generator.choice(12, 6, replace=False) for _ in range(40)]
    offsets, items = torch.arange(41) * 6, torch.tensor(np.concatenate([np.sort(each) for each in lists]))
    spec = Spec(40, 12, torch.bincount(items, minlength=12))
    tables = []
    for rank in (0, 12):
        privacy = PrivacySettings(aggregation="secure", rank=rank, min_contributors=1)
        method, people = FedMF(FedMFSettings(privacy=privacy)), Population(offsets, items, 12)
        state = method.init(spec, Key(0))
        people.init_clients(method, 0)
        for _ in range(len(method.phases)):
            state, _ = play_round(method, state, people, 0)
        state = replace(state, round=5)  # so that both draw the same cohorts and negatives
        for _ in range(3):
            state, _ = play_round(method, state, people, 0)
        tables.append(state.items)
    assert float((tables[0] - tables[1]).abs().max()) < 2e-3
    assert float((tables[0] - method.init(spec, Key(0)).items).abs().max()) > 0.02


def test_there_are_many_more_items_than_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    here = world(**SECURE)
    here.play(len(here.algorithm.phases))
    known = int((here.state.degrees >= 3).sum())
    assert here.state.basis is not None
    assert here.state.basis.shape[1] == known // 8 == 2


def test_too_few_users_or_clients_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"there are 30 users, and no sum of fewer than 31 is opened"):
        world(**SECURE, privacy__min_clients=31, selection__n_clients_per_round=40)
    with pytest.raises(ValueError, match=r"n_clients_per_round of at least that \(it is 12\)"):
        settings(**SECURE, privacy__min_clients=13)


def test_without_a_basis_nothing_leaves_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(**SECURE)
    here.play(len(here.algorithm.phases))
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = protected(here.algorithm, "train", broadcast, rows, client_state, Key(SEED))
    total = reduce(sent, M, 1)
    for given_, said in (
        (None, "needs a basis, and none was sent"),
        (torch.ones(M, 11, dtype=torch.int16), "has 11 columns; expected at most 10"),
        (torch.eye(M, 9, dtype=torch.int16), "has 9 columns; expected at most 2"),  # as many columns as items
    ):
        if given_ is not None and given_.shape[1] == 9:
            monkeypatch.setattr(subspace, "ITEMS_PER_COLUMN", 8)
        with pytest.raises(PerfedrecError, match=said):
            here.algorithm.compress(replace(broadcast, basis=given_), TRAIN.name, total)


def test_changes_are_rounded_to_the_grid_that_keeps_products_exact() -> None:
    here = world(**SECURE, privacy__norm="l2", privacy__clip=0.3)
    for _ in range(len(here.algorithm.phases) + 1):
        phase = here.algorithm.phase(here.state)
        broadcast, rows, client_state = here.block(here.population.everyone())
        sent, _ = protected(here.algorithm, phase, broadcast, rows, client_state, Key(SEED))
        if phase in ("join", "clusters", "train"):
            scaled = sent.deltas.double() * DELTA_GRID
            assert bool((scaled == scaled.round()).all()), phase
        here.play(1)


def test_a_pass_in_which_too_many_are_missing_is_aborted() -> None:
    aborted = world(**SECURE).algorithm.protection.aborted
    assert aborted("spectral", 17, 30)
    assert not aborted("spectral", 18, 30)
    assert [aborted(phase, 17, 30) for phase in ("degrees", "join", "sizes", "clusters")] == [True] * 4
    assert not aborted("train", 10, 30)
    assert aborted("train", 1, 30)
    larger = world(**SECURE, privacy__min_clients=21, selection__n_clients_per_round=30)
    assert larger.algorithm.protection.aborted("train", 20, 30)


def test_a_method_of_ones_own_must_play_the_passes() -> None:
    class Own(FedMF):
        phases = ()  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"Own\.phases lacks the passes .* begin with super\(\)\.phases"):
        Own(FedMFSettings(privacy=PrivacySettings(aggregation="secure")))
    Own(FedMFSettings(privacy=PrivacySettings(aggregation="secure", rank=0)))


def test_a_rare_item_that_the_basis_could_tell_from_others_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items that six users have, who have nothing else, would be a column of their own."""
    monkeypatch.undo()
    apart = [[0, 1]] * 6
    others = [sorted({2 + (5 * user + step * step) % 38 for step in range(12)}) for user in range(60)]
    lists = apart + others
    offsets = torch.tensor([0, *(len(each) for each in lists)]).cumsum(0)
    people = Population(offsets, torch.tensor([item for each in lists for item in each]), 40)
    privacy = PrivacySettings(aggregation="secure", rank=8)
    method = FedMF(FedMFSettings(privacy=privacy))
    state = method.init(Spec(66, 40, torch.ones(40)), Key(0))
    people.init_clients(method, 0)
    for _ in method.phases:
        state, _ = play_round(method, state, people, 0)
    assert state.degrees is not None
    assert state.basis is not None
    assert state.degrees[:2].tolist() == [6, 6]
    assert not state.basis[:2].any()
    assert not state.items[:2].any()
    assert bool(state.basis[2:].any(1).all())


def test_data_in_which_no_item_has_enough_users_are_refused() -> None:
    with pytest.raises(ConfigError, match="no item has 40 users, so that no row of a pass is summed"):
        world(**SECURE | {"privacy__min_contributors": 40}).play(2)


def test_noise_on_passes_needs_noise_on_degrees() -> None:
    with pytest.raises(ValueError, match=r"expected noise\.degrees and noise\.spectral both, or neither"):
        settings(**SECURE, privacy__norm="l2", privacy__noise={"spectral": 1.0}, clusters__n_clusters=0)


def test_noise_and_clusters_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="sizes of clusters are summed without noise"):
        settings(**SECURE, privacy__norm="l2", privacy__noise={"degrees": 1.0, "spectral": 1.0})


def test_without_pretraining_the_server_propagates_items_itself() -> None:
    """The neighbour sums of FedGNN and PerFedRec: ``N^T N Q``, as far as the passes know it."""
    options = SECURE | {"pretraining__kind": "none", "privacy__rank": 96, "privacy__min_contributors": 1}
    here = world(**options, clusters__n_clusters=0)
    assert [each.name for each in here.algorithm.phases] == ["degrees", *["spectral"] * 4]
    here.play(len(here.algorithm.phases) + 1)
    _, rows, _ = here.block(here.population.everyone())
    n = torch.zeros(30, M, dtype=torch.float64)
    n[rows.segments, rows.items] = (rows.counts.double()[rows.segments] * here.state.degrees[rows.items]).rsqrt()
    assert here.state.factor is not None
    factor = here.state.factor.double()
    torch.testing.assert_close(factor @ factor.T, n.T @ n, rtol=0, atol=1e-4)
    fresh = world(**options, clusters__n_clusters=0)
    fresh.play(len(fresh.algorithm.phases))
    second = (factor @ (factor.T @ fresh.state.items.double())) / 3
    assert fresh.state.neighbours is not None
    torch.testing.assert_close(fresh.state.neighbours[1].double(), second, rtol=0, atol=1e-5)
    assert not fresh.state.neighbours[0].any()


def test_secure_sums_are_of_low_rank_unless_told_otherwise() -> None:
    assert PrivacySettings(aggregation="secure").low_rank
    assert not PrivacySettings(aggregation="secure", rank=0).low_rank
    assert not PrivacySettings(aggregation="dense").low_rank
