"""Rows of tables, read and written by number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perfedrec.core.compiled import LIGHT, spread, usable


@dataclass(frozen=True)
class Unread:
    """The ``rows`` [R] of a ``table`` [n, d], not read yet."""

    table: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Changed:
    """New ``values`` [P, d] for some of the R rows of an :class:`Unread`: value k belongs to row ``positions[k]``, or
    to none where that is -1. The other rows stay as they are."""

    values: Tensor
    positions: Tensor

    def write(self, to: Unread) -> None:
        """Write the values to the table."""
        table, rows, values, positions = to.table, to.rows, self.values, self.positions
        fits = values.shape == (positions.numel(), *table.shape[1:])
        if table.dtype == values.dtype == torch.float32 and fits and usable(table, rows, values, positions):
            from perfedrec.core import kernels

            given = (each.numpy() for each in (values, positions, rows, table))
            spread(partial(kernels.put_rows, *given), positions.numel(), positions.numel() // LIGHT)
            return
        own = (positions >= 0).nonzero().squeeze(1)
        put(table, rows[positions[own]], values[own])


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
