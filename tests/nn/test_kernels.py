"""Compiled kernels of tensor functions against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfedrec.core import compiled
from perfedrec.core.types import block_rows
from perfedrec.nn.propagation import edge_weights, weighted_sums

pytest.importorskip("numba")


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    width=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 99),
)
def test_edges_and_weighted_sums(counts: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets, n = torch.tensor([0, *counts]).cumsum(0), sum(counts)
    rows, _ = block_rows(offsets, torch.randint(9, (n,), generator=generator), torch.arange(len(counts)))
    table, weights = torch.randn(9, width, generator=generator), torch.randn(n, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        expected = weighted_sums(table, rows, weights)
    torch.testing.assert_close(weighted_sums(table, rows, weights), expected, rtol=1e-5, atol=1e-6)
    degrees = torch.randint(4, (9,), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        expected = edge_weights(rows, degrees)
    torch.testing.assert_close(edge_weights(rows, degrees), expected)
