"""The records of federated computation: users' data, the public sizes, updates, and reports of rounds.

Sizes: n users, m items, d dimensions of a vector, B users in a block, R interactions of a block, K or G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perfedrec.core.compiled import usable
from perfedrec.core.lookup import take

NEWCOMER = -1
"""Stands in place of a user number for a new user, whom the server does not know."""

_LISTS_AT_ONCE = 4096
"""Lists that are rewritten together, which bounds the memory."""


@dataclass(frozen=True)
class Rows:
    """The private data of a block of B users: R interactions in the jagged layout.

    ``users`` [B] user numbers; ``offsets`` [B + 1] where each user's rows begin and end; ``items`` [R] ascending within
    a user; ``segments`` [R] the position in the block of each row's user; ``attributes`` [B, F] the users' attributes.
    """

    users: Tensor
    offsets: Tensor
    items: Tensor
    segments: Tensor
    attributes: Tensor | None = None

    @property
    def n_users(self) -> int:
        return self.users.numel()

    @property
    def counts(self) -> Tensor:
        """[B] interactions of each user."""
        return self.offsets[1:] - self.offsets[:-1]


@dataclass(frozen=True)
class Spec:
    """What is public before training: numbers of users and items, item degrees [m] and item attributes [m, F]."""

    n_users: int
    n_items: int
    item_degrees: Tensor
    n_user_attributes: int = 0
    item_attributes: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """One round: the name of its phase and its cohort, users [c] without repetition."""

    phase: str
    cohort: Tensor


@dataclass(frozen=True)
class Update:
    """What B users send: as a method computes it and, after :meth:`Protects.upload`, with privacy applied to each user.

    ``users`` [B]; ``groups`` [B] the group (cluster or table) that each user contributes to; ``weights`` [B];
    ``segments`` [T], ``items`` [T] and ``deltas`` [T, d] changes of item rows, where a pair (user, item) occurs at most
    once per table; ``tables`` [T] the table in which each row is summed, where it is not that of the user's group;
    ``dense`` [B, D] changes of shared network weights; ``reports`` [B, L, d] protected user vectors, one per layer;
    ``edges`` [E, 3] protected edges (view, segment, item token).
    """

    users: Tensor
    groups: Tensor
    weights: Tensor
    segments: Tensor | None = None
    items: Tensor | None = None
    deltas: Tensor | None = None
    tables: Tensor | None = None
    dense: Tensor | None = None
    reports: Tensor | None = None
    edges: Tensor | None = None

    def upload_bytes(self, n_rows: int | None = None, number: int = 4) -> Tensor:
        """[B] bytes that each user sends: 4 for an item or token index, ``number`` for each number, 8 for group and
        weight.

        With ``n_rows`` each user sends a dense table of ``n_rows`` rows instead of the rows that it touched. A masked
        number takes 8 bytes (``number=8``).
        """
        sizes = torch.full((self.users.numel(),), 8, dtype=torch.int64, device=self.users.device)
        if n_rows is not None and self.deltas is not None:
            sizes += n_rows * number * self.deltas.shape[1]
        elif self.segments is not None and self.deltas is not None:
            rows = torch.bincount(self.segments, minlength=self.users.numel())
            sizes += rows * (4 + number * self.deltas.shape[1])
        for each in (self.dense, self.reports):
            if each is not None:
                sizes += number * each[0].numel() if each.shape[0] else 0
        if self.edges is not None:
            sizes += 4 * torch.bincount(self.edges[:, 1], minlength=self.users.numel())
        return sizes

    def of_user(self, place: int) -> Update:
        """The part of the user at position ``place`` of the block, as a block of one user."""
        return self.part(torch.arange(self.users.numel(), device=self.users.device) == place)

    def part(self, chosen: Tensor) -> Update:
        """The part of those users of the block who are ``chosen`` (bool [B]), as a block of its own."""
        places = chosen.cumsum(0) - 1
        mine = None if self.segments is None else chosen[self.segments].nonzero().squeeze(1)

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None or mine is None else values[mine]

        segments, edges = rows(self.segments), self.edges
        if edges is not None:
            edges = edges[chosen[edges[:, 1]]]
            edges = torch.stack([edges[:, 0], places[edges[:, 1]], edges[:, 2]], dim=1)
        return replace(
            self,
            users=self.users[chosen],
            groups=self.groups[chosen],
            weights=self.weights[chosen],
            segments=None if segments is None else places[segments],
            items=rows(self.items),
            deltas=rows(self.deltas),
            tables=rows(self.tables),
            dense=None if self.dense is None else self.dense[chosen],
            reports=None if self.reports is None else self.reports[chosen],
            edges=edges,
        )


@dataclass(frozen=True)
class Embedding:
    """Vectors whose inner products are a model's scores: ``users`` [B, d] and ``items`` [m, d]. ``groups`` [B] are the
    users' clusters, ``None`` where there are none."""

    users: Tensor
    items: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class Published:
    """What a neighbourhood service publishes after a round, items by token. A field is ``None`` where nothing is new.

    For the clients, who hold the key of the tokens: ``neighbours`` [2, m, d] the neighbour sums for users and for
    items, a pre-trained ``table`` [m, d], and ``low_rank`` [m, r] the neighbourhood model. For the coordinator:
    ``user_init_scale``, which belongs to the table, and ``labels`` [n] and ``centroids`` [K, d] of a new clustering.
    """

    neighbours: Tensor | None = None
    table: Tensor | None = None
    low_rank: Tensor | None = None
    user_init_scale: float | None = None
    labels: Tensor | None = None
    centroids: Tensor | None = None

    def named(self, tokens: Tensor) -> Published:
        """The same with items in the order of item numbers; ``tokens`` [m] holds the token of each item."""
        neighbours = None if self.neighbours is None else self.neighbours.index_select(1, tokens)
        tables = {name: table[tokens] for name in ("table", "low_rank") if (table := getattr(self, name)) is not None}
        return replace(self, neighbours=neighbours, **tables)


