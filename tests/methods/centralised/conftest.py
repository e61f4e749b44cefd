from collections.abc import Sequence

import pytest
import torch

from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.method import Training

TOY: Sequence[Sequence[int]] = ((0, 1), (1, 2), (0, 2, 3), (3,))
N_ITEMS = 5  # nobody has the last one


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def toy() -> Training:
    """Four users with the items of ``TOY``, out of five."""
    offsets = torch.tensor([0, *(len(own) for own in TOY)]).cumsum(0)
    rows, _ = block_rows(offsets, torch.tensor([item for own in TOY for item in own]), torch.arange(len(TOY)))
    return Training(rows, N_ITEMS)


@pytest.fixture
def toy_vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [4, 3] and [5, 3] of the toy's users and items."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TOY), 3, generator=generator), torch.randn(N_ITEMS, 3, generator=generator)
