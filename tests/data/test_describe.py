import json

import numpy as np
import polars as pl
import pytest

from perfedrec.data import Interactions, describe, gini


def test_describe_a_frame() -> None:
    frame = pl.DataFrame(
        {"user": [1, 1, 1, 2, 2, 3, 3], "item": [1, 2, 3, 1, 1, 1, 2], "timestamp": [0, 86_400, 5, 6, 7, 8, 9]}
    )
    facts = describe(frame)
    assert json.loads(json.dumps(facts)) == facts
    assert {name: facts[name] for name in ("users", "items", "interactions", "duplicates", "first", "last")} == {
        "users": 3,
        "items": 3,
        "interactions": 6,
        "duplicates": 1,
        "first": "1970-01-01T00:00:00+00:00",
        "last": "1970-01-02T00:00:00+00:00",
    }
    assert facts["density"] == pytest.approx(6 / 9)
    # degrees 3, 1, 2: sum of |x_i - x_j| over ordered pairs is 8, so gini is 8 / (2 * 3 * 6)
    expected = {"min": 1, "q1": 1.5, "median": 2, "q3": 2.5, "max": 3, "mean": 2, "gini": 8 / 36}
    assert facts["user_degrees"] == pytest.approx(expected)
    assert facts["item_degrees"] == pytest.approx(expected)


def test_describe_interactions_without_times() -> None:
    facts = describe(Interactions(np.array([5]), np.array([7, 8]), np.array([0, 1]), np.array([1])))
    assert (facts["duplicates"], facts["first"], facts["last"], facts["density"]) == (0, None, None, 0.5)


def test_gini_against_its_definition() -> None:
    values = np.random.default_rng(0).integers(0, 50, size=40)
    pairs = np.abs(values[:, None] - values[None]).sum() / (2 * values.size * values.sum())
    assert gini(values) == pytest.approx(pairs)
    assert gini(np.array([4, 4, 4])) == 0
    assert gini(np.array([0, 0])) == 0
