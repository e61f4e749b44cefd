"""Intervals and groups of users."""

import numpy as np
import polars as pl
import pytest

from perfedrec.report.statistics import by_activity, mean_of


def test_an_interval_computed_by_hand() -> None:
    found = mean_of(np.array([1.0, 2.0, 3.0, 4.0]))
    # Standard error sqrt(5/3) / 2 = 0.6455; Student's t at 97.5 % with 3 degrees of freedom is 3.1824.
    assert (found.value, found.n) == (2.5, 4)
    assert found.low == pytest.approx(2.5 - 3.1824 * 0.645497, abs=1e-4)
    assert found.high == pytest.approx(2.5 + 3.1824 * 0.645497, abs=1e-4)
    assert found.interval() == "0.4457 to 4.5543"


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0, 0.0]])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    found = mean_of(np.array(values))
    assert (found.value, found.low, found.high) == (values[0], None, None)
    assert found.interval() == "none"


def test_users_are_grouped_by_quartiles_of_activity() -> None:
    users = pl.DataFrame({"interactions": [1, 2, 3, 4, 5, 6, 7, 8], "recall@20": [0.0, 1, 0, 0, 1, 1, 0.5, 0.5]})
    groups = by_activity(users, ["recall@20"])
    assert [(each.fewest, each.most, each.users) for each in groups] == [(1, 2, 2), (3, 4, 2), (5, 6, 2), (7, 8, 2)]
    assert [each.means["recall@20"].value for each in groups] == [0.5, 0.0, 1.0, 0.5]


def test_users_with_equal_activity_are_in_one_group() -> None:
    users = pl.DataFrame({"interactions": [3] * 6 + [9, 12], "recall@20": [0.0] * 8})
    groups = by_activity(users, ["recall@20"])
    assert [(each.label, each.users) for each in groups] == [("3", 6), ("9 to 12", 2)]
