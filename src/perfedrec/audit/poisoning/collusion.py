"""Collusion: what clients that act together can do in all phases of a method, where sums are secret and elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Knowledge, Lying, Sight
from perfedrec.audit.poisoning.aims import mean_direction
from perfedrec.audit.poisoning.fillers import popular_fillers
from perfedrec.core.aggregate import BASIS_GRID
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import Update
from perfedrec.data.interactions import Ints


class CollusionOptions(Settings):
    """Options of collusion."""

    popular: int = Field(20, ge=1, description="number of popular items that stand for users, and are not to be raised")
    votes: bool = Field(True, description="whether every second malicious client validates with the targets")
    varied: bool = Field(
        False, description="whether lists have different popular items, as with the attack popular, and not the same"
    )


class Collusion(Lying):
    """Collusion (ours): all malicious clients act together in each phase of a method. Under secure aggregation nobody
    sees it, because nobody sees a part.

    - *Degrees*: a client counts the targets ``before`` times.
    - *Passes* over all users sum parts of ``N^T N X``. Malicious clients send the rows ``s^T X`` for the targets alone,
      ``before`` times as long as honest parts, with s proportional to ``sqrt(d_i)``: the direction in which all users
      lie. The first singular vector then has the targets in it, and all users get a score for them from it.
    - *Joining*: vectors that are reported, or what is summed for the targets, point to the mean of popular items' rows,
      which stands for the honest users' vectors. Edges to the targets are sent ``before`` times.
    - *Training*: a change ``D`` [m, d] is summed as ``V^T D`` in the basis ``V`` that all clients receive, and comes
      back as ``V V^T D``. Of all changes with norm at most C, ``D = C V w x^T`` with a unit vector w raises the target
      by ``C (v_t w) x``, where ``v_t`` is its row of the basis: best with w along ``v_t``, and ``1 / |v_t|`` times as
      much as a change of the target's row alone. The part of w along the rows of popular items is left out, so that
      these are not raised with it. Without a basis it is a change of the targets' rows.
    - *Evaluation*: every second client claims to hold out the targets, and so votes for rounds and weights with which
      they stand in lists.

    Knows which items are popular.
    """

    name = "collusion"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({"popularity"})
    Options = CollusionOptions
    options: CollusionOptions

    def lists(self, n_clients: int) -> list[Ints]:
        voting = self._voting(n_clients)
        targets = self.known.targets.numpy()
        found = super().lists(n_clients)
        return [np.setdiff1d(each, targets) if votes else each for each, votes in zip(found, voting, strict=True)]

    def held_out(self, n_clients: int) -> list[Ints]:
        nothing, targets = np.empty(0, dtype=np.int64), self.known.targets.numpy()
        return [targets if votes else nothing for votes in self._voting(n_clients)]

    def _voting(self, n_clients: int) -> list[bool]:
        """Which clients vote."""
        return [self.options.votes and number % 2 == 1 for number in range(n_clients)]

    def fillers(self, n: int, key: Key) -> Tensor:
        """[n] the most popular items, the same in all lists; or others in each list, where lists are varied."""
        return popular_fillers(self.known.popular, n, key) if self.options.varied else self._popular(n)

    def _popular(self, n: int) -> Tensor:
        """[n] the most popular items that are no targets."""
        assert self.known.popular is not None
        return self.known.popular[~torch.isin(self.known.popular, self.known.targets)][:n]

    def _users(self, sight: Sight) -> Tensor:
        """[d] the direction that stands for honest users' vectors."""
        return mean_direction(sight.broadcast.items[self._popular(self.options.popular)])

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        targets, basis, aim = self.known.targets, getattr(sight.broadcast, "basis", None), self._users(sight)
        if basis is None:
            return targets, aim.expand(targets.numel(), -1)
        columns = basis.to(torch.float32) / BASIS_GRID
        others = columns[self._popular(self.options.popular)]
        wanted, gram = columns[targets].sum(0), others @ others.T
        ridge = gram.diagonal().mean().clamp(min=1e-12) * 0.1 * torch.eye(gram.shape[0])
        apart = wanted - others.T @ torch.linalg.solve(gram + ridge, others @ wanted)
        rows = columns @ apart
        touched = rows.nonzero().squeeze(1)
        return (touched, rows[touched, None] * aim) if touched.numel() else (targets, aim.expand(targets.numel(), -1))

    def reported(self, sight: Sight) -> Tensor | None:
        return self._users(sight)

    def forge(self, sight: Sight) -> Update:
        work = sight.work
        if work.edges is not None:
            return self._reporting(replace(sight, work=self._repeated(sight)))
        if sight.training or work.deltas is None or work.items is None:
            return super().forge(sight)
        if sight.phase == "degrees":
            counts = torch.where(torch.isin(work.items, self.known.targets)[:, None], sight.before, 1.0)
            return replace(work, deltas=work.deltas * counts)
        if sight.phase == "join":
            return self._everywhere(sight, *self.changes(sight))
        return self._everywhere(sight, *self.planted(sight))

    def planted(self, sight: Sight) -> tuple[Tensor, Tensor]:
        """The targets, and their rows [t, d] in a pass over the columns X [m, d]: ``s^T X``."""
        probe, degrees = getattr(sight.broadcast, "probe", None), getattr(sight.broadcast, "degrees", None)
        columns = sight.broadcast.items if probe is None else probe
        crowd = torch.ones(columns.shape[0]) if degrees is None else degrees.clamp(min=0).sqrt()
        crowd = crowd.index_fill(0, self.known.targets, 0.0)
        return self.known.targets, (crowd @ columns).expand(self.known.targets.numel(), -1)

    def _repeated(self, sight: Sight) -> Update:
        """The honest work, with edges to the targets ``before`` times."""
        edges, tokens = sight.work.edges, getattr(sight.broadcast, "tokens", None)
        assert edges is not None
        mine = torch.isin(edges[:, 2], self.known.targets if tokens is None else tokens[self.known.targets])
        return replace(sight.work, edges=torch.cat([edges, edges[mine].repeat(max(round(sight.before) - 1, 0), 1)]))

    def _everywhere(self, sight: Sight, items: Tensor, change: Tensor) -> Update:
        """The honest work with the same ``change`` [r, d] of ``items`` [r] by all clients, in all tables that honest
        work changes, ``before`` times as long as honest work on average."""
        work = sight.work
        assert work.deltas is not None
        n, longer = work.users.numel(), sight.before * work.deltas.norm() / work.users.numel() ** 0.5
        tables = None if work.tables is None else work.tables.unique()
        times = 1 if tables is None else tables.numel()
        change = change * (longer / times**0.5 / change.norm().clamp(min=1e-30))
        return replace(
            work,
            segments=torch.arange(n).repeat_interleave(times * items.numel()),
            items=items.repeat(n * times),
            deltas=change.repeat(n * times, 1),
            tables=None if tables is None else tables.repeat_interleave(items.numel()).repeat(n),
        )
