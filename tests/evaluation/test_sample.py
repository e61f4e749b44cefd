"""The sample of users who validate, and how sure its figures are."""

from itertools import combinations

import numpy as np
import pytest
import torch

from perfedrec.core.keys import words_of
from perfedrec.evaluation import Held, Totals
from perfedrec.evaluation.sample import in_sample, of_sample, share_of, standard_error

WORDS = words_of(f"user {number}" for number in range(20_000))


def test_all_users_are_asked_up_to_the_number_that_is_wanted() -> None:
    assert [share_of(1000, wanted) for wanted in (0, 999, 1000, 1001, 250)] == [1.0, 0.999, 1.0, 1.0, 0.25]
    assert bool(in_sample(WORDS, 1.0).all())


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_a_sample_has_its_share_of_users(share: float) -> None:
    """Within four standard errors."""
    count = int(in_sample(WORDS, share).sum())
    assert count == pytest.approx(20_000 * share, abs=4 * (20_000 * share * (1 - share)) ** 0.5)


def test_a_smaller_sample_is_a_part_of_a_larger_one_and_each_user_is_in_it_by_itself() -> None:
    small, large = in_sample(WORDS, 0.1), in_sample(WORDS, 0.3)
    assert not bool((small & ~large).any())
    assert torch.equal(in_sample(WORDS[5:9], 0.3), large[5:9])
    assert torch.equal(in_sample(WORDS.flip(0), 0.3), large.flip(0))


def test_held_out_items_of_other_users_are_left_out() -> None:
    held = Held(torch.tensor([0, 2, 2, 3, 6]), torch.tensor([4, 7, 1, 0, 2, 9]))
    kept = of_sample(held, torch.tensor([True, True, False, True]))
    assert kept.offsets.tolist() == [0, 2, 2, 2, 5]
    assert kept.items.tolist() == [4, 7, 0, 2, 9]


def test_the_standard_error_is_the_deviation_of_the_means_of_all_samples() -> None:
    """Of all samples of 3 of 5 users: the mean of the squared errors is that of ``S^2 / n (1 - n / N)``."""
    values = np.array([0.0, 1.0, 0.25, 0.5, 1.0])
    samples = [values[list(each)] for each in combinations(range(5), 3)]
    expected = np.mean([(each.mean() - values.mean()) ** 2 for each in samples])
    errors = [standard_error(each.sum(), (each**2).sum(), 3, 3 / 5) for each in samples]
    assert np.mean(np.square(errors)) == pytest.approx(expected)
    for each, error in zip(samples, errors, strict=True):
        totals = Totals((1,), 5)
        totals.add_values({"recall@1": torch.tensor(each[:2])}, None, torch.arange(2))
        totals.add_values({"recall@1": torch.tensor(each[2:])}, None, torch.arange(1))
        assert totals.standard_error("recall@1", 3 / 5) == pytest.approx(error, abs=1e-12)


def test_one_user_has_no_standard_error() -> None:
    assert standard_error(0.5, 0.25, 1, 0.1) == 0.0
    totals = Totals((1,), 5)
    totals.add_values({"recall@1": torch.ones(1, dtype=torch.float64)}, None, torch.arange(1))
    assert totals.standard_error("recall@1", 0.1) == 0.0
