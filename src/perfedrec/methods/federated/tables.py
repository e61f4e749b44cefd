"""The server's tables: their optimiser's moments, running averages, and the step on the rows that clients touched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, distinct, from_fixed
from perfedrec.core.compiled import LIGHT, spread, usable
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.memory import zeros
from perfedrec.methods.federated.settings import ServerSettings
from perfedrec.nn.optim import server_step


@dataclass(frozen=True)
class Moments:
    """The moments of a server optimiser, both of the shape of the table that it optimises."""

    first: Tensor
    second: Tensor

    @staticmethod
    def zeros(like: Tensor) -> Moments:
        return Moments(zeros(*like.shape, like=like), zeros(*like.shape, like=like))


@dataclass(frozen=True)
class Average:
    """The running average of a table over rounds, updated only where the table changes.

    ``values`` [m, d] are the averages as of the end of round ``rounds`` [m]. A row is constant while nobody touches it,
    so that its average follows in closed form.
    """

    values: Tensor
    rounds: Tensor

    @staticmethod
    def start(table: Tensor) -> Average:
        return Average(table.clone(), torch.zeros(table.shape[0], dtype=torch.int64, device=table.device))

    def advance(self, table: Tensor, rows: Tensor, upto: int, decay: float) -> None:
        """Update the averages of ``rows`` [r] of the ``table`` to round ``upto``, in place."""
        passed = (upto - self.rounds[rows]).to(torch.float32)[:, None]
        current, values = table.index_select(0, rows), self.values.index_select(0, rows)
        self.values.index_copy_(0, rows, _moved(values, current, decay**passed))
        self.rounds.index_fill_(0, rows, upto)

    def as_of(self, table: Tensor, upto: int, decay: float) -> Tensor:
        """[m, d] the averages of all rows as of round ``upto``."""
        return _moved(self.values.clone(), table, decay ** (upto - self.rounds).to(torch.float32)[:, None])


def _moved(averages: Tensor, table: Tensor, kept: Tensor) -> Tensor:
    """``averages`` [r, d] after a time in which the rows of the ``table`` stayed as they are and a share ``kept`` [r,
    1] of the averages was left; in place."""
    return averages.sub_(table).mul_(kept).add_(table)


@dataclass(frozen=True)
class Tables:
    """The item tables that clients receive: ``items`` [m, d], and a table of each group in ``offsets`` [K m, d], as
    differences from it; ``None`` where there are no groups."""

    items: Tensor
    offsets: Tensor | None = None

    def rows(self, items: Tensor, groups: Tensor | None) -> Tensor:
        """[T, d] the rows of ``items`` [T] in the tables of ``groups`` [T], which need not be given where there are
        none."""
        table, offsets = self.items, self.offsets
        if offsets is None or groups is None:
            return table.index_select(0, items)
        if table.dtype != torch.float32 or not usable(table, offsets, items, groups):
            return table.index_select(0, items).add_(offsets.index_select(0, groups * table.shape[0] + items))
        from perfedrec.methods.federated import kernels

        rows = table.new_empty(items.numel(), table.shape[1])
        given = (each.numpy() for each in (table, offsets, items, groups, rows))
        spread(partial(kernels.gather, *given), items.numel(), items.numel() // LIGHT)
        return rows


@dataclass(frozen=True)
class Received:
    """The rows of ``items`` [T] that the clients ``segments`` [T] have from ``tables``, where they are at ``places``
    [T]; ``groups`` [B] are the clients' groups. The rows are fetched when they are asked for: a kernel that trains on
    them takes them from the tables."""

    tables: Tables
    groups: Tensor | None
    items: Tensor
    segments: Tensor
    places: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """[T, d]"""
        return self.tables.rows(self.places, None if self.groups is None else self.groups[self.segments])


def means(aggregate: Aggregate, weights: Tensor) -> Tensor:
    """[U, d] the summed rows divided by the ``weights`` [G] of the clients that contributed to their table."""
    tables = torch.div(aggregate.keys, aggregate.n_items, rounding_mode="floor")
    return from_fixed(aggregate.sums) / weights[tables, None]


def over_tables(keys: Tensor, rows: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """The items [r], ascending, and for each item the sum [r, d] of its ``rows`` [U, d] over all tables. ``keys`` [U]
    are those of the rows."""
    items, inverse = distinct(keys % n_items, n_items)
    return items, rows.new_zeros(items.numel(), rows.shape[1]).index_add_(0, inverse, rows)


@dataclass(frozen=True)
class Apart:
    """Several ``tables`` [K m, d] that the server moves apart, each by the part of the sums that is its own: their
    ``moments``, the ``weights`` [K] of the clients that contributed to each, and the ``share`` of the server's learning
    rate."""

    tables: Tensor
    moments: Moments | None
    weights: Tensor
    share: float


def step(
    settings: ServerSettings,
    table: Tensor,
    moments: Moments | None,
    average: Average | None,
    aggregate: Aggregate,
    weight: Tensor,
    played: int,
    apart: Apart | None = None,
) -> None:
    """One step of the server's optimiser on the rows of a ``table`` [m, d] that clients touched, in place, with its
    running ``average``; and on those of the tables ``apart`` from it.

    The change of an item is its sum over all tables of the ``aggregate``, divided by the ``weight``. ``played`` rounds
    were played before.
    """
    tables = (table, None if apart is None else apart.tables)
    if usable(aggregate.keys, aggregate.sums, *tables) and aggregate.sums.shape[1] == table.shape[1]:
        _compiled_step(settings, table, moments, average, aggregate, weight, played, apart)
        return
    rows, change = aggregate.keys, from_fixed(aggregate.sums)
    if apart is not None:
        own = means(aggregate, apart.weights)
        sparse_step(settings, apart.tables, apart.moments, rows, own, apart.share)
    if rows.numel() and int(rows[-1]) >= aggregate.n_items:
        rows, change = over_tables(rows, change, aggregate.n_items)
    if average is not None:
        average.advance(table, rows, played, settings.averaging)
    sparse_step(settings, table, moments, rows, change / weight)
    if average is not None:
        average.advance(table, rows, played + 1, settings.averaging)


def step_dense(
    settings: ServerSettings, dense: Tensor | None, moments: Moments | None, sums: Tensor | None, weight: Tensor
) -> None:
    """One step on the weights ``dense`` [D] of a shared network, in place, by the first D of the ``sums`` divided by
    the ``weight``; ``None`` for a method without one."""
    if dense is None or sums is None:
        return
    every = torch.arange(dense.numel(), device=dense.device)
    sparse_step(settings, dense, moments, every, from_fixed(sums[: dense.numel()]) / weight)


def _compiled_step(
    settings: ServerSettings,
    table: Tensor,
    moments: Moments | None,
    average: Average | None,
    aggregate: Aggregate,
    weight: Tensor,
    played: int,
    apart: Apart | None,
) -> None:
    """See :func:`perfedrec.methods.federated.kernels.step_rows`."""
    from perfedrec.methods.federated import kernels

    keys, none = aggregate.keys.numpy(), table[:0]
    items, limits, members = np.empty_like(keys), np.empty(keys.size + 1, np.int64), np.empty_like(keys)
    count = kernels.by_item(keys, np.zeros(aggregate.n_items, np.int64), items, limits, members)
    if count < 0:
        raise PerfedrecError(
            "the keys of an aggregate do not ascend; expected table * n_items + item, each once and in order"
        )
    others, divisors, share = (none, none, none), weight.reshape(1), 0.0
    if apart is not None:
        others = (apart.tables, *_pair(apart.moments, none))
        divisors, share = torch.cat([divisors, apart.weights]), apart.share
    averages, since = (none, aggregate.keys[:0]) if average is None else (average.values, average.rounds)
    rate = settings.learning_rate
    work = partial(
        kernels.step_rows,
        kernels.RULES[settings.optimizer],
        tuple(each.numpy() for each in (table, *_pair(moments, none), averages, *others)),
        (items, limits, members, keys, since.numpy()),
        aggregate.sums.numpy(),
        divisors.to(torch.float32).numpy(),
        ((rate, rate * share, settings.beta1, settings.beta2, settings.epsilon), settings.averaging, played),
    )
    spread(work, count, count)


def _pair(moments: Moments | None, none: Tensor) -> tuple[Tensor, Tensor]:
    return (none, none) if moments is None else (moments.first, moments.second)


def sparse_step(
    settings: ServerSettings, table: Tensor, moments: Moments | None, rows: Tensor, change: Tensor, share: float = 1.0
) -> None:
    """One step of the server's optimiser on the touched ``rows`` [r] of a ``table``, in place.

    ``change`` [r, d] is the weighted mean of the clients' changes. ``share`` scales the server's learning rate.
    """
    first = None if moments is None else moments.first.index_select(0, rows)
    second = None if moments is None else moments.second.index_select(0, rows)
    betas = (settings.beta1, settings.beta2)
    rate = settings.learning_rate * share
    step, first, second = server_step(settings.optimizer, change, first, second, rate, betas, settings.epsilon)
    table.index_add_(0, rows, step)
    if moments is not None and first is not None and second is not None:
        moments.first.index_copy_(0, rows, first)
        moments.second.index_copy_(0, rows, second)
