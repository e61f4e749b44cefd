"""What an adversary is: who controls all malicious clients, what it knows, and what its clients send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.algorithm import TRAIN, Received
from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows, Update
from perfedrec.data.interactions import Ints

Knowledge = Literal["popularity", "public", "gradients"]
"""What an adversary may know besides what every client receives: the items by popularity, the lists of a few users, or
what the honest clients of a block send in the same round."""

LIES_BEFORE = ("spectral", "join", "clusters")
"""Phases before training in which a malicious client may count for several. What it sends in the other ones is a count
of its items, or of itself."""


@dataclass(frozen=True)
class Known:
    """What an adversary knows before the first round.

    ``n_items`` (m) and the mean length of honest lists are taken as known to everybody. ``targets`` [t] are the items
    that the adversary wants in many lists. ``popular`` [m] are the items, the most popular first. ``public`` are the
    items of a few honest users, one array each. The last two are ``None`` for an adversary that does not say that it
    knows them (:attr:`Adversary.knows`).
    """

    n_items: int
    list_length: int
    targets: Tensor
    key: Key
    popular: Tensor | None = None
    public: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Sight:
    """What the malicious clients of a block see in a round: what every client sees, and their own data.

    ``rows`` are the B malicious clients with the items that they claim, and ``work`` is what they would send if they
    followed the method with these items. ``vectors`` makes their user vectors [B, d], ``None`` for a method that scores
    in another way. ``honest`` is what the honest clients of the block send, for an adversary that knows it. ``length``
    is how many times as long as honest work a malicious client's part of training may be, and ``before`` for how many
    clients each counts before training.
    """

    phase: str
    broadcast: Received
    rows: Rows
    work: Update
    vectors: Callable[[], Tensor | None]
    length: float
    before: float = 1.0
    honest: Update | None = None

    @property
    def training(self) -> bool:
        return self.phase == TRAIN.name


class Adversary:
    """Controls all malicious clients. By default they claim lists of the targets and of random items, and otherwise
    follow the method: fake data through honest clients.

    An adversary keeps in its fields what it learns from round to round. ``n_clients`` are the malicious ones.
    """

    name: ClassVar[str]
    """The name of the attack on the command line."""

    knows: ClassVar[frozenset[Knowledge]] = frozenset()

    promotes: ClassVar[bool] = True
    """Whether the attack wants targets in lists; if not, it wants bad lists."""

    Options: ClassVar[type[Settings]] = Settings

    def __init__(self, known: Known, options: Settings | None = None) -> None:
        self.known, self.options = known, options or self.Options()

    def lists(self, n_clients: int) -> list[Ints]:
        """The items that each malicious client claims to have, ascending."""
        n = max(self.known.list_length - self.known.targets.numel(), 1)
        return [self._with_targets(self.fillers(n, self.known.key.fold("list", each))) for each in range(n_clients)]

    def held_out(self, n_clients: int) -> list[Ints]:
        """The items that each malicious client claims to hold out, ascending: with these it votes on the best round and
        on what held-out items choose. None by default."""
        return [np.empty(0, dtype=np.int64)] * n_clients

    def fillers(self, n: int, key: Key) -> Tensor:
        """[n] the items of one client beside the targets."""
        return choose(self.known.n_items, n, key)

    def _with_targets(self, fillers: Tensor) -> Ints:
        items = torch.cat([self.known.targets, fillers]) if self.promotes else fillers
        return np.unique(items.numpy()).astype(np.int64)

    def forge(self, sight: Sight) -> Update:
        """What the malicious clients of a block send, before the bound on it is kept or ignored."""
        return sight.work


class Lying(Adversary):
    """An adversary whose clients do not follow the method.

    In phases before training each counts for several clients: what follows from its list is ``sight.before`` times as
    long. In training it sends changes of item rows of its own (:meth:`changes`), as long as it may.
    """

    _reported: Tensor | None = None
    """[1, L, 1] the length of the vectors that clients would report at first."""

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        """The items [r] whose rows are changed in training, and the direction of the changes [r, d] of all malicious
        clients, or [B, r, d] of each. Its length has no meaning."""
        raise NotImplementedError

    def reported(self, sight: Sight) -> Tensor | None:
        """[d] the direction of the user vectors that are reported; ``None`` to report as the method says. Item vectors
        are drawn to the vectors of the users who have the item."""
        return None

    def forge(self, sight: Sight) -> Update:
        if not sight.training and sight.phase not in LIES_BEFORE:
            return sight.work
        forged = self._reporting(sight)
        if not sight.training:
            return forged if forged.deltas is None else replace(forged, deltas=forged.deltas * sight.before)
        if sight.work.deltas is None:
            return forged
        return stretched(with_changes(forged, *self.changes(sight)), sight.work, sight.length)

    def _reporting(self, sight: Sight) -> Update:
        """The honest work with the reports that the adversary wants, ``before`` times as long as the first ones."""
        own = sight.work.reports
        direction = None if own is None else self.reported(sight)
        if own is None or direction is None or direction.shape != own.shape[2:]:
            return sight.work
        if self._reported is None:  # of the first reports: those of later rounds follow the lies
            self._reported = own.norm(dim=2, keepdim=True).mean(0, keepdim=True).clamp(min=1e-6)
        size = self._reported * sight.before
        unit = direction / direction.norm().clamp(min=1e-30)
        return replace(sight.work, reports=(unit * size).expand_as(own).clone())


def with_changes(work: Update, items: Tensor, changes: Tensor) -> Update:
    """The ``work`` of B clients with other rows in the tables of the model: ``changes`` [r, d] or [B, r, d] of
    ``items`` [r]. Rows of other tables (parts of neighbour sums) stay as they are."""
    assert work.deltas is not None
    assert work.segments is not None
    assert work.items is not None
    n = work.users.numel()
    segments = torch.arange(n).repeat_interleave(items.numel())
    deltas = changes.to(work.deltas).expand(n, *changes.shape[-2:]).reshape(-1, changes.shape[-1])
    if work.tables is None:
        return replace(work, segments=segments, items=items.repeat(n), deltas=deltas)
    kept = work.tables != work.groups[work.segments]
    return replace(
        work,
        segments=torch.cat([segments, work.segments[kept]]),
        items=torch.cat([items.repeat(n), work.items[kept]]),
        deltas=torch.cat([deltas, work.deltas[kept]]),
        tables=torch.cat([work.groups[segments], work.tables[kept]]),
    )


def lengths(update: Update) -> Tensor:
    """[B] the L2 norm of the changes of item rows that each client sends."""
    squares = torch.zeros(update.users.numel())
    if update.deltas is not None and update.segments is not None:
        squares.index_add_(0, update.segments, update.deltas.square().sum(1))
    return squares.sqrt()


def stretched(forged: Update, work: Update, length: float) -> Update:
    """The ``forged`` changes of each client, ``length`` times as long as those of the honest ``work`` on average."""
    if forged.deltas is None or forged.segments is None:
        return forged
    wanted = lengths(work).mean() * length
    factors = wanted / lengths(forged).clamp(min=1e-30)
    return replace(forged, deltas=forged.deltas * factors[forged.segments, None])
