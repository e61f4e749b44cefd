import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose, draw_outside, paired, ranks
from perfedrec.core.types import Rows, block_rows


def rows_of(lists: list[list[int]]) -> Rows:
    offsets = torch.tensor([0, *itertools.accumulate(len(each) for each in lists)])
    items = torch.tensor([item for each in lists for item in sorted(each)], dtype=torch.int64)
    return block_rows(offsets, items, torch.arange(len(lists)))[0]


def drawn(lists: list[list[int]], n_items: int, counts: list[int], seed: int = 0) -> list[list[int]]:
    rows = rows_of(lists)
    items, owners = draw_outside(rows, n_items, torch.tensor(counts), Key(seed).spread(rows.users))
    assert bool((owners.diff() >= 0).all())
    return [items[owners == user].tolist() for user in range(len(lists))]


@given(size=st.integers(1, 200), n=st.integers(0, 250), seed=st.integers(0, 99))
def test_choose_takes_distinct_numbers(size: int, n: int, seed: int) -> None:
    chosen = choose(size, n, Key(seed)).tolist()
    assert len(chosen) == min(n, size)
    assert len(set(chosen)) == len(chosen)
    assert all(0 <= each < size for each in chosen)


def test_choose_takes_every_number_and_pair_equally_often() -> None:
    draws = np.array([choose(12, 4, Key(1).fold("cohort", number)).tolist() for number in range(5000)])
    assert stats.chisquare(np.bincount(draws.reshape(-1), minlength=12)).pvalue > 1e-3
    pairs = np.bincount(draws[:, 0] * 12 + draws[:, 1], minlength=144).reshape(12, 12)
    assert stats.chisquare(pairs[~np.eye(12, dtype=bool)]).pvalue > 1e-3


def test_ranks_count_within_a_segment() -> None:
    assert ranks(torch.tensor([0, 0, 2, 2, 2, 3]), 5).tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([[0, 1], [2]], [(0, 0), (1, 1), (2, 2)]),
        # of five items, the first user has three (so two negatives), the second all, and the third one
        ([[0, 1, 2], [0, 1, 2, 3, 4], [3]], [(0, 0), (2, 0), (1, 1), (8, 2)]),
    ],
)
def test_rows_share_negatives_in_turn_where_there_are_too_few(
    lists: list[list[int]], expected: list[tuple[int, int]]
) -> None:
    rows = rows_of(lists)
    _, owners = draw_outside(rows, 5, rows.counts, Key(0).spread(rows.users))
    pairs, negatives = paired(rows, owners)
    assert list(zip(pairs.tolist(), negatives.tolist(), strict=True)) == expected


@st.composite
def populations(draw: st.DrawFn) -> tuple[int, list[list[int]], list[int]]:
    n_items = draw(st.integers(1, 60))
    n_users = draw(st.integers(1, 6))
    lists = [sorted(draw(st.sets(st.integers(0, n_items - 1)))) for _ in range(n_users)]
    return n_items, lists, [draw(st.integers(0, 70)) for _ in range(n_users)]


@settings(max_examples=200)
@given(population=populations(), seed=st.integers(0, 1000))
def test_draws_are_distinct_not_owned_and_as_many_as_asked_for(
    population: tuple[int, list[list[int]], list[int]], seed: int
) -> None:
    n_items, lists, counts = population
    for own, wanted, got in zip(lists, counts, drawn(lists, n_items, counts, seed), strict=True):
        assert len(got) == min(wanted, n_items - len(own))
        assert len(set(got)) == len(got)
        assert not set(got) & set(own)
        assert set(got) <= set(range(n_items))


def test_a_user_with_all_items_but_one_gets_that_one() -> None:
    lists = [[item for item in range(1000) if item != 617], list(range(1000)), [5]]
    got = drawn(lists, 1000, [3, 3, 3])
    assert got[0] == [617]
    assert got[1] == []
    assert len(got[2]) == 3


def test_less_than_nothing_is_nothing() -> None:
    assert drawn([[0, 2], [1]], 5, [-3, 2])[0] == []


def test_items_of_the_next_user_are_not_taken_for_the_own_ones() -> None:
    lists = [list(range(1024)), list(range(1024, 1100))]
    got = drawn(lists, 1100, [99, 2000])
    assert [sorted(each) for each in got] == lists[::-1]


@pytest.mark.parametrize("n_items", [1, 2, 31, 40, 3000, 7597, 10**6, 3 * 10**9, 2**50 + 3])
def test_torch_draws_the_same(n_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    lists = [np.unique(generator.integers(0, n_items, size)).tolist() for size in (0, 1, 20, 300)]
    counts = [9, 0, 50, 2000]
    got = drawn(lists, n_items, counts)
    monkeypatch.setattr("perfedrec.core.sampling.usable", lambda *tensors: False)
    assert drawn(lists, n_items, counts) == got


def test_a_user_draws_the_same_alone_and_in_a_block() -> None:
    generator = np.random.default_rng(0)
    lists = [generator.choice(90, size, replace=False).tolist() for size in (3, 85, 0, 40, 90, 88, 10)]
    counts = torch.tensor([5, 4, 9, 30, 2, 2, 1])
    whole = rows_of(lists)
    offsets, key = whole.offsets, Key(4).fold("outside")
    items, owners = draw_outside(whole, 90, counts, key.spread(whole.users))
    for order in ([3], [1, 5], [6, 0, 2, 4], [4]):
        users = torch.tensor(order)
        block, _ = block_rows(offsets, whole.items, users)
        own, places = draw_outside(block, 90, counts[users], key.spread(users))
        for place, user in enumerate(order):
            assert own[places == place].tolist() == items[owners == user].tolist()


@pytest.mark.parametrize("own", [[], [0, 1, 2], [3, 9, 11, 12, 13]])
def test_draws_outside_are_uniform(own: list[int]) -> None:
    n, n_items = 6000, 16
    got = np.array(drawn([own] * n, n_items, [2] * n, seed=3))
    others = [item for item in range(n_items) if item not in own]
    for place in range(2):
        counts = np.bincount(got[:, place], minlength=n_items)
        assert counts[own].sum() == 0
        assert stats.chisquare(counts[others]).pvalue > 1e-3


def test_users_draw_independently_of_each_other() -> None:
    """The number of items that two users both draw has the mean of independent draws, k^2 / m."""
    n, n_items, k = 300, 6000, 60
    got = drawn([[]] * n, n_items, [k] * n, seed=5)
    seen = np.bincount(np.concatenate(got), minlength=n_items)
    pairs = (seen * (seen - 1)).sum() / 2
    expected = n * (n - 1) / 2 * k * k / n_items
    assert abs(pairs - expected) < 4 * expected**0.5
