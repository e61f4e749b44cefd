"""The server's tables: their optimiser's moments, running averages, and the step on the rows that clients touched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, distinct, from_fixed
from perfedrec.core.compiled import spread, usable
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
        self.values.index_copy_(0, rows, current + decay**passed * (values - current))
        self.rounds.index_fill_(0, rows, upto)

    def as_of(self, table: Tensor, upto: int, decay: float) -> Tensor:
        """[m, d] the averages of all rows as of round ``upto``."""
        copy = Average(self.values.clone(), self.rounds.clone())
        copy.advance(table, torch.arange(table.shape[0], device=table.device), upto, decay)
        return copy.values


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
        spread(partial(kernels.gather, *given), items.numel(), items.numel())
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


def step(
    settings: ServerSettings,
    table: Tensor,
    moments: Moments | None,
    average: Average | None,
    aggregate: Aggregate,
    weight: Tensor,
    played: int,
) -> None:
    """One step of the server's optimiser on the rows of a ``table`` [m, d] that clients touched, in place, with its
    running ``average``. The change of an item is its sum over all tables of the ``aggregate``, divided by the
    ``weight``. ``played`` rounds were played before."""
    keys, n_items = aggregate.keys, aggregate.n_items
    several = bool(keys.numel()) and int(keys[-1]) >= n_items
    if _compiled(aggregate, table):
        rows, limits, members = _by_item(keys, n_items) if several else _apart(keys)
        divisors = weight.to(torch.float32).expand(rows.numel()).contiguous()
        places = _Places(rows, limits, members, divisors)
        _compiled_step(settings, table, moments, places, aggregate.sums, 1.0, average, played)
        return
    rows, change = keys, from_fixed(aggregate.sums)
    if several:
        rows, change = over_tables(keys, change, n_items)
    if average is not None:
        average.advance(table, rows, played, settings.averaging)
    sparse_step(settings, table, moments, rows, change / weight)
    if average is not None:
        average.advance(table, rows, played + 1, settings.averaging)


def step_apart(
    settings: ServerSettings,
    tables: Tensor,
    moments: Moments | None,
    aggregate: Aggregate,
    weights: Tensor,
    share: float,
) -> None:
    """One step on the rows of several ``tables`` [K m, d], each with its own part of the ``aggregate``, in place. The
    sums are divided by the ``weights`` [K] of the clients that contributed to their table."""
    keys = aggregate.keys
    if not _compiled(aggregate, tables):
        sparse_step(settings, tables, moments, keys, means(aggregate, weights), share)
        return
    divisors = weights.to(torch.float32)[torch.div(keys, aggregate.n_items, rounding_mode="floor")]
    _compiled_step(settings, tables, moments, _Places(*_apart(keys), divisors), aggregate.sums, share)


def _apart(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, limits and members of :class:`_Places` where each of the ``keys`` [U] is a row with one sum."""
    every = torch.arange(keys.numel() + 1)
    return keys, every, every[:-1]


def _by_item(keys: Tensor, n_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, limits and members of :class:`_Places` where the sums of an item over all tables belong together."""
    from perfedrec.methods.federated import kernels

    items, limits, members = torch.empty_like(keys), keys.new_empty(keys.numel() + 1), torch.empty_like(keys)
    arrays = (each.numpy() for each in (keys, keys.new_zeros(n_items), items, limits, members))
    count = kernels.by_item(*arrays)
    return items[:count], limits[: count + 1], members


def _compiled(aggregate: Aggregate, table: Tensor) -> bool:
    return usable(aggregate.keys, aggregate.sums, table) and aggregate.sums.shape[1] == table.shape[1]


@dataclass(frozen=True)
class _Places:
    """The ``rows`` [r] of a table to change. The sums with the numbers ``members[limits[k]:limits[k + 1]]`` belong to
    row k, and are divided by ``divisors`` [r]."""

    rows: Tensor
    limits: Tensor
    members: Tensor
    divisors: Tensor


def _compiled_step(
    settings: ServerSettings,
    table: Tensor,
    moments: Moments | None,
    places: _Places,
    sums: Tensor,
    share: float = 1.0,
    average: Average | None = None,
    played: int = 0,
) -> None:
    """See :func:`perfedrec.methods.federated.kernels.step_rows`."""
    from perfedrec.methods.federated import kernels

    none, rows = table[:0], places.rows
    first, second = (none, none) if moments is None else (moments.first, moments.second)
    averages, since = (none, rows[:0]) if average is None else (average.values, average.rounds)
    rates = (settings.learning_rate * share, settings.beta1, settings.beta2, settings.epsilon)
    work = partial(
        kernels.step_rows,
        kernels.RULES[settings.optimizer],
        tuple(each.numpy() for each in (table, first, second, averages)),
        tuple(each.numpy() for each in (rows, places.limits, places.members, since)),
        sums.numpy(),
        places.divisors.numpy(),
        (rates, settings.averaging, played),
    )
    spread(work, rows.numel(), rows.numel())


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
