"""Clients that contribute only to sums: the same computation as with reports and edges, without any user's vector."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.methods.federated.toys import SEED, assert_same, protected, settings, world
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, from_fixed, reduce
from perfedrec.core.keys import Key
from perfedrec.core.types import Spec
from perfedrec.methods.federated import summing
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.spectral import MEMORY, deflated, denoised, remembered, trusted
from perfedrec.privacy.protection import joint_norms

SECURE: dict[str, Any] = {"privacy__aggregation": "secure", "privacy__rank": 0}
NOISE = {
    "privacy__norm": "l2",
    "privacy__clip": 0.5,
    "privacy__noise": {"degrees": 0.3, "spectral": 0.2, "join": 0.1, "training": 0.1},
}


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, atol=2e-6, rtol=1e-5), float((a - b).abs().max())


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("kind", ["none", "spectral"])
def test_sums_compute_what_reports_and_edges_compute(n_layers: int, kind: str) -> None:
    changes: dict[str, Any] = {"clusters__n_clusters": 0, "model__n_layers": n_layers, "pretraining__kind": kind}
    # Where the changes of an item nearly cancel each other, the server's step is as large as elsewhere, and follows
    # from what rounding leaves of them. A larger epsilon makes such a step small.
    changes |= {"pretraining__at": "clients", "server__epsilon": 1e-5}
    open_, sums = world(**changes), world(**SECURE, **changes)
    sums.play(1)  # degrees
    assert torch.equal(sums.state.degrees, open_.state.degrees)
    sums.state = replace(sums.state, round=open_.state.round)  # so that both draw the same cohorts and negatives
    phases, sums.algorithm.__class__ = open_.algorithm.phases, _WithoutDegrees
    assert sums.algorithm.phases == phases
    for _ in range(len(phases) + 7):
        open_.play(1)
        sums.play(1)
        close(sums.state.items, open_.state.items)
        if open_.state.neighbours is not None:
            close(sums.state.neighbours, open_.state.neighbours)
    close(sums.scores(), open_.scores())


class _WithoutDegrees(PerFedRecPP):
    @property
    def phases(self) -> list[str]:
        return super().phases[1:]


def test_degrees_are_unknown_until_they_are_released() -> None:
    here = world(**SECURE)
    other = PerFedRecPP(here.algorithm.settings).init(Spec(30, 24, torch.arange(24)), Key(SEED).fold("init"))
    assert_same(here.state, other)


@pytest.mark.parametrize("changes", [SECURE, SECURE | NOISE, {"privacy__aggregation": "dense"} | NOISE])
def test_only_sums_reach_the_server(changes: dict[str, Any]) -> None:
    here = world(**changes, pretraining__kind="spectral")
    seen = set()
    for _ in range(12):
        phase = here.algorithm.phase(here.state)
        broadcast, rows, client_state = here.block(here.population.everyone())
        sent, _ = protected(here.algorithm, phase, broadcast, rows, client_state, Key(SEED))
        assert sent.reports is None
        assert sent.edges is None
        total = reduce(sent, 24, here.algorithm.n_groups(here.state))
        total = here.algorithm.protection.add_noise(phase, total, 30, Key(SEED))
        assert not total.weights.any()
        noisy = here.algorithm.protection.multiplier(phase) > 0
        assert total.keys.numel() == (24 * here.algorithm.n_groups(here.state) if noisy else total.keys.numel())
        seen.add(phase)
        here.play(1)
        assert here.state.clusters.labels is None
        assert here.state.service.graph is None
        assert here.state.service.reports.numel() == 0
    assert seen == {"degrees", "spectral", "join", "train"}
    assert here.state.clusters.centroids is not None
    assert bool(here.state.items.isfinite().all())


@pytest.mark.parametrize("phase_round", range(9))
def test_every_upload_respects_the_bound_on_its_norm(phase_round: int) -> None:
    here = world(**SECURE, **NOISE, pretraining__kind="spectral")
    here.play(phase_round)
    phase = here.algorithm.phase(here.state)
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = protected(here.algorithm, phase, broadcast, rows, client_state, Key(SEED))
    bound = 0.5 if phase == "train" else 1.0
    norms = joint_norms(sent, "l2")
    assert float(norms.max()) <= bound
    if phase != "train":
        assert float(norms[rows.counts > 0].min()) > bound * (1 - 1e-5)  # every upload is scaled to the bound


def test_a_client_at_its_participation_limit_sends_zeros() -> None:
    here = world(**SECURE, selection__max_participations=2, selection__n_clients_per_round=30)
    here.play(len(here.algorithm.phases))
    for number in range(4):
        broadcast, rows, client_state = here.block(here.population.everyone())
        sent, after = here.algorithm.client("train", broadcast, rows, client_state, Key(number))
        assert bool(sent.deltas.any()) == (number < 2)
        assert sent.dense is None or bool(sent.dense.any()) == (number < 2)
        assert not torch.equal(after.private, client_state.private)  # it still learns for itself
        here.play(1)
    assert here.population.client_state.participations.tolist() == [4] * 30


def test_changing_a_user_changes_no_upload_of_another() -> None:
    one, two = (world(**SECURE, **NOISE, pretraining__kind="spectral") for _ in range(2))
    two.population.items = two.population.items.clone()
    first = slice(0, int(two.population.offsets[1]))
    two.population.items[first] = 23 - two.population.items[first].flip(0)
    for each in (one, two):
        each.state = one.state
    broadcast, rows, client_state = one.block(one.population.everyone())
    sent, _ = protected(one.algorithm, "train", broadcast, rows, client_state, Key(SEED))
    broadcast, rows, client_state = two.block(two.population.everyone())
    other, _ = protected(two.algorithm, "train", broadcast, rows, client_state, Key(SEED))
    for name in ("items", "deltas"):
        theirs = [getattr(each, name)[each.segments > 0] for each in (sent, other)]
        assert torch.equal(*theirs)


def test_noise_has_the_declared_size_whoever_drops_out() -> None:
    """The shares of all clients except the tolerated drop-outs make up the noise of the sum, which is aborted with
    fewer."""
    here = world(**SECURE, **NOISE, privacy__dropout_tolerance=0.1, clusters__n_clusters=0)
    algorithm, n = here.algorithm, 100
    empty = torch.zeros(0, dtype=torch.int64)
    for clients, aborted in ((100, False), (90, False), (89, True)):
        assert algorithm.protection.aborted("train", clients, n) == aborted
        noise = []
        for seed in range(60):
            total = replace(
                reduce_nothing(24, 3, 6), clients=clients, keys=empty, sums=torch.zeros(0, 6, dtype=torch.float64)
            )
            noise.append(from_fixed(algorithm.protection.add_noise("train", total, n, Key(seed)).sums))
        deviation, expected = torch.stack(noise).std(), 0.1 * 0.5 * (clients / 90) ** 0.5
        assert abs(float(deviation) / expected - 1) < 4 / (2 * 60 * 24 * 3 * 6) ** 0.5
        assert float(deviation) > 0.99 * 0.1 * 0.5 or aborted


def reduce_nothing(n_items: int, n_groups: int, dim: int) -> Any:
    return Aggregate.empty(n_items, n_groups, dim)


def test_a_sum_of_one_client_is_never_opened() -> None:
    algorithm = world(**SECURE).algorithm
    assert algorithm.protection.aborted("train", 1, 12)
    assert not algorithm.protection.aborted("train", 2, 12)


def test_aborted_rounds_change_nothing_at_a_client() -> None:
    here = world(**SECURE, **NOISE)
    here.play(len(here.algorithm.phases) + 1)
    client_state, items = here.population.client_state, here.state.items.clone()
    before = {field.name: getattr(client_state, field.name).clone() for field in fields(client_state)}
    (report,) = here.play(1, dropout_rate=0.9)
    assert report.clients == 0
    assert torch.equal(here.state.items, items)
    for name, value in before.items():
        assert torch.equal(getattr(here.population.client_state, name), value), name


def test_clients_choose_their_own_cluster_and_its_centroid_becomes_their_mean() -> None:
    vectors = torch.tensor([[3.0, 0.0], [2.0, 0.2], [0.0, 1.0], [0.1, 5.0], [-4.0, 0.0]])
    centroids = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.7, -0.7]])
    groups = summing.assign(centroids, vectors)
    assert groups.tolist()[:4] == [0, 0, 1, 1]
    parts = summing.cluster_stats(vectors, groups, 3, 0.25)
    assert torch.allclose(parts.norm(dim=1), torch.full((5,), 0.25))
    stats = parts[:4].sum(0).view(3, 3)
    means, shares = summing.recentre(centroids, stats)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    close(means[0], unit[:2].mean(0))
    close(means[1], unit[2:4].mean(0))
    assert torch.equal(means[2], centroids[2])  # it has no members
    close(shares, torch.tensor([0.5, 0.5, 0.01]))


def test_poisson_cohorts_are_independent_draws() -> None:
    here = world(**SECURE, selection__sampling="poisson", selection__n_clients_per_round=9)
    here.play(len(here.algorithm.phases))
    cohorts = [here.algorithm.plan(here.state, Key(seed)).cohort for seed in range(400)]
    sizes = torch.tensor([float(each.numel()) for each in cohorts])
    assert abs(float(sizes.mean()) - 9) < 4 * (30 * 0.3 * 0.7 / 400) ** 0.5
    assert abs(float(sizes.var()) / (30 * 0.3 * 0.7) - 1) < 4 * (2 / 400) ** 0.5
    times = torch.bincount(torch.cat(cohorts), minlength=30)
    assert int((times - 120).abs().max()) < 4.5 * (400 * 0.3 * 0.7) ** 0.5


def planted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two directions in 40 frequent items, noise in 400: the image, the truth, the degrees, the known items."""
    degrees = torch.cat([torch.full((40,), 400.0), torch.full((360,), 1.0)])
    signal = torch.zeros(400, 3)
    signal[:40:2, 1], signal[1:40:2, 1], signal[:20, 2], signal[20:40, 2] = 5.0, -5.0, 4.0, -4.0
    image = signal + torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    return image, torch.nn.functional.normalize(signal[:, 1:], dim=0), degrees, torch.arange(400) < 300


