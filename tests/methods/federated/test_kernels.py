"""Compiled kernels of federated training against torch."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perfedrec.core import compiled
from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.methods.federated.settings import ServerSettings
from perfedrec.methods.federated.tables import Average, Moments, step, step_apart

pytest.importorskip("numba")
Result = TypeVar("Result")
N_ITEMS, N_TABLES = 7, 3


def by_torch(function: Callable[[], Result]) -> Result:
    """What ``function`` returns without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        return function()


def server_steps(rule: str, n_tables: int, averaged: bool, width: int, seed: int) -> list[Tensor]:
    """Everything that three rounds leave behind on the server."""
    generator = torch.Generator().manual_seed(seed)
    options = ServerSettings(optimizer=rule, learning_rate=0.5, averaging=0.9 if averaged else 0.0)
    items = torch.randn(N_ITEMS, width, generator=generator)
    offsets = torch.randn(n_tables * N_ITEMS, width, generator=generator)
    average = Average.start(items) if averaged else None
    moments = [None if rule == "fedavg" else Moments.zeros(each) for each in (items, offsets)]
    for played in range(3):
        keys = (torch.rand(n_tables * N_ITEMS, generator=generator) < 0.5).nonzero().squeeze(1)
        sums = (torch.randn(keys.numel(), width, generator=generator).double() * FIXED_POINT).round()
        weights = torch.rand(n_tables, generator=generator) + 1
        aggregate = Aggregate(N_ITEMS, 3, keys, sums, weights)
        step_apart(options, offsets, moments[1], aggregate, weights, 0.1)
        step(options, items, moments[0], average, aggregate, weights.sum(), played)
    left = [items, offsets, *([] if average is None else [average.values, average.rounds])]
    return left + [each for one in moments if one is not None for each in (one.first, one.second)]


@settings(max_examples=60)
@given(
    rule=st.sampled_from(["fedavg", "fedadam", "fedyogi", "fedadagrad"]),
    n_tables=st.sampled_from([1, N_TABLES]),
    averaged=st.booleans(),
    width=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 999),
)
def test_the_server_step(rule: str, n_tables: int, averaged: bool, width: int, seed: int) -> None:
    mine = server_steps(rule, n_tables, averaged, width, seed)
    theirs = by_torch(lambda: server_steps(rule, n_tables, averaged, width, seed))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-6)
