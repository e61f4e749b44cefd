"""Exact sums of updates, and the rule that makes one aggregate from the parts of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import isfinite
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.compiled import spread, usable
from perfedrec.core.errors import ConfigError, DivergedError, PerfedrecError
from perfedrec.core.types import Update

FIXED_POINT = 2.0**36
"""Values are rounded to whole multiples of 1 / FIXED_POINT and summed as whole numbers in float64. Such sums are exact
up to ``2^53`` and so do not depend on order, blocks, nodes or threads. (Sums of int64 take four times as long.)"""

BASIS_GRID = 2.0**15
"""The entries of a basis in which sums are taken are whole multiples of 1 / BASIS_GRID (as int16), and changes are
then multiples of 1 / DELTA_GRID. So their products are on the grid of the sums, and exact as well."""

DELTA_GRID = FIXED_POINT / BASIS_GRID

_SPARSE = 64
"""Where there are more possible keys than this number times the rows, sorting is faster than a mark for each key."""

LARGEST = 2.0**16
"""Largest norm of what may enter a sum, so that the sum stays where float64 holds whole numbers exactly."""


@dataclass(frozen=True)
class Aggregate:
    """A sum of updates. Two aggregates add up to a third by ``+``.

    ``keys`` [U] ascending ``group * n_items + item``; ``sums`` [U, d], ``weights`` [G] and ``dense`` [D] in fixed
    point, as float64 with whole values; ``clients`` how many clients took part. Reports [c, L, d] and edges [E, 3] are
    not summed but collected, with ``report_users`` [c] and with user numbers in the second column of ``edges``.
    """

    n_items: int
    clients: int
    keys: Tensor
    sums: Tensor
    weights: Tensor
    dense: Tensor | None = None
    report_users: Tensor | None = None
    reports: Tensor | None = None
    edges: Tensor | None = None

    def upload_bytes(self, masked: bool = False) -> int:
        """Bytes that a node sends for the sum of its users.

        A key, a user number and each part of an edge take 4 bytes. The summed numbers take 4 bytes each if float32
        holds all of them exactly, else 8. A ``masked`` sum takes 8 bytes for each number of every row, touched or not.
        """
        if masked:
            dense = 0 if self.dense is None else self.dense.numel()
            return 8 * (self.weights.numel() * self.n_items * self.sums.shape[1] + dense)
        summed = [self.sums, self.weights, *([] if self.dense is None else [self.dense])]
        exact = all(torch.equal(each.to(torch.float32).to(torch.float64), each) for each in summed)
        others = (self.keys, self.report_users, self.reports, self.edges)
        size = sum(4 * each.numel() for each in others if each is not None)
        return size + (4 if exact else 8) * sum(each.numel() for each in summed)

    def __add__(self, other: Aggregate) -> Aggregate:
        both = torch.cat([self.keys, other.keys])
        keys, inverse = distinct(both, int(both.max()) + 1 if both.numel() else 0)
        sums = self.sums.new_zeros(keys.numel(), max(self.sums.shape[1], other.sums.shape[1]))
        for part, where in ((self, inverse[: self.keys.numel()]), (other, inverse[self.keys.numel() :])):
            if part.keys.numel():
                sums.index_add_(0, where, part.sums)
        return Aggregate(
            n_items=self.n_items,
            clients=self.clients + other.clients,
            keys=keys,
            sums=sums,
            weights=self.weights + other.weights,
            dense=_either(self.dense, other.dense, torch.add),
            report_users=_either(self.report_users, other.report_users, _cat),
            reports=_either(self.reports, other.reports, _cat),
            edges=_either(self.edges, other.edges, _cat),
        )

    @staticmethod
    def empty(n_items: int, n_groups: int, dim: int = 0, device: torch.device | None = None) -> Aggregate:
        """The sum of no update: the neutral element of ``+``."""
        return Aggregate(
            n_items=n_items,
            clients=0,
            keys=torch.zeros(0, dtype=torch.int64, device=device),
            sums=torch.zeros(0, dim, dtype=torch.float64, device=device),
            weights=torch.zeros(n_groups, dtype=torch.float64, device=device),
        )


class Aggregator(Protocol):
    """How the parts of a round become one aggregate.

    A part is the sum over clients who send together: a block of a simulation, or a node. For a rule that compares
    clients (``separate``) a part is one client.
    """

    @property
    def separate(self) -> bool:
        """Whether the rule needs each client's own part. Secure aggregation does not show it."""

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """The aggregate of the ``parts``, on the scale of their sum; ``empty`` if there is no part."""