def test_planted_directions_survive_noise_and_rare_items_are_damped() -> None:
    image, truth, degrees, known = planted()
    image = image * 3  # a noise of three
    basis = denoised(remembered(None, image, 3.0), degrees, known, 3, power=0.5)
    close(basis[:, 0], degrees.sqrt() / degrees.sqrt().norm())
    assert float(basis.norm(dim=0).max()) == pytest.approx(1.0, rel=1e-4)
    weighted = (basis * degrees.sqrt()[:, None])[:, 1:]  # as in the sums, which grow with the degree
    popular = torch.nn.functional.normalize(degrees[known], dim=0)
    assert float((weighted[known].T @ popular).abs().max()) < 1e-4
    found = torch.linalg.qr(weighted)[0]
    plain = torch.linalg.qr(deflated(image, degrees, known)[:, 1:])[0]
    kept, before = (float(torch.linalg.svdvals(truth.T @ each).min()) for each in (found, plain))
    assert kept > 0.9 > before
    assert float(weighted[40:].norm() / weighted[:40].norm()) < 0.3 * float(image[40:].norm() / image[:40].norm())
    assert not basis[300:, 1:].any()
    nothing = denoised(remembered(None, image, 3.0), degrees, torch.zeros(400, dtype=torch.bool), 3, power=0.5)
    assert not nothing[:, 1:].any()


