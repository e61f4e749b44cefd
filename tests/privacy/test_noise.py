"""Sources of noise: moments and distributions, the sum of many clients' noise, and OpenDP's samplers."""

import numpy as np
import pytest
import torch
from scipy import stats

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.keys import Key
from perfedrec.privacy.noise import Law, opendp_measurement, opendp_noise, row_noise, summed_noise

N = 40_000

CHANCE = 1e-12
"""The probability by which a test without a seed may fail. A wrong law has to be much less probable than that."""


@pytest.mark.parametrize("clients", [1, 2, 7, 300])
@pytest.mark.parametrize("law", ["laplace", "gaussian"])
def test_the_summed_noise_has_the_law_of_explicit_draws(law: Law, clients: int) -> None:
    summed = summed_noise(law, (N // 8, 8), 0.3, clients, Key(1), "simulation").numpy().reshape(-1)
    size = N if clients < 100 else N // 8
    keys = Key(2).spread(torch.arange(size))
    explicit = sum(row_noise(law, keys ^ client * 0x9E3779B9, 1, 0.3).double() for client in range(clients))
    assert stats.ks_2samp(summed, np.asarray(explicit).reshape(-1)).pvalue > 1e-3
    variance = clients * 0.3**2 * (2 if law == "laplace" else 1)
    kurtosis = 3 / clients if law == "laplace" else 0.0
    assert abs(summed.mean()) < 4 * (variance / N) ** 0.5
    assert abs(summed.var() / variance - 1) < 4 * ((kurtosis + 2) / N) ** 0.5


def test_one_clients_noise_has_the_given_law() -> None:
    for law, frozen in (("laplace", stats.laplace(scale=0.3)), ("gaussian", stats.norm(scale=0.3))):
        noise = summed_noise(law, (N,), 0.3, 1, Key(5), "simulation").numpy()  # type: ignore[arg-type]
        assert stats.kstest(noise, frozen.cdf).pvalue > 1e-3


def test_noise_is_determined_by_its_key() -> None:
    for law in ("laplace", "gaussian"):
        one, two, other = (summed_noise(law, (5, 3), 1.0, 4, Key(seed), "simulation") for seed in (1, 1, 2))  # type: ignore[arg-type]
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


@pytest.mark.parametrize("law", ["laplace", "gaussian"])
def test_opendp_draws_the_law_and_states_its_guarantee(law: Law) -> None:
    frozen = stats.laplace(scale=0.7) if law == "laplace" else stats.norm(scale=0.7)
    noise = opendp_noise(law, N, 0.7)
    assert stats.kstest(noise, frozen.cdf).pvalue > CHANCE
    others = stats.norm(scale=0.7) if law == "laplace" else stats.laplace(scale=0.7), type(frozen.dist)()(scale=0.85)
    assert all(stats.kstest(noise, other.cdf).pvalue < CHANCE for other in others)  # a wrong law would be seen
    assert not np.array_equal(noise, opendp_noise(law, 4000, 0.7))  # it has no seed
    measurement, _ = opendp_measurement(law, 10, 0.7)
    stated = 1 / 0.7 if law == "laplace" else 0.5 / 0.7**2  # epsilon, and rho of zCDP
    assert measurement.map(1.0) == pytest.approx(stated, rel=1e-6)
    assert measurement.map(1.0) >= stated


@pytest.mark.parametrize("law", ["laplace", "gaussian"])
def test_opendp_noise_covers_the_last_bit_of_a_sum(law: Law) -> None:
    """Noise on a coarser grid than that of the sums would reveal their low bits."""
    fixed = opendp_noise(law, 4096, 0.7) * FIXED_POINT
    assert np.array_equal(fixed, np.rint(fixed))  # on the grid: nothing is rounded when it is added
    assert stats.chisquare(np.bincount(np.mod(fixed, 64).astype(int), minlength=64)).pvalue > CHANCE


def test_opendp_draws_for_sums() -> None:
    noise = summed_noise("gaussian", (60, 50), 0.2, 9, Key(0), "opendp").numpy().reshape(-1)
    assert stats.kstest(noise, stats.norm(scale=0.6).cdf).pvalue > CHANCE
    noise = summed_noise("laplace", (60, 50), 0.2, 3, Key(0), "opendp").numpy().reshape(-1)
    reference = summed_noise("laplace", (60, 50), 0.2, 3, Key(0), "simulation").numpy().reshape(-1)
    assert stats.ks_2samp(noise, reference).pvalue > CHANCE