def check_aggregator(aggregator: Aggregator, secure: bool) -> None:
    """Raises :class:`ConfigError` for a rule that needs each client's own part where sums are secure."""
    if secure and aggregator.separate:
        raise ConfigError(
            f"{type(aggregator).__name__} compares updates of single clients, and secure aggregation shows only their "
            "sum; expected privacy.aggregation = sparse or dense"
        )


class Sum:
    """The exact sum of all parts, whatever their order."""

    separate: ClassVar[bool] = False

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """The sum; see :class:`Aggregator`."""
        total: Aggregate | None = None
        for part in parts:
            total = part if total is None else total + part
        return empty if total is None else total


def reduce(update: Update, n_items: int, n_groups: int, shares: Tensor | None = None) -> Aggregate:
    """Weighted sums of a block's updates by (group, item), in fixed point. Of a client's changes of item rows they have
    its share in ``shares`` [B] float64, if there are any.

    Raises :class:`DivergedError` for an update with a number that is not finite or too large, because one broken client
    must reach neither the sum nor the clustering; and :class:`PerfedrecError` for a group outside 0 to
    ``n_groups - 1``.
    """
    if update.reports is not None and not isfinite(float(update.reports.sum())):
        raise DivergedError("an update has a report that is not finite; expected finite user vectors")
    users, weights = update.users, update.weights
    total = _weights(update.groups, weights, n_groups)
    keys, sums = users[:0], total.new_zeros(0, 0)
    if update.deltas is not None and update.segments is not None and update.items is not None:
        keys, places = _keys(update, update.segments, update.items, n_items, n_groups)
        sums = _sums(update.deltas, weights, update.segments, places, keys.numel(), shares)
    edges = update.edges
    if edges is not None:
        edges = torch.stack([edges[:, 0], users[edges[:, 1]], edges[:, 2]], dim=1)
    return Aggregate(
        n_items=n_items,
        clients=users.numel(),
        keys=keys,
        sums=sums,
        weights=total,
        dense=None if update.dense is None else _fixed(update.dense, weights).sum(0),
        report_users=None if update.reports is None else users,
        reports=update.reports,
        edges=edges,
    )


def reduce_apart(update: Update, numbers: Tensor, n_parts: int, n_items: int, n_groups: int) -> Aggregate:
    """The sums of ``n_parts`` parts of a block, to which its users have the ``numbers`` [B], as one aggregate: tables
    and numbers of part after part, which :func:`taken_apart` takes apart. For updates without reports and edges."""
    tables, dense = update.tables, update.dense
    if tables is not None and update.segments is not None:
        tables = numbers[update.segments] * n_groups + tables
    if dense is not None:
        fixed = _fixed(dense, update.weights)
        dense = fixed.new_zeros(n_parts, fixed.shape[1]).index_add_(0, numbers, fixed).flatten()
    groups = numbers * n_groups + update.groups
    apart = replace(update, groups=groups, tables=tables, dense=None)
    return replace(reduce(apart, n_items, n_parts * n_groups), dense=dense)


def taken_apart(total: Aggregate, clients: list[int]) -> list[Aggregate]:
    """The sum of each part of a ``total`` of :func:`reduce_apart`, or of a sum of some; the parts have these numbers of
    ``clients``."""
    n_parts = len(clients)
    weights = total.weights.view(n_parts, -1)
    size = weights.shape[1] * total.n_items
    limits = torch.searchsorted(total.keys, torch.arange(n_parts + 1, device=total.keys.device) * size).tolist()
    dense = None if total.dense is None else total.dense.view(n_parts, -1)
    return [
        Aggregate(
            n_items=total.n_items,
            clients=clients[part],
            keys=total.keys[start:stop] - part * size,
            sums=total.sums[start:stop],
            weights=weights[part],
            dense=None if dense is None else dense[part],
        )
        for part, (start, stop) in enumerate(pairwise(limits))
    ]


