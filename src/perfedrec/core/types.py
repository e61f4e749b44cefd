"""The nouns of federated computation and the protocol that an algorithm fulfils.

Client functions are batch-first: they take the flat rows of any number of users (:class:`Rows`), so that a simulator
passes a cohort, a node the users it hosts, and a phone one, through the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key

FIXED_POINT = 2.0**36
"""Sums are taken of whole multiples of 1 / FIXED_POINT, as whole numbers in float64: exact up to ``2^53``, hence
independent of order, blocks, nodes and threads. (Sums of int64 take four times as long.)"""

LARGEST = 2.0**16
"""Bound of the norm of what enters a sum, so that a sum stays in the range where whole numbers are exact."""


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
    """What B users hand over, with privacy already applied to each of them.

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


@dataclass(frozen=True)
class Aggregate:
    """The sum of contributions, closed under ``+``.

    ``keys`` [U] ascending ``group * n_items + item``; ``sums`` [U, d], ``weights`` [G] and ``dense`` [D] in fixed
    point, float64 that holds whole numbers; ``clients`` how many took part. Reports and edges are collected with the
    users they belong to.
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
        """Bytes in which a node sends the sum of its users: 4 for a key, a user or each part of an edge, and for a
        number 4 where that loses nothing in any of them, as for one user's, and 8 otherwise. ``masked`` it is 8 for
        each number of each row there is, touched or not."""
        if masked:
            dense = 0 if self.dense is None else self.dense.numel()
            return 8 * (self.weights.numel() * self.n_items * self.sums.shape[1] + dense)
        summed = [self.sums, self.weights, *([] if self.dense is None else [self.dense])]
        exact = all(torch.equal(each.to(torch.float32).to(torch.float64), each) for each in summed)
        others = (self.keys, self.report_users, self.reports, self.edges)
        size = sum(4 * each.numel() for each in others if each is not None)
        return size + (4 if exact else 8) * sum(each.numel() for each in summed)

    def __add__(self, other: Aggregate) -> Aggregate:
        keys, inverse = torch.cat([self.keys, other.keys]).unique(return_inverse=True)
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
    def empty(n_items: int, n_groups: int, dim: int = 0, device: Any = None) -> Aggregate:
        """The neutral element."""
        fixed = {"dtype": torch.float64, "device": device}
        return Aggregate(
            n_items=n_items,
            clients=0,
            keys=torch.zeros(0, dtype=torch.int64, device=device),
            sums=torch.zeros(0, dim, **fixed),
            weights=torch.zeros(n_groups, **fixed),
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


def reduce(update: Update, n_items: int, n_groups: int) -> Aggregate:
    """Weighted sums of a block's contributions, by (group, item), in fixed point.

    Raises :class:`DivergedError` when a contribution holds a number that is not finite, or too large: one broken
    client must reach neither the sum nor the clustering.
    """
    if update.reports is not None and not bool(update.reports.sum().isfinite()):
        raise DivergedError("a contribution holds a report that is not finite; expected finite user vectors")
    users, groups, weights = update.users, update.groups, update.weights
    device = users.device
    total = torch.zeros(n_groups, dtype=torch.float64, device=device).index_add_(0, groups, _fixed(weights))
    keys, sums = torch.zeros(0, dtype=torch.int64, device=device), total.new_zeros(0, 0)
    if update.deltas is not None and update.segments is not None and update.items is not None:
        tables = groups[update.segments] if update.tables is None else update.tables
        keys, inverse = distinct(tables * n_items + update.items, n_groups * n_items)
        fixed = _fixed(update.deltas, weights[update.segments])
        sums = fixed.new_zeros(keys.numel(), fixed.shape[1]).index_add_(0, inverse, fixed)
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


def distinct(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distinct ``keys`` [T], ascending, all below ``size``, and the place [T] of each key among them."""
    if size > 64 * keys.numel():
        values, inverse = torch.unique(keys, return_inverse=True)
        return values, inverse
    present = torch.zeros(size, dtype=torch.int64, device=keys.device).index_fill_(0, keys, 1)  # faster than sorting
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1)[keys]


def from_fixed(sums: Tensor) -> Tensor:
    """float32 values of fixed-point sums."""
    return (sums / FIXED_POINT).to(torch.float32)


