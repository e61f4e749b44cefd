"""Masked uploads: each one alone is random, and together they are the sum."""

from dataclasses import replace

import torch
from scipy import stats
from tests.algorithms.toys import SEED, assert_same, world

from perfedrec.core.keys import Key
from perfedrec.core.types import reduce
from perfedrec.privacy.aggregation import PairwiseMasks
from perfedrec.runtimes.round import play_round


def test_masks_cancel_and_hide() -> None:
    here = world(privacy__aggregation="secure", pretraining__kind="spectral")
    here.play(len(here.algorithm.prelude) + 3)
    view, rows, memory = here.block([3, 8, 21, 4])
    sent, _ = here.algorithm.client("train", view, rows, memory, Key(SEED))
    groups = here.algorithm.n_groups(here.state)
    masks = PairwiseMasks(Key(4))
    total, plain = masks(sent, 24, groups), reduce(sent, 24, groups)
    touched = plain.sums.any(1)
    assert torch.equal(total.keys, plain.keys[touched])
    assert torch.equal(total.sums, plain.sums[touched])
    assert torch.equal(total.dense, plain.dense)
    uploads = masks.uploads(sent, 24, groups)
    assert uploads.shape == (4, groups * 24 * 6 + sent.dense.shape[1])
    other = masks.uploads(replace(sent, deltas=sent.deltas * -7), 24, groups)
    for upload in (*uploads, *other):
        words = upload.numpy().view("uint64") / 2.0**64
        assert stats.kstest(words, "uniform").pvalue > 1e-3


def test_a_protocol_takes_the_place_of_the_sum_in_a_round() -> None:
    plain, masked = (world(privacy__aggregation="secure", pretraining__kind="spectral") for _ in range(2))
    for _ in range(9):
        plain.play(1)
        masked.state, _ = play_round(
            masked.algorithm, masked.state, masked.population, SEED, aggregator=PairwiseMasks(Key(1))
        )
        assert_same(plain.state, masked.state)
