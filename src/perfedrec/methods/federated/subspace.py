"""Clients whose changes are summed in a public basis of few columns, so that no number of a sum belongs to one item.

A sum by item shows item lists: most of its rows have one contributor, and all rows of one client lie in few directions.
Here the clients' sum ``D`` [m, d] stays with them, and what leaves is ``V^T D`` [r, d] for a public basis ``V`` [m, r]
that is nearly orthonormal. Its numbers add up parts of many clients. The server continues with ``V V^T D``, the
part of the change that items share with similar items.

``V`` is a block Krylov basis (Musco and Musco, NeurIPS 2015): the sums of passes of subspace iteration over all users,
those of spectral pre-training or passes of their own, the last one first, orthonormalised, at most ``privacy.rank``
columns, and at most one for :data:`ITEMS_PER_COLUMN` items. A pass is summed by item, but only for items that at least
``privacy.min_contributors`` users have. The rows of other items never leave a client, and are 0 in ``V``.

Products are exact: ``V`` has multiples of 1 / BASIS_GRID and ``D`` has multiples of 1 / DELTA_GRID, so that compressed
sums of blocks, nodes and clients add up to the compressed sum, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from perfedrec.core.aggregate import BASIS_GRID, Aggregate, from_fixed
from perfedrec.core.algorithm import TRAIN, Phase
from perfedrec.core.compiled import usable
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.keys import Key, normal
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows, Spec, Update
from perfedrec.methods.federated.phases import CLUSTERS, DEGREES, JOIN, SPECTRAL
from perfedrec.methods.federated.spectral import gram_rows, nystroem, orthonormal
from perfedrec.methods.federated.state import Broadcast, ServerState
from perfedrec.methods.federated.tables import Average
from perfedrec.privacy.settings import PrivacySettings

PASSES = 4
"""Passes for a method without spectral pre-training. Each adds a quarter of the basis."""

ITEMS_PER_COLUMN = 8
"""A basis has at most one column for this number of items. With as many columns as items the projection would change
nothing, and sums would show rows again."""

LEAST_NOISE = 0.1
"""Noise in passes, as a multiple of a client's part, with which rows of few contributors may be summed as well."""

LEVERAGE, RARE = 0.25, 4
"""An item of fewer than RARE times ``min_contributors`` users has no row in the basis if the row's squared length were
above LEVERAGE: then the basis could tell it from others, as for items that only each other's users have."""

IN_BASIS = (JOIN.name, CLUSTERS.name, TRAIN.name)
"""The phases whose sums are taken in the basis."""

S = TypeVar("S", bound=ServerState)


