from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfedrec.data import Interactions, last_ties, read

TIMES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6)


def interactions(times: list[list[int]]) -> Interactions:
    rows = [(user, item, time) for user, mine in enumerate(times) for item, time in enumerate(mine)]
    return Interactions.from_frame(pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"))


def test_by_hand() -> None:
    found = last_ties(interactions([[1, 2, 3], [3, 1, 3], [2, 2, 3], [1, 2, 1, 3], [5, 5]]))
    assert found is not None
    assert (found.users, found.last, found.last_two) == (4, 1, 2)  # the fifth user has too few
    assert found.lines() == [
        "equal times: 1 of 4 users (25%) have several interactions at their last time; the last two are not determined "
        "for 2 (50%)"
    ]


@given(times=TIMES)
def test_as_by_counting(times: list[list[int]]) -> None:
    long = [sorted(mine) for mine in times if len(mine) >= 3]
    found = last_ties(interactions(times))
    assert found is not None
    assert found.users == len(long)
    assert found.last == sum(mine.count(mine[-1]) > 1 for mine in long)
    assert found.last_two == sum(len(set(mine[-3:])) < 3 for mine in long)
    assert bool(found.lines()) == bool(found.last_two)


def test_without_times() -> None:
    assert last_ties(Interactions(np.arange(1), np.arange(1), np.array([0, 1]), np.array([0]))) is None


@pytest.mark.real_data
def test_movielens(real_data: Callable[[str], Path]) -> None:
    found = last_ties(Interactions.from_frame(read(real_data("ml-100k") / "u.data")))
    assert found is not None
    assert found.users == 943
    assert (round(found.last / 943, 2), round(found.last_two / 943, 2)) == (0.44, 0.64)
