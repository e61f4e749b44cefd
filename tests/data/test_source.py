from collections.abc import Callable
from pathlib import Path

import pytest

from perfedrec.data import load


@pytest.mark.real_data
def test_yelp_as_given(real_data: Callable[[str], Path]) -> None:
    data = load(real_data("yelp"))
    assert (data.n_users, data.n_items, data.train.n_interactions) == (5224, 7597, 112576)
    assert (data.notes.test.unknown_items, data.notes.test.left_out, data.notes.test.interactions) == (62, 80, 5224)
    assert (data.notes.valid.unknown_items, data.notes.valid.left_out) == (49, 55)
    assert int((data.test.degrees > 0).sum()) == 5144
    assert any("62 items never occur in training" in line for line in data.notes.lines())
