"""Rows of tables, read and written by number."""

from __future__ import annotations

import torch
from torch import Tensor


def take(table: Tensor, rows: Tensor) -> Tensor:
    """[k, ...] the ``rows`` [k] of a ``table`` [n, ...], as a copy. On a processor numpy copies them: it takes half of
    torch's time."""
    if not table.is_cpu or table.requires_grad:
        return table.index_select(0, rows)
    return torch.from_numpy(table.numpy().take(rows.numpy(), axis=0))


def put(table: Tensor, rows: Tensor, values: Tensor | bool) -> None:
    """Write ``values`` [k, ...], or one value, to the ``rows`` [k] of a ``table`` [n, ...], in place. No row may occur
    twice. For values of another shape or type torch raises its errors; numpy would fit them in."""
    if not isinstance(values, Tensor):
        if table.is_cpu:
            table.numpy()[rows.numpy()] = values
        else:
            table[rows] = values
    elif table.is_cpu and values.dtype == table.dtype and values.shape == (rows.numel(), *table.shape[1:]):
        table.numpy()[rows.numpy()] = values.detach().numpy()
    else:
        table.index_copy_(0, rows, values.detach())
