"""A federated method some of whose clients do not follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Adversary, Sight
from perfedrec.core.aggregate import DELTA_GRID, FIXED_POINT
from perfedrec.core.algorithm import AnyAlgorithm, ClientRecord, Protects, Received
from perfedrec.core.keys import Key
from perfedrec.core.types import Rows, Update, block_rows
from perfedrec.privacy.protection import Protection

Bound = Literal["kept", "ignored"]
"""Whether malicious clients keep the bound on what one client may send. Where the coordinator sees uploads it can
enforce the bound. Where it sees sums alone, it cannot."""

LONGEST = 2.0**12
"""No number of a forged update is larger, so that a sum can hold it (:data:`perfedrec.core.aggregate.LARGEST`)."""


class Hostile:
    """The ``algorithm``, with an ``adversary`` that controls the users from number ``n_honest`` on. It passes
    everything on, and replaces what these users send.

    They send what :meth:`Adversary.forge` makes, ``length`` times as long as honest work or, where there is a ``bound``
    on it that is ignored, ``length`` times as long as the bound. Before training each counts for ``before`` clients.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        adversary: Adversary,
        n_honest: int,
        bound: Bound = "kept",
        length: float = 10.0,
        before: float = 100.0,
    ) -> None:
        self.algorithm, self.adversary, self.n_honest = algorithm, adversary, n_honest
        self.bound, self.length, self.before = bound, length, before
        self.protection = HostileProtection(self, algorithm.protection)
        self._block: tuple[Received, Rows, ClientRecord] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def unread(self, phase: str) -> frozenset[str]:
        return frozenset()  # users' vectors may be asked for afterwards

    def client(
        self, phase: str, broadcast: Received, rows: Rows, client_state: ClientRecord, key: Key
    ) -> tuple[Update, ClientRecord]:
        update, after = self.algorithm.client(phase, broadcast, rows, client_state, key)
        self._block = broadcast, rows, after
        return update, after

    def sent(self, phase: str, update: Update, honest: Update) -> Update:
        """What a block sends. ``update`` is what all its clients would send without protection if they followed the
        method, and ``honest`` the same with protection."""
        malicious = update.users >= self.n_honest
        if not bool(malicious.any()):
            return honest
        assert self._block is not None
        broadcast, rows, _ = self._block
        others = honest.part(~malicious)
        own = block_rows(rows.offsets, rows.items, malicious.nonzero().squeeze(1), rows.attributes)[0]
        sight = Sight(
            phase=phase,
            broadcast=broadcast,
            rows=replace(own, users=rows.users[malicious]),
            work=update.part(malicious),
            vectors=partial(self._vectors, malicious),
            length=self.length,
            before=self.before,
            honest=others if "gradients" in self.adversary.knows else None,
        )
        forged = self.adversary.forge(sight)
        return honest if forged is sight.work else joined(others, self._limited(phase, forged))

    def _vectors(self, malicious: Tensor) -> Tensor | None:
        """[B, d] the vectors of the malicious users of the block."""
        assert self._block is not None
        found = self.algorithm.user_vectors(*self._block)
        return None if found is None else found[malicious]

    def _limited(self, phase: str, forged: Update) -> Update:
        """What malicious clients really send: within the bound, or of ``length`` times its length. On the grid of the
        sums, as everything that is summed."""
        protection = cast(Protection, self.algorithm.protection)
        settings, bound = protection.settings, protection.bound(phase)
        if settings.norm == "coordinate" and settings.clip is not None and protection.phases[phase].coordinates:
            clip = settings.clip * (1.0 if self.bound == "kept" else self.length)
            forged = _each(forged, lambda values: values.clamp(-clip, clip))
        elif self.bound == "kept" or bound is None:
            forged = protection.clip_update(phase, forged)
        elif forged.deltas is not None:  # clipped to the bound, and then longer
            held = protection.clip_update(phase, forged)
            forged = _each(held, lambda values: values * self.length)
        grid = DELTA_GRID if protection.low_rank(phase) else FIXED_POINT
        return _each(forged, lambda values: _on_grid(values, grid))


class HostileProtection:
    """A method's protection, which honest clients use and malicious ones do not."""

    def __init__(self, hostile: Hostile, protection: Protects) -> None:
        self.hostile, self.protection = hostile, protection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protection, name)

    def upload(self, phase: str, update: Update, key: Key) -> Update:
        return self.hostile.sent(phase, update, self.protection.upload(phase, update, key))


def joined(first: Update, second: Update) -> Update:
    """Two updates of the same kind as one: the users of the ``first``, and then those of the ``second``."""
    n, found = first.users.numel(), {}
    for field in fields(Update):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        if mine is None or theirs is None:
            continue
        if field.name == "segments":
            theirs = theirs + n
        if field.name == "edges":
            theirs = theirs + theirs.new_tensor([0, n, 0])
        found[field.name] = torch.cat([mine, theirs])
    return Update(**found)


def _each(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    """The update with all its numbers changed."""
    names = ("deltas", "dense", "reports")
    return replace(update, **{name: change(each) for name in names if (each := getattr(update, name)) is not None})


def _on_grid(values: Tensor, grid: float) -> Tensor:
    whole = (values.clamp(-LONGEST, LONGEST).to(torch.float64) * grid).round_()
    return (whole / grid).to(torch.float32)
