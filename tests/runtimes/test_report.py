"""Bytes and losses of a round, computed by hand."""

import pytest
import torch
from tests.methods.federated.toys import SEED, world

from perfedrec.runtimes.round import round_key


def test_bytes_of_the_join_phase() -> None:
    """Each of 30 users sends group and weight (8), its items as tokens (4 each), and two layers of 6 numbers."""
    here = world(model__n_layers=2)
    counts = here.population.offsets.diff()
    (report,) = here.play(1)
    assert (report.phase, report.cohort, report.clients, report.loss) == ("join", 30, 30, None)
    assert report.bytes_up == int((8 + 4 * counts + 4 * 2 * 6).sum())
    assert report.bytes_up_max == 8 + 4 * int(counts.max()) + 48
    assert report.bytes_down == 30 * (4 * 24 * 6 + 4 * 24)  # table and degrees


def test_bytes_of_two_views_of_contrastive_pretraining() -> None:
    here = world(pretraining__kind="contrastive", model__neighbours=False)
    counts = here.population.offsets.diff()
    (report,) = here.play(1)
    assert report.bytes_up == int((8 + 2 * 4 * counts + 4 * 6).sum())
    (report,) = here.play(1)
    assert report.bytes_down == 12 * (4 * 24 * 6 + 4 * 24 + 4 * 6)  # and the pre-trained vector


@pytest.mark.parametrize("block_size", [1, 5, 1024])
def test_bytes_of_a_round_of_training(block_size: int) -> None:
    """A positive and a negative per item: rows of an index and 6 numbers; one report of 6 numbers."""
    here = world(model__neighbours=False)
    counts = here.population.offsets.diff()
    cohort = here.algorithm.plan(here.state, round_key(SEED, 0).fold("plan")).cohort
    (report,) = here.play(1, block_size=block_size)
    sizes = 8 + 2 * counts[cohort] * (4 + 24) + 24
    assert (report.phase, report.cohort, report.clients) == ("train", 12, 12)
    assert (report.bytes_up, report.bytes_up_max) == (int(sizes.sum()), int(sizes.max()))
    assert report.bytes_down == 12 * (4 * 24 * 6 + 4 * 24)  # no clusters yet
    (report,) = here.play(1, block_size=block_size)
    assert report.bytes_down == 12 * (2 * 4 * 24 * 6 + 4 * 24)  # a client's own cluster, not all three


def test_bytes_of_softmax_dense_weights_and_neighbour_sums() -> None:
    here = world(client__loss="softmax", client__n_negatives=5, attributes=True, clusters__n_clusters=0)
    here.play(1)
    counts = here.population.offsets.diff()
    cohort = here.algorithm.plan(here.state, round_key(SEED, 1).fold("plan")).cohort
    dense = (6 * 3 + 2 * (36 + 6) + 6) + (6 * 4 + 2 * (36 + 6) + 6)  # of 3 user and 4 item attributes
    assert here.state.dense.numel() == dense
    (report,) = here.play(1)
    assert report.bytes_up == int((8 + (counts[cohort] + 5) * 28 + 4 * dense + 2 * 24).sum())
    assert report.bytes_down == 12 * 4 * (24 * 6 + 24 + dense + 24 * 4 + 2 * 24 * 6)


def test_a_pass_over_the_clients_sends_the_rows_of_their_own_items() -> None:
    here = world(pretraining__kind="spectral", model__encoder="spectral", pretraining__cluster_passes=1)
    counts = here.population.offsets.diff()
    _, report = here.play(2)
    assert report.phase == "clusters"
    assert report.bytes_up == int((8 + counts * 28).sum())
    assert report.loss is None


@pytest.mark.parametrize("block_size", [1, 7, 1024])
def test_the_loss_is_the_mean_over_the_clients(block_size: int) -> None:
    here = world(model__neighbours=False)
    cohort = here.algorithm.plan(here.state, round_key(SEED, 0).fold("plan")).cohort
    (report,) = here.play(1, block_size=block_size)
    assert report.loss == pytest.approx(float(here.population.client_state.loss[cohort].double().mean()), rel=1e-6)
    resting = torch.ones(30, dtype=torch.bool)
    resting[cohort] = False
    assert not bool(here.population.client_state.loss[resting].any())
    assert 0.5 < report.loss < 0.8  # of untrained BPR: near log 2