class Subspace:
    """The part of a method that finds the basis and takes sums in it, under the options ``privacy``."""

    passes: tuple[Phase, ...] = (SPECTRAL,) * PASSES

    def __init__(self, privacy: PrivacySettings) -> None:
        self.privacy = privacy

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a method that has no others."""
        return (DEGREES, *self.passes)

    @property
    def noisy(self) -> bool:
        """Whether passes have noise on every row, which protects rows with few contributors as well."""
        return self.privacy.noise.spectral >= LEAST_NOISE

    def is_open(self, degrees: Tensor) -> Tensor:
        """[m] whether an item's row of a pass may leave the clients, by the released ``degrees`` [m]."""
        return degrees >= self.privacy.min_contributors

    # --- the clients ---

    def client(self, phase: str, broadcast: Broadcast, rows: Rows) -> Update:
        """The work of the phases "degrees" and "spectral"."""
        ones = torch.ones(rows.n_users, device=rows.users.device)
        if phase == DEGREES.name:
            deltas = torch.ones(rows.items.numel(), 1, device=rows.items.device)
        else:
            assert broadcast.probe is not None
            assert broadcast.degrees is not None
            deltas = gram_rows(broadcast.probe, rows, broadcast.degrees)
        return Update(rows.users, torch.zeros_like(rows.users), ones, rows.segments, rows.items, deltas)

    def compress(self, broadcast: Broadcast, phase: str, aggregate: Aggregate) -> Aggregate:
        """What leaves the clients of their sum: rows that enough users contribute to, or the part in the basis."""
        if phase == SPECTRAL.name and not self.noisy and broadcast.degrees is not None:
            return selected(aggregate, self.is_open(broadcast.degrees))
        if phase not in IN_BASIS or not aggregate.sums.shape[1]:  # the sum of no update has no columns
            return aggregate
        if broadcast.basis is None:
            raise PerfedrecError(
                f"a sum of phase {phase} needs a basis, and none was sent; expected one from the passes before it, or "
                "more clients in them"
            )
        most = min(self.privacy.rank, 2 * _most_columns(broadcast.basis))  # some items have lost their row since
        if broadcast.basis.shape[1] > most:
            raise PerfedrecError(
                f"the basis of a sum of phase {phase} has {broadcast.basis.shape[1]} columns; expected at most {most}"
            )
        return projected(aggregate, broadcast.basis)

    # --- the server ---

    def start(self, spec: Spec, key: Key) -> dict[str, Tensor]:
        """Degrees, which are unknown, and the first columns to multiply by, as fields of a server state. Raises
        :class:`ConfigError` for so few users that no sum could be opened."""
        self.privacy.check_users(spec.n_users)
        every = torch.arange(spec.n_items, device=spec.item_degrees.device)
        width = min(-(-self.privacy.rank // PASSES), spec.n_items)
        probe = orthonormal(normal(key.fold("probe").spread(every), width))
        return {"degrees": torch.ones(spec.n_items, device=probe.device), "probe": probe}

    def sent(self, state: ServerState, phase: str) -> dict[str, Tensor | None]:
        """What clients receive in a ``phase`` for its sums, as fields of a broadcast."""
        return {
            "probe": state.probe if phase == SPECTRAL.name else None,
            "basis": state.basis if phase in IN_BASIS else None,
        }

    def n_rows(self, state: ServerState, phase: str) -> int:
        """The rows of each table of a compressed sum."""
        if phase == SPECTRAL.name and not self.noisy and state.degrees is not None:
            return int(self.is_open(state.degrees).sum())
        return int(state.items.shape[0] if phase not in IN_BASIS or state.basis is None else state.basis.shape[1])

    def lift(self, state: ServerState, phase: str, aggregate: Aggregate) -> Aggregate:
        """The sum with a row for every item; see :meth:`compress`."""
        if not aggregate.clients:
            return aggregate
        if phase == SPECTRAL.name and not self.noisy and state.degrees is not None:
            return spread(aggregate, self.is_open(state.degrees))
        if phase in IN_BASIS and state.basis is not None:
            return lifted(aggregate, state.basis)
        return aggregate

    def absorb(self, state: S, aggregate: Aggregate) -> S:
        """The state after a pass whose sum by item is the ``aggregate``.

        With a probe of its own it also has the factor ``F`` of Nystroem's approximation ``N^T N ~ F F^T``, by which the
        server propagates item vectors over all users without asking them.
        """
        probe, own = state.probe, from_fixed(aggregate.sums)
        image = own.new_zeros(aggregate.n_items, own.shape[1]).index_copy_(0, aggregate.keys, own)
        if not bool(image.any()):
            raise ConfigError(
                f"no item has {self.privacy.min_contributors} users, so that no row of a pass is summed; expected "
                "denser data, or a smaller privacy.min_contributors"
            )
        basis = krylov(image, state.basis, min(self.privacy.rank, _most_columns(image)))
        if not self.noisy and state.degrees is not None:
            apart = (basis.to(torch.float32) / BASIS_GRID).square().sum(1) > LEVERAGE
            basis[apart & (state.degrees < RARE * self.privacy.min_contributors)] = 0
        state = replace(state, basis=basis)
        if probe is None:
            return state
        items = state.items * basis.any(1)[:, None]  # what cannot be learnt is not recommended by chance
        average = None if state.average is None else Average.start(items)
        factor = nystroem(probe, image)
        return replace(state, items=items, average=average, probe=orthonormal(image), factor=factor)


def _most_columns(rows: Tensor) -> int:
    """The most columns of a basis for items whose ``rows`` [m, d] are not 0."""
    return max(int(_filled(rows).sum()) // ITEMS_PER_COLUMN, 1)


def _filled(rows: Tensor) -> Tensor:
    """[m] which of the ``rows`` [m, d] are not 0."""
    if rows.dtype != torch.int16 or not usable(rows):
        return rows.any(1)
    from perfedrec.methods.federated import kernels

    found = torch.empty(rows.shape[0], dtype=torch.bool)
    kernels.filled(rows.numpy(), found.numpy())
    return found


def with_degrees(state: ServerState, aggregate: Aggregate, noisy: bool) -> Tensor:
    """[m] item degrees from their sums over clients.

    Without noise the sums are counts. With noise a client adds ``1 / sqrt(|I_u|)`` for each of its items; the sums are
    then scaled to counts by the mean of ``sqrt(|I_u|)``, which follows from the sums, and items below the mean degree
    get the mean degree, because their sums are mostly noise.
    """
    sums = torch.zeros_like(state.items[:, 0])
    sums.index_copy_(0, aggregate.keys, from_fixed(aggregate.sums).squeeze(1))
    if noisy:
        sums = sums * (sums.sum() / state.n_users).clamp(min=1.0)
        sums = sums.clamp(min=max(float(sums.mean()), 1.0))
    return sums


def krylov(image: Tensor, basis: Tensor | None, rank: int) -> Tensor:
    """[m, r] int16: the basis of the columns of ``image`` [m, d], the newest, and then those of ``basis`` [m, r'].

    It has at most ``rank`` columns, in multiples of 1 / BASIS_GRID, and no singular value above 1, so that no norm
    grows in it. Rows that are 0 in both stay 0.
    """
    columns, known = orthonormal(image), image.any(1)
    if basis is not None:
        columns, known = torch.cat([columns, basis.to(torch.float32) / BASIS_GRID], dim=1), known | basis.any(1)
    whole = (orthonormal(columns)[:, :rank].to(torch.float64) * known[:, None]).contiguous()
    grid, longest = whole, 1.0
    with one_thread():
        while longest >= 1:  # rounding may lengthen a direction by a little
            whole = whole * ((1 - 2.0**-15) / longest)
            grid = (whole * BASIS_GRID).trunc_()
            longest = float(torch.linalg.eigvalsh(grid.T @ grid)[-1]) ** 0.5 / BASIS_GRID
    return grid.to(torch.int16)


def projected(aggregate: Aggregate, basis: Tensor) -> Aggregate:
    """``V^T D`` for each table ``D`` of a sum by item, with ``V`` the ``basis`` [m, r]."""
    n_items, (_, rank) = aggregate.n_items, basis.shape
    tables = aggregate.weights.numel()
    sums = aggregate.sums.new_zeros(tables, rank, aggregate.sums.shape[1])
    limits = torch.searchsorted(aggregate.keys, torch.arange(tables + 1, device=basis.device) * n_items).tolist()
    with one_thread():  # numpy's library would take all
        for table, (start, stop) in enumerate(pairwise(limits)):
            rows = basis.index_select(0, aggregate.keys[start:stop] - table * n_items).to(torch.float64)
            own = aggregate.sums[start:stop]
            # Whole numbers, so that each way to multiply is exact; numpy's library is faster than torch's in float64.
            product = torch.from_numpy(rows.numpy().T @ own.numpy()) if usable(rows, own) else rows.T @ own
            sums[table] = product / BASIS_GRID
    keys = torch.arange(tables * rank, device=basis.device)
    return replace(aggregate, n_items=rank, keys=keys, sums=sums.flatten(0, 1))


def lifted(aggregate: Aggregate, basis: Tensor) -> Aggregate:
    """``V T`` for each table ``T`` of a sum in a ``basis`` [m, r]: a row for every item that has a row in the basis."""
    n_items, rank = basis.shape
    tables = aggregate.weights.numel()
    sums = aggregate.sums.new_zeros(tables * rank, aggregate.sums.shape[1])
    sums.index_copy_(0, aggregate.keys, aggregate.sums)
    known = _filled(basis).nonzero().squeeze(1)
    offsets = torch.arange(tables, device=basis.device)[:, None] * n_items
    with one_thread():  # in float32: what follows is the server's own, and need not be exact
        wide = basis[known].to(torch.float32) @ (sums / BASIS_GRID).to(torch.float32).view(tables, rank, -1)
    wide = wide.flatten(0, 1).to(torch.float64)
    return replace(aggregate, n_items=n_items, keys=(offsets + known).flatten(), sums=wide)


def selected(aggregate: Aggregate, kept: Tensor) -> Aggregate:
    """The rows of the ``kept`` [m] items of a sum, numbered anew."""
    tables, items = aggregate.keys // aggregate.n_items, aggregate.keys % aggregate.n_items
    mine, places, n = kept[items], kept.cumsum(0) - 1, int(kept.sum())
    return replace(aggregate, n_items=n, keys=tables[mine] * n + places[items[mine]], sums=aggregate.sums[mine])


def spread(aggregate: Aggregate, kept: Tensor) -> Aggregate:
    """A sum over the ``kept`` [m] items with these items' own numbers again."""
    return replace(aggregate, n_items=kept.numel(), keys=kept.nonzero().squeeze(1)[aggregate.keys])
