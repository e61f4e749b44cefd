import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from perfedrec.core.keys import Key, bits, domain, fold_in, laplace, normal, shuffle, symmetric, uniform

SAMPLES = [(uniform, "uniform", ()), (laplace, "laplace", ()), (normal, "norm", ()), (symmetric, "uniform", (-1, 2))]


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64, computed with Python integers."""
    mask = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_words_equal_those_of_splitmix64(key: int) -> None:
    golden = 0x9E3779B97F4A7C15
    words = bits(torch.tensor([key]), 3)[0].tolist()
    assert [word % 2**64 for word in words] == [splitmix((key + n * golden) % 2**64) for n in (1, 2, 3)]


def test_published_first_words_of_splitmix64() -> None:
    """The output of the public implementation (Vigna, splitmix64.c) for seed 1234567."""
    words = bits(torch.tensor([1234567]), 5)[0].tolist()
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [word % 2**64 for word in words] == expected


def test_the_same_key_gives_the_same_numbers_and_another_key_gives_others() -> None:
    ids = torch.arange(50)
    keys = Key(7).fold("noise", 3).spread(ids)
    assert torch.equal(keys, Key(7).fold("noise", 3).spread(ids))
    assert torch.equal(keys, Key(7).fold("noise").fold(3).spread(ids))
    for other in (Key(8).fold("noise", 3), Key(7).fold("noise", 4), Key(7).fold("decoys", 3), Key(7).fold(3, "noise")):
        assert not bool((other.spread(ids) == keys).any())
    assert Key(0).fold("x") != Key(0)  # seed 0 is a seed
    assert Key(0).fold(0) != Key(0).fold(0, 0)


@pytest.mark.parametrize(("draw", "_name", "_args"), SAMPLES)
def test_draws_do_not_depend_on_block_order_or_number(
    draw: Callable[[Tensor, int], Tensor], _name: str, _args: tuple[int, ...]
) -> None:
    ids = torch.arange(40)
    key = Key(3).fold("draws")
    whole = draw(key.spread(ids), 5)
    assert torch.equal(whole[7:9], draw(key.spread(ids[7:9]), 5))
    assert torch.equal(whole.flip(0), draw(key.spread(ids.flip(0)), 5))
    assert torch.equal(whole[:, :3], draw(key.spread(ids), 3))
    pairs = fold_in(key.spread(ids)[:, None], ids[:6])
    assert torch.equal(draw(pairs, 4)[5, 2], draw(fold_in(key.spread(ids[5:6]), ids[2:3]), 4)[0])


@pytest.mark.parametrize(("draw", "name", "args"), SAMPLES)
def test_draws_follow_their_distribution(
    draw: Callable[[Tensor, int], Tensor], name: str, args: tuple[int, ...]
) -> None:
    law = getattr(stats, name)(*args)
    values = draw(Key(11).spread(torch.arange(40_000)), 5).to(torch.float64).numpy()
    n = values.size
    assert stats.kstest(values.reshape(-1), law.cdf).pvalue > 1e-3
    mean, variance, _, kurtosis = (float(each) for each in law.stats("mvsk"))
    assert abs(values.mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs(values.var() - variance) < 4 * variance * ((kurtosis + 2) / n) ** 0.5
    correlations = np.corrcoef(values.T)[np.triu_indices(5, 1)]  # of the numbers of one key
    assert np.abs(correlations).max() < 4 / len(values) ** 0.5
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 4 / len(values) ** 0.5  # of neighbouring users


def test_no_draw_is_infinite_or_at_the_limit() -> None:
    keys = Key(5).spread(torch.arange(2_000_000))
    u, s = uniform(keys, 1), symmetric(keys, 1)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert float(s.abs().max()) < 1
    assert float(s.abs().min()) > 0
    for draw in (laplace, normal):
        assert bool(draw(keys, 1).isfinite().all())


def test_no_keys_give_no_numbers() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for keys in (none, fold_in(none, none), fold_in(none[:, None], torch.arange(2))):
        for draw in (uniform, laplace, normal, symmetric):
            assert draw(keys, 3).shape == (*keys.shape, 3)


def test_the_extreme_words_give_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest and the smallest 24-bit halves, which are rare even in a sample of millions."""
    extremes = torch.tensor([[0x7FFFFFFF_7FFFFFFF, -0x7FFFFFFF_80000000 - 1 + 0, 0, -1]])
    monkeypatch.setattr("perfedrec.core.keys.bits", lambda keys, n: extremes[:, :n].clone())
    keys = torch.zeros(1, dtype=torch.int64)
    assert float(symmetric(keys, 8).max()) == 1 - 2.0**-24
    assert float(symmetric(keys, 8).min()) == -(1 - 2.0**-24)
    assert 0 < float(uniform(keys, 8).min()) < float(uniform(keys, 8).max()) < 1
    assert float(normal(keys, 8).abs().max()) == pytest.approx(stats.norm.isf(2.0**-25), rel=1e-3)
    assert float(laplace(keys, 8).abs().max()) == pytest.approx(24 * np.log(2), rel=1e-6)


@settings(max_examples=150)
@given(
    size=st.integers(1, 3000) | st.sampled_from([1, 2, 3, 4, 5, 31, 32, 33, 4095, 4096, 4097, 7919]), key=st.integers()
)
def test_shuffle_is_a_bijection(size: int, key: int) -> None:
    n = domain(size)
    assert size <= n <= size + size**0.5 + 1
    images = shuffle(Key(key).spread(torch.zeros(n, dtype=torch.int64)), torch.arange(n), size)
    assert images.sort().values.tolist() == list(range(n))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_small_set_are_equally_likely(size: int) -> None:
    n = 6000
    keys = Key(21).spread(torch.arange(n)).repeat_interleave(domain(size))
    images = shuffle(keys, torch.arange(domain(size)).repeat(n), size).view(n, -1).tolist()
    seen = dict.fromkeys(itertools.permutations(range(size)), 0)
    for row in images:
        seen[tuple(image for image in row if image < size)] += 1
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("size", [7, 13, 31, 32, 100, 331, 1000, 5000])
def test_first_images_and_their_differences_are_uniform(size: int) -> None:
    n, tried = 20_000, 8 + domain(size) - size
    keys = Key(22).spread(torch.arange(n)).repeat_interleave(tried)
    images = shuffle(keys, torch.arange(tried).repeat(n), size).view(n, tried).numpy()
    order = np.argsort(images >= size, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(images, order, 1).T
    cells = min(size, 100)
    places, distances = first * cells // size, (second - first) % size
    expected = np.bincount(np.arange(size) * cells // size, minlength=cells) * n / size
    assert stats.chisquare(np.bincount(places, minlength=cells), expected).pvalue > 1e-3
    assert int(distances.min()) > 0
    cells = min(size - 1, 100)
    expected = np.bincount(np.arange(size - 1) * cells // (size - 1), minlength=cells) * n / (size - 1)
    places = (distances - 1) * cells // (size - 1)
    assert stats.chisquare(np.bincount(places, minlength=cells), expected).pvalue > 1e-3