def of_users(table: Tensor, users: Tensor, blank: float) -> Tensor:
    """[B, ...] the rows of ``users`` [B] in a ``table`` [n, ...], ``blank`` for new users, whom it does not have."""
    new = users == NEWCOMER
    if not users.numel() or not bool(new.any()):
        return take(table, users)
    found = take(table, users.clamp(min=0))
    found[new] = blank
    return found


def items_of(lists: Tensor, tokens: Tensor) -> Tensor:
    """``lists`` [n, k] of tokens, -1 for unused places, with items in place of tokens; ``tokens`` [m] are those of the
    items."""
    items, found = tokens.argsort().to(lists.dtype), lists.clone()
    for block in found.split(_LISTS_AT_ONCE):
        block.copy_(torch.where(block < 0, block, items[block.clamp(min=0)]))
    return found


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round: its number and phase, how many clients were asked (``cohort``) and how many answered
    (``clients``), their mean loss (``None`` in a phase without a loss), bytes sent (up in total, up by the client or
    node that sent most, down in total), and why the round was aborted, if it was."""

    round: int
    phase: str
    cohort: int
    clients: int
    loss: float | None
    bytes_up: int
    bytes_up_max: int
    bytes_down: int
    aborted: str | None = None


def block_rows(offsets: Tensor, items: Tensor, users: Tensor, attributes: Tensor | None = None) -> tuple[Rows, Tensor]:
    """The rows of ``users`` [B], taken from CSR arrays ``offsets`` [n + 1] and ``items``, and the positions [R] of
    these rows in ``items``.

    ``attributes`` [n, F] are those of all users.
    """
    own = None if attributes is None else take(attributes, users)
    if offsets.dtype == items.dtype == users.dtype == torch.int64 and usable(offsets, items, users):
        from perfedrec.core import kernels

        limits, given = users.new_empty(users.numel() + 1), (offsets.numpy(), users.numpy())
        n_rows = kernels.limits_of(*given, limits.numpy())
        if n_rows >= 0:  # else torch says which user there is not
            found, segments, positions = (users.new_empty(n_rows) for _ in range(3))
            arrays = tuple(each.numpy() for each in (items, limits, found, segments, positions))
            kernels.rows_of(*given, arrays)
            return Rows(users, limits, found, segments, own), positions
    starts = take(offsets, users)
    limits, segments, positions = ranges(starts, take(offsets, users + 1) - starts)
    return Rows(users, limits, take(items, positions), segments, own), positions


def ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges of numbers, one after the other: k from ``starts[k]`` on, ``counts[k]`` of them.

    Returns ``limits`` [B + 1], where each begins and ends, ``segments`` [R], and the numbers [R].
    """
    limits = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=limits[1:])
    if usable(starts, limits):
        from perfedrec.core import kernels

        segments, numbers = limits.new_empty(int(limits[-1])), limits.new_empty(int(limits[-1]))
        kernels.ranges(*(each.numpy() for each in (starts, limits, segments, numbers)))
        return limits, segments, numbers
    segments = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return limits, segments, torch.arange(segments.numel(), device=counts.device) + (starts - limits[:-1])[segments]