def _weights(groups: Tensor, weights: Tensor, n_groups: int) -> Tensor:
    """[G] the sums of the ``weights`` [B] of each of the ``groups`` [B], in fixed point."""
    total = torch.zeros(n_groups, dtype=torch.float64, device=groups.device)
    if weights.dtype == torch.float32 and usable(groups, weights):
        from perfedrec.core import kernels

        squares, known = kernels.add_weights(groups.numpy(), weights.numpy(), total.numpy())
        if known:
            _check_size(squares)
            return total
    unknown = groups[(groups < 0) | (groups >= n_groups)]
    if unknown.numel():
        raise PerfedrecError(
            f"an update is for group {int(unknown[0])}, and there are {n_groups} groups in this phase; "
            f"expected groups from 0 to {n_groups - 1}"
        )
    return total.index_add_(0, groups, _fixed(weights))


def _keys(update: Update, segments: Tensor, items: Tensor, n_items: int, n_groups: int) -> tuple[Tensor, Tensor]:
    """The keys of an update's sums, ascending, and the place [T] among them of each of its rows, which are changes of
    ``items`` [T] by the users ``segments`` [T]."""
    groups, tables, size = update.groups, update.tables, n_groups * n_items
    if size <= _SPARSE * items.numel() and usable(groups, tables, segments, items):
        from perfedrec.core import kernels

        found, places, marks = np.empty(items.numel() + 1, np.int64), torch.empty_like(items), np.zeros(size, np.int64)
        given = (groups if tables is None else groups[:0], segments, items[:0] if tables is None else tables, items)
        count = kernels.find_keys(tuple(each.numpy() for each in given), n_items, places.numpy(), marks, found)
        return torch.from_numpy(found[:count]), places
    tables = groups[segments] if tables is None else tables
    return distinct(tables * n_items + items, size)


def distinct(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distinct values of ``keys`` [T], ascending, and the place [T] of each key among them. All keys are below
    ``size``."""
    if size > _SPARSE * keys.numel():
        values, inverse = torch.unique(keys, return_inverse=True)
        return values, inverse
    if usable(keys):
        from perfedrec.core import kernels

        marks, values, inverse = keys.new_zeros(size), keys.new_empty(keys.numel() + 1), keys.clone()
        count = kernels.distinct(inverse.numpy(), marks.numpy(), values.numpy())
        return values[:count], inverse
    present = torch.zeros(size, dtype=torch.int64, device=keys.device).index_fill_(0, keys, 1)  # faster than sorting
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1)[keys]


def from_fixed(sums: Tensor) -> Tensor:
    """Fixed-point sums as float32 values."""
    return (sums / FIXED_POINT).to(torch.float32)


def _sums(
    values: Tensor, weights: Tensor, segments: Tensor, places: Tensor, n: int, shares: Tensor | None = None
) -> Tensor:
    """[n, d] the sums of ``values`` [T, d] in fixed point, times the ``weights`` [B] of their users ``segments`` [T]
    and, rounded again, their ``shares`` [B], by the rows ``places`` [T] of the result."""
    if not values.dtype == weights.dtype == torch.float32 or not usable(values, weights, segments, places, shares):
        sums = torch.zeros(n, values.shape[1], dtype=torch.float64, device=values.device)
        fixed = _fixed(values, weights[segments])
        return sums.index_add_(0, places, fixed if shares is None else (fixed * shares[segments][:, None]).round_())
    from perfedrec.core import kernels

    sums = torch.empty(n, values.shape[1], dtype=torch.float64)
    starts, order, none = np.zeros(n + 1, np.int64), np.empty(places.numel(), np.int64), np.empty(0)
    kernels.by_place(places.numpy(), starts, order)
    rows, given = (order, starts, segments.numpy()), (weights.numpy(), none if shares is None else shares.numpy())
    work = partial(kernels.sum_fixed, values.numpy(), rows, *given, sums.numpy())
    squares = spread(work, n, values.shape[0])
    _check_size(sum(squares))
    return sums


def _fixed(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """``values`` [T, d] times ``weights`` [T] in fixed point, rounded to nearest."""
    fixed = values.to(torch.float64, copy=True)
    fixed = fixed.mul_(FIXED_POINT if weights is None else (weights * FIXED_POINT)[:, None]).round_()
    flat = fixed.reshape(-1)
    _check_size(float(flat.dot(flat)))
    return fixed


def _check_size(squares: float) -> None:
    """Raise :class:`DivergedError` where numbers in fixed point with this sum of ``squares`` do not belong in a sum."""
    if not squares < (LARGEST * FIXED_POINT) ** 2:  # also True where a number is NaN
        raise DivergedError(
            "an update has numbers that are not finite or larger than a sum can hold; expected finite changes "
            "(is a learning rate too large?)"
        )


def _cat(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _either(a: Tensor | None, b: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return join(a, b)