def test_all_noisy_passes_make_the_basis_and_the_newest_counts_most() -> None:
    image, truth, degrees, known = planted()
    draws = torch.Generator().manual_seed(1)
    noisy = [0.4 * image + torch.randn(400, 3, generator=draws) for _ in range(4)]
    together = None
    for each in noisy:
        together = remembered(together, 2 * each, 2.0)
    assert together is not None
    close(together, torch.cat([MEMORY ** (3 - place) * each[:, 1:] for place, each in enumerate(noisy)], dim=1))
    alone = denoised(remembered(None, noisy[-1], 1.0), degrees, known, 3, power=0.0)
    bases = [denoised(together, degrees, known, 3, power=0.0), alone]
    frames = [torch.linalg.qr(basis[:, 1:] * degrees.sqrt()[:, None])[0] for basis in bases]
    kept, before = (float(torch.linalg.svdvals(truth.T @ frame).min()) for frame in frames)
    assert kept > before
    assert torch.equal(trusted(bases[0] * known[:, None]), known)


def test_each_item_of_a_client_has_the_same_part_of_a_noisy_pass() -> None:
    here = world(
        **SECURE, privacy__norm="l2", privacy__noise={"degrees": 1e-3, "spectral": 0.2}, pretraining__kind="spectral"
    )
    here.play(1)
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = here.algorithm.client("spectral", broadcast, rows, client_state, Key(SEED))
    assert sent.deltas is not None
    known, basis = trusted(broadcast.items), broadcast.items.double()
    for user in range(rows.n_users):
        own = rows.items[rows.segments == user]
        weights = 1 / (len(own) * broadcast.degrees[own].double()).sqrt()
        expected = (weights[:, None] * basis[own]).sum(0) * known[own, None]
        expected[:, 0] = 0
        close(sent.deltas[rows.segments == user].double(), expected)
        clipped = here.algorithm.protection.clip_update("spectral", sent)
        assert clipped.deltas is not None
        length = float(clipped.deltas[rows.segments == user].norm())
        assert length <= 1
        assert length > 0.999 or not expected.any()


def test_a_noisy_pass_uses_only_items_with_trusted_degrees() -> None:
    noise = {"degrees": 1.0, "spectral": 0.2}
    here = world(**SECURE, privacy__norm="l2", privacy__noise=noise, pretraining__kind="spectral")
    here.play(1)
    known = trusted(here.state.items)
    assert 0 < int(known.sum()) < 24
    broadcast, rows, client_state = here.block(here.population.everyone())
    sent, _ = here.algorithm.client("spectral", broadcast, rows, client_state, Key(SEED))
    assert torch.equal(sent.deltas.any(1), known[sent.items] & sent.deltas.any(1))
    assert bool(sent.deltas.any())
    assert not sent.deltas[:, 0].any()
    basis = here.state.items
    close(basis.T @ basis, torch.eye(6) * basis.square().sum(0))
    here.play(2)
    assert torch.equal(trusted(here.state.items), known)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretraining__kind": "contrastive"}, "hides the edges"),
        ({"model__n_layers": 3}, "at most two layers"),
        ({"server__weighting": "interactions"}, "weighting = uniform"),
    ],
)
def test_options_that_need_a_users_vector_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**SECURE, **changes)


def test_clusters_are_not_filled_from_sums_with_noise() -> None:
    filled = {"pretraining__kind": "spectral", "pretraining__passes": 1, "pretraining__cluster_passes": 1}
    found = [[each.name for each in world(**SECURE, **filled, **noise).algorithm.phases] for noise in ({}, NOISE)]
    assert [phases.count("clusters") for phases in found] == [1, 0]
