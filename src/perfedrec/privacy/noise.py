"""Sources of noise: keyed draws for simulation, and OpenDP's samplers for real clients.

Keyed noise is fast and repeatable, and so does not protect against anybody who has the seed. Its generator is not
cryptographic, and floating-point samplers leak through their low bits (Mironov, CCS 2012). OpenDP's samplers are exact
on a grid and take their randomness from the operating system. The grid is that of the sums, because noise on a coarser
grid would not hide the low bits of a sum.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import log2
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT
from perfedrec.core.extras import MissingExtraError, needed_by
from perfedrec.core.keys import Key, laplace, normal
from perfedrec.privacy.settings import PrivacySettings

Law = Literal["laplace", "gaussian"]
_REAL_NOISE = "noise from OpenDP (privacy.noise_source)"
_ROW = 64  # numbers drawn with one key


def summed_noise(law: Law, shape: tuple[int, ...], scale: float, clients: int, key: Key, source: str) -> Tensor:
    """float64 of ``shape``: the sum of the noise of ``clients`` clients, each of whom adds noise of the ``law`` to
    every number.

    ``scale`` is one client's standard deviation or Laplace scale. One draw gives the whole sum: a sum of normal numbers
    is normal, and a sum of n Laplace numbers is the difference of two Gamma(n) numbers (each Laplace number is the
    difference of two exponential ones). With ``source`` "opendp" OpenDP draws: once for normal noise, and once per
    client for Laplace noise.
    """
    size = int(np.prod(shape))
    if source == "opendp":
        if law == "gaussian":
            return torch.from_numpy(opendp_noise(law, size, scale * clients**0.5)).reshape(shape)
        total = np.zeros(size)
        for _ in range(clients):
            total += opendp_noise(law, size, scale)
        return torch.from_numpy(total).reshape(shape)
    if law == "gaussian":
        rows = torch.arange(-(-size // _ROW))
        drawn = normal(key.spread(rows), _ROW).reshape(-1)[:size].to(torch.float64).mul_(scale * clients**0.5)
        return drawn.reshape(shape)
    rng = np.random.default_rng(key.value)
    return torch.from_numpy(scale * (rng.standard_gamma(clients, shape) - rng.standard_gamma(clients, shape)))


def row_noise(law: Law, keys: Tensor, n: int, scale: float) -> Tensor:
    """[T, n] noise for single clients' rows, drawn with ``keys`` [T] (simulation)."""
    return (laplace if law == "laplace" else normal)(keys, n).mul_(scale)


def check_source(settings: PrivacySettings) -> None:
    """Raise :class:`MissingExtraError` before the first draw if the settings need OpenDP and it is not installed."""
    if settings.noisy and settings.noise_source == "opendp" and find_spec("opendp") is None:
        raise MissingExtraError(_REAL_NOISE, "opendp")


def opendp_noise(law: Law, size: int, scale: float) -> NDArray[np.float64]:
    """``size`` numbers drawn by OpenDP, whole multiples of 1 / FIXED_POINT."""
    return opendp_noised(law, np.zeros(size), scale)


def opendp_noised(law: Law, values: NDArray[np.floating], scale: float) -> NDArray[np.float64]:
    """``values`` rounded to multiples of 1 / FIXED_POINT, plus OpenDP's noise on the same grid."""
    measurement, _ = opendp_measurement(law, values.size, scale)
    return np.asarray(measurement(values.reshape(-1).tolist()), dtype=np.float64).reshape(values.shape)


def opendp_measurement(law: Law, size: int, scale: float) -> tuple[Any, Any]:
    """OpenDP's mechanism for a vector of ``size`` numbers, and its module. ``.map(d_in)`` of the mechanism states its
    guarantee. Raises :class:`MissingExtraError` if OpenDP is not
    installed."""
    with needed_by(_REAL_NOISE):
        import opendp.prelude as dp
    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T=float, nan=False), size=size)
    metric = dp.l1_distance(T=float) if law == "laplace" else dp.l2_distance(T=float)
    make = dp.m.make_laplace if law == "laplace" else dp.m.make_gaussian
    return make(domain, metric, scale=scale, k=-round(log2(FIXED_POINT))), dp
