"""Data sets with fewer items than dimensions."""

import torch

from perfedrec.methods.federated.spectral import orthonormal


def test_a_basis_keeps_its_width_with_fewer_items_than_dimensions() -> None:
    basis = orthonormal(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)))
    assert basis.shape == (4, 7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4))
    assert not basis[:, 4:].any()
