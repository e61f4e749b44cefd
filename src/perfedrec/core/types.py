"""The nouns of federated computation: what users have, what they receive, and what they hand over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NEWCOMER = -1
"""Anybody whom the server does not know, where it says what users receive."""


@dataclass(frozen=True)
class Rows:
    """The private data of a block of B users: R interactions in the jagged layout.

    ``users`` [B] identities; ``offsets`` [B + 1] limits of each user's rows; ``items`` [R] ascending within a user;
    ``segments`` [R] position of each row's user in the block; ``attributes`` [B, F] the users' own attributes.
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
    """What is public before training: sizes, item degrees [m] and item attributes [m, F]."""

    n_users: int
    n_items: int
    item_degrees: Tensor
    n_user_attributes: int = 0
    item_attributes: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """One round: its phase (a name that the algorithm defines) and its cohort, users [c] without repetition."""

    phase: str
    cohort: Tensor


@dataclass(frozen=True)
class Update:
    """What B users hand over: as a method computes it, and after :meth:`Protects.upload` with privacy applied to each.

    ``users`` [B]; ``groups`` [B] the cluster each one contributes to; ``weights`` [B];
    ``segments`` [T], ``items`` [T], ``deltas`` [T, d] changes of item rows, a pair (user, item) once in a table;
    ``tables`` [T] the group (table) each row is summed in, where it is not the user's own group;
    ``dense`` [B, D] changes of shared dense weights; ``reports`` [B, K, d] protected user vectors, one per layer;
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
        """[B] bytes each user sends: 4 for an item or token index, ``number`` for a number, 8 for group and weight.

        With ``n_rows`` each user sends a dense table of so many rows instead of those it touched. A masked number takes
        8 bytes.
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
        """What the user at one ``place`` of the block hands over."""
        one = slice(place, place + 1)
        mine = None if self.segments is None else (self.segments == place).nonzero().squeeze(1)

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None or mine is None else values[mine]

        segments, edges = rows(self.segments), self.edges
        if edges is not None:
            edges = edges[edges[:, 1] == place] * edges.new_tensor([1, 0, 1])
        return replace(
            self,
            users=self.users[one],
            groups=self.groups[one],
            weights=self.weights[one],
            segments=None if segments is None else torch.zeros_like(segments),
            items=rows(self.items),
            deltas=rows(self.deltas),
            tables=rows(self.tables),
            dense=None if self.dense is None else self.dense[one],
            reports=None if self.reports is None else self.reports[one],
            edges=edges,
        )


@dataclass(frozen=True)
class Embedding:
    """Where a model puts users and items: ``users`` [B, d] and ``items`` [m, d], whose products are its scores;
    ``groups`` [B] the users' clusters, ``None`` where there are none."""

    users: Tensor
    items: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class Published:
    """What a neighbourhood service gives out after a round, items by token, where there is something new.

    ``neighbours`` [2, m, d] sums for users and for items, and a pre-trained ``table`` [m, d], both for the clients, who
    hold the tokens' key; ``labels`` [n] and ``centroids`` [K, d] of a new clustering, for the coordinator.
    """

    neighbours: Tensor | None = None
    table: Tensor | None = None
    labels: Tensor | None = None
    centroids: Tensor | None = None

    def named(self, tokens: Tensor) -> Published:
        """With items by their places, ``tokens`` [m] being their names there."""
        neighbours = None if self.neighbours is None else self.neighbours.index_select(1, tokens)
        return replace(self, neighbours=neighbours, table=None if self.table is None else self.table[tokens])


@dataclass(frozen=True)
class RoundReport:
    """What a round did: its phase, how many clients were asked and how many answered, their mean loss (``None`` where
    there is none), bytes sent: total up, most by one client (or node), and down in total, and why its sum was given up,
    if so."""

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
    """The rows of ``users`` [B] cut out of CSR arrays, and the positions [R] in ``items`` they were cut from."""
    starts, counts = offsets[users], offsets[users + 1] - offsets[users]
    limits = torch.zeros(users.numel() + 1, dtype=torch.int64, device=users.device)
    torch.cumsum(counts, 0, out=limits[1:])
    segments = torch.repeat_interleave(torch.arange(users.numel(), device=users.device), counts)
    positions = torch.arange(segments.numel(), device=users.device) + (starts - limits[:-1])[segments]
    own = None if attributes is None else attributes[users]
    return Rows(users, limits, items[positions], segments, own), positions
