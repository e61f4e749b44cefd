"""Compiled kernels against the torch functions that they stand for."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfedrec.core import compiled
from perfedrec.core.aggregate import LARGEST, distinct, reduce
from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key, fold_in, fold_numbers, fold_rows
from perfedrec.core.sampling import choose, draw_outside
from perfedrec.core.types import Update, block_rows, ranges

pytest.importorskip("numba")
import_module("perfedrec.core.kernels")  # so that words are mixed by the kernel
Result = TypeVar("Result")


def by_torch(function: Callable[[], Result]) -> Result:
    """What ``function`` returns without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        return function()


@given(
    n_users=st.integers(1, 9),
    n_items=st.sampled_from([1, 7, 31, 40, 4100]),
    asked=st.integers(0, 60),
    seed=st.integers(0, 999),
)
def test_the_same_items_are_drawn(n_users: int, n_items: int, asked: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owned = torch.rand(n_users, n_items, generator=generator) < torch.rand(n_users, 1, generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), owned.sum(1).cumsum(0)])
    rows, _ = block_rows(offsets, owned.nonzero()[:, 1].contiguous(), torch.arange(n_users))
    counts = torch.randint(asked + 1, (n_users,), generator=generator)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return draw_outside(rows, n_items, counts, Key(seed).spread(rows.users))

    for mine, theirs in zip(draw(), by_torch(draw), strict=True):
        assert torch.equal(mine, theirs)


@given(counts=st.lists(st.integers(0, 3), max_size=6), start=st.integers(0, 9))
def test_the_same_ranges(counts: list[int], start: int) -> None:
    starts = torch.arange(len(counts)) * 10 + start
    mine = ranges(starts, torch.tensor(counts, dtype=torch.int64))
    assert mine[2].tolist() == [10 * k + start + place for k, count in enumerate(counts) for place in range(count)]
    assert mine[1].tolist() == [k for k, count in enumerate(counts) for _ in range(count)]
    for one, other in zip(mine, by_torch(lambda: ranges(starts, torch.tensor(counts, dtype=torch.int64))), strict=True):
        assert torch.equal(one, other)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=9), data=st.data())
def test_the_same_rows_of_users(counts: list[int], data: st.DataObject) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    items, users = torch.arange(sum(counts)) * 3, st.lists(st.integers(0, len(counts) - 1), max_size=9)
    which = torch.tensor(data.draw(users), dtype=torch.int64)
    mine, theirs = block_rows(offsets, items, which), by_torch(lambda: block_rows(offsets, items, which))
    for name, value in vars(mine[0]).items():
        assert value is None or torch.equal(value, getattr(theirs[0], name)), name
    assert torch.equal(mine[1], theirs[1])
    with pytest.raises(IndexError):
        block_rows(offsets, items, torch.tensor([len(counts)]))


@pytest.mark.parametrize("seed", [0, -3, 2**63 + 5])
def test_the_same_keys(seed: int) -> None:
    """Where there are many keys, a compiled kernel makes them in place of torch."""
    key, ids = Key(seed).fold("a"), torch.arange(1000).view(20, 50) * 7
    assert torch.equal(key.spread(ids), by_torch(lambda: key.spread(ids)))
    keys, segments, flat = key.spread(torch.arange(300)), torch.arange(1000) % 300, ids.flatten()
    found = fold_rows(keys, segments, flat)
    assert torch.equal(found, by_torch(lambda: fold_rows(keys, segments, flat)))
    assert torch.equal(found, fold_in(keys[segments], flat))
    numbers = fold_numbers(keys, 3)
    assert torch.equal(numbers, by_torch(lambda: fold_numbers(keys, 3)))
    assert torch.equal(numbers[:, 2], fold_in(keys, torch.tensor(2)))


@given(
    size=st.integers(1, 70) | st.sampled_from([4095, 4096, 70_000, 3 * 10**9]), n=st.integers(0, 99), seed=st.integers()
)
def test_the_same_numbers_are_chosen(size: int, n: int, seed: int) -> None:
    mine, theirs = choose(size, n, Key(seed)), by_torch(lambda: choose(size, n, Key(seed)))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("n", [1, 255, 256, 5000])
def test_the_same_words(n: int) -> None:
    ids = torch.arange(n) - n // 2
    assert torch.equal(Key(5).spread(ids), by_torch(lambda: Key(5).spread(ids)))


@given(keys=st.lists(st.integers(0, 99), max_size=30))
def test_the_same_distinct_keys(keys: list[int]) -> None:
    def find() -> tuple[torch.Tensor, torch.Tensor]:
        return distinct(torch.tensor(keys, dtype=torch.int64), 100)

    for mine, theirs in zip(find(), by_torch(find), strict=True):
        assert torch.equal(mine, theirs)


def sent(n_users: int, n_rows: int, width: int, seed: int) -> Update:
    """Changes of very different sizes, whose sum depends on the order wherever it is not exact."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-8, 1, (n_rows, width), generator=generator)
    segments = torch.randint(n_users, (n_rows,), generator=generator).sort().values
    return Update(
        users=torch.arange(n_users),
        groups=torch.randint(3, (n_users,), generator=generator),
        weights=torch.rand(n_users, generator=generator) * 50,
        segments=segments,
        items=torch.randint(6, (n_rows,), generator=generator),
        deltas=torch.randn(n_rows, width, generator=generator) * sizes,
    )


@given(n_rows=st.integers(0, 40), width=st.sampled_from([1, 3, 8, 65]), seed=st.integers(0, 999))
def test_sums_are_the_same_to_the_last_bit(n_rows: int, width: int, seed: int) -> None:
    update = sent(4, n_rows, width, seed)
    mine, theirs = reduce(update, 6, 3), by_torch(lambda: reduce(update, 6, 3))
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.sums, theirs.sums)


def test_sums_do_not_depend_on_threads_and_order() -> None:
    update, before = sent(4, 5000, 9, seed=1), torch.get_num_threads()
    alone = reduce(update, 6, 3)
    turned = replace(update, **{name: getattr(update, name).flip(0) for name in ("segments", "items", "deltas")})
    torch.set_num_threads(3)
    try:
        assert torch.equal(reduce(update, 6, 3).sums, alone.sums)
        assert torch.equal(reduce(turned, 6, 3).sums, alone.sums)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 2 * LARGEST, 1e38])
def test_a_change_that_no_sum_can_hold_is_refused(broken: float) -> None:
    update = sent(4, 20, 5, seed=2)
    assert update.deltas is not None
    update.deltas[7, 2] = broken
    with pytest.raises(DivergedError, match="learning rate"):
        reduce(replace(update, weights=torch.ones(4)), 6, 3)


def test_exponentials_and_the_largest() -> None:
    from numba import njit

    from perfedrec.core import kernels

    @njit
    def exponentials(values, out):  # type: ignore[no-untyped-def]
        for place in range(values.size):
            out[place] = kernels.exp(values[place])

    @njit
    def largest(values):  # type: ignore[no-untyped-def]
        return kernels.largest(values)

    values = np.linspace(-100, 88, 100_001).astype(np.float32)
    given, expected = np.empty_like(values), np.exp(values.astype(np.float64).clip(min=-87))
    exponentials(values[:-1], given[:-1])
    np.testing.assert_allclose(given[:-1], expected[:-1], rtol=3e-7)
    for some in ([-3, -1, -2], [3, -5, 7.5], [-np.inf, -1e30], [-0.0, 0.0], [np.inf, 1], [-1e-40]):
        assert largest(np.array(some, np.float32)) == np.float32(max(some))
    assert largest(values[::-1].copy()) == 88
