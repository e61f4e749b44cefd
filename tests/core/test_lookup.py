"""Rows of tables by number, in numpy as in torch, and users whom a table does not have."""

import pytest
import torch

from perfedrec.core.lookup import Changed, Unread, put, take
from perfedrec.core.types import NEWCOMER, of_users

ROWS = torch.tensor([3, 0])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 0, 3)])
def test_rows_are_copies(shape: tuple[int, ...]) -> None:
    table = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, found = table.clone(), take(table, ROWS)
    assert torch.equal(found, table[ROWS])
    found += 1
    assert torch.equal(table, before)


def test_rows_with_gradients_stay_in_the_graph() -> None:
    table = torch.ones(4, 2, requires_grad=True)
    take(table, ROWS).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [1, 0, 0, 1]


def test_rows_are_written_in_place() -> None:
    table, marks = torch.zeros(4, 2), torch.zeros(4, dtype=torch.bool)
    put(table, ROWS, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    put(marks, ROWS, True)
    assert table.tolist() == [[3, 4], [0, 0], [0, 0], [1, 2]]
    assert marks.tolist() == [True, False, False, True]


@pytest.mark.parametrize("values", [torch.ones(1, 2), torch.ones(2, 1), torch.ones(2, 2, dtype=torch.float64)], ids=str)
def test_values_that_do_not_fit_are_not_written(values: torch.Tensor) -> None:
    table = torch.zeros(4, 2)
    with pytest.raises((RuntimeError, IndexError)):
        put(table, ROWS, values)
    assert not table.any()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)  # a kernel writes the first, torch the other
def test_rows_that_did_not_change_are_not_written(kind: torch.dtype) -> None:
    table = torch.zeros(5, 2, dtype=kind)
    values = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=kind)
    Changed(values, torch.tensor([2, -1, 0])).write(Unread(table, torch.tensor([4, 3, 1])))
    assert table.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [5, 6]]


@pytest.mark.parametrize("values", [torch.ones(1, 2), torch.ones(2, 1)], ids=str)
def test_changes_that_do_not_fit_are_not_written(values: torch.Tensor) -> None:
    table = torch.zeros(4, 2)
    with pytest.raises((RuntimeError, IndexError)):
        Changed(values, torch.tensor([0, 1])).write(Unread(table, ROWS))
    assert not table.any()


def test_new_users_have_no_row() -> None:
    table, users = torch.tensor([[1.0], [2.0]]), torch.tensor([1, NEWCOMER, 0])
    assert of_users(table, users, -7).squeeze(1).tolist() == [2, -7, 1]
    assert of_users(table, users[:1], -7).squeeze(1).tolist() == [2]
    assert table.tolist() == [[1], [2]]