def _fixed(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fixed point of ``values`` [T, d] times ``weights`` [T], rounded to nearest."""
    fixed = values.to(torch.float64)
    fixed = fixed.mul_(FIXED_POINT if weights is None else (weights * FIXED_POINT)[:, None]).round_()
    flat = fixed.reshape(-1)
    if not bool(flat.dot(flat) < (LARGEST * FIXED_POINT) ** 2):  # nor for a number that is not one
        raise DivergedError(
            "a contribution holds numbers that are not finite or larger than a sum can hold; expected finite changes "
            "(is a learning rate too large?)"
        )
    return fixed


def _cat(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _either(a: Tensor | None, b: Tensor | None, join: Any) -> Any:
    if a is None or b is None:
        return a if b is None else b
    return join(a, b)


S = TypeVar("S")
V = TypeVar("V")
M = TypeVar("M")


class Algorithm(Protocol[S, V, M]):
    """A federated algorithm: pure functions over explicit state S, view V (what a client receives) and memory M.

    ``M`` is a record whose fields have one row per user, except those whose ``field(metadata={"per": "row"})`` says one
    per interaction. ``server`` may reuse the storage of the state it was given.
    """

    @property
    def phases(self) -> list[str]:
        """The phases played before training, one round each."""

    @property
    def dense_uploads(self) -> bool:
        """Whether a client sends a row for every item of every group, so that nobody sees which ones it touched."""

    @property
    def secure_sums(self) -> bool:
        """Whether nobody but the client may see what it sends: sums are taken by secure aggregation."""

    @property
    def reporting(self) -> bool:
        """Whether clients hand over protected vectors of their own."""

    @property
    def needs_degrees(self) -> bool:
        """Whether it starts from the item degrees of ``spec``: no phase of its own releases them."""

    def init(self, spec: Spec, key: Key) -> S:
        """The server's state before the first round."""

    def init_clients(self, rows: Rows, key: Key) -> M:
        """What the users of a block hold before their first round."""

    def plan(self, state: S, key: Key) -> Plan:
        """Phase and cohort of the next round."""

    def n_groups(self, state: S) -> int:
        """Groups (clusters) that contributions are summed by."""

    def groups(self, state: S, users: Tensor) -> Tensor:
        """[B] the group of each of ``users``."""

    def broadcast(self, state: S, users: Tensor) -> V:
        """What users [B] receive in this round; large tables are shared, not copied.

        Fields of V with ``field(metadata={"per": "user"})`` have one row per user. :data:`NEWCOMER` in place of a user
        stands for anybody whom the state does not know.
        """

    def client(self, phase: str, broadcast: V, rows: Rows, client_state: M, key: Key) -> tuple[Update, M]:
        """The users' work: what they hand over and what they keep."""

    def release(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        """The sum of some of a cohort's clients as it leaves them, with the noise that they add; ``asked`` clients are
        in the cohort."""

    def aborted(self, phase: str, clients: int, asked: int) -> bool:
        """Whether so few ``clients`` of those ``asked`` answered that their sum must not be opened."""

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        """The next state."""

    def serving(self, state: S) -> S:
        """What is kept of a state to recommend with; a view of it serves :meth:`scores`."""

    @property
    def finetune_rounds(self) -> int:
        """Rounds of local training after which a client that was not in training is best served."""

    def init_new_user(self, broadcast: V, rows: Rows, client_state: M) -> M:
        """The memories of newcomers, whom training did not know, when they receive the ``broadcast`` that it has led to."""

    def without_privacy(self) -> Algorithm[S, V, M]:
        """The same without decoys, masking and noise: for a client's work of which nothing is handed over."""

    def scores(self, broadcast: V, rows: Rows, client_state: M) -> Tensor:
        """[B, m] scores of all items for the users of a block."""

    def explain(self, broadcast: V, rows: Rows, client_state: M) -> dict[str, Tensor]:
        """Named parts [B, m] that sum to :meth:`scores`."""


class Served(Algorithm[S, V, M], Protocol):
    """An algorithm whose ``server`` is two roles: a neighbourhood service and a coordinator, which may live apart."""

    def open_service(self, n_users: int, device: Any = None) -> Any:
        """What the service holds before the first round: ``reports`` [n, L, d] and ``start`` [n, d] or ``None``."""

    def serve(
        self, service: Any, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Any, Published]:
        """The service's part of a round, the ``played``-th: it needs reports and edges alone."""

    def coordinate(self, state: S, phase: str, aggregate: Aggregate, published: Published, key: Key) -> S:
        """The coordinator's part of a round: it needs neither reports nor edges."""


def block_rows(offsets: Tensor, items: Tensor, users: Tensor, attributes: Tensor | None = None) -> tuple[Rows, Tensor]:
    """The rows of ``users`` [B] cut out of CSR arrays, and the positions [R] in ``items`` they were cut from."""
    starts, counts = offsets[users], offsets[users + 1] - offsets[users]
    limits = torch.zeros(users.numel() + 1, dtype=torch.int64, device=users.device)
    torch.cumsum(counts, 0, out=limits[1:])
    segments = torch.repeat_interleave(torch.arange(users.numel(), device=users.device), counts)
    positions = torch.arange(segments.numel(), device=users.device) + (starts - limits[:-1])[segments]
    own = None if attributes is None else attributes[users]
    return Rows(users, limits, items[positions], segments, own), positions
