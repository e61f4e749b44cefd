"""Paired comparisons over users, against values computed by hand and by enumeration."""

from itertools import product

import numpy as np
import pytest

from perfedrec.evaluation.significance import adjusted, compare


def test_the_p_value_is_the_share_of_sign_flips_at_least_as_far_from_zero() -> None:
    differences = np.array([0.4, 0.1, -0.2, 0.3, 0.5])
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=5)]
    expected = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    reference = np.full(5, 0.25)
    assert compare(reference + differences, reference).p == pytest.approx(expected)


def test_users_without_a_difference_count_in_mean_and_interval_but_not_in_sign_flips() -> None:
    differences = np.array([1.0, 1.0, 1.0, 0.0])
    found = compare(differences, np.zeros(4))
    assert found.p == pytest.approx(2 / 8)  # +++ and ---
    assert (found.difference, found.users) == (0.75, 4)
    half = 3.182446305284263 * 0.25  # t of 3 degrees of freedom at 97.5 %; standard error 0.5 / sqrt(4)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_a_real_difference_is_found_and_an_absent_one_is_not() -> None:
    draw = np.random.default_rng(3)
    reference = draw.random(500)
    noise = draw.normal(0, 0.1, 500)
    assert compare(reference + 0.03 + noise, reference).p <= 1e-3
    assert compare(reference + noise - noise.mean(), reference).p > 0.9
    assert compare(reference, reference).p == 1.0
    assert compare(reference + noise, reference) == compare(reference + noise, reference)


def test_p_values_are_adjusted_after_benjamini_and_yekutieli() -> None:
    # sorted .01 .02 .5; times 3 / rank * (1 + 1/2 + 1/3): .055, .055, .9166
    assert adjusted([0.5, 0.01, 0.02]) == pytest.approx([0.5 * 11 / 6, 0.055, 0.055])
    assert adjusted([]) == []
