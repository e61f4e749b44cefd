"""The parts of a split, taken from sorted interactions block by block of users: they may be larger than the memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perfedrec.core import mapped
from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset, HeldOut, SplitReport
from perfedrec.data.interactions import Interactions, Ints

PARTS = 3  # train, valid, test


def parted(name: str, interactions: Interactions, part: NDArray[np.int8], how: str, short_users: int = 0) -> Dataset:
    """The data set in which each interaction is in the ``part`` [nnz] 0 (training), 1 (validation), 2 (test), or in
    none (-1).

    Its users and items are those of training, as with :func:`perfedrec.data.dataset.assemble`, which takes rows in any
    order. ``how`` and ``short_users`` are for the report. Raises :class:`DataError` where the training part is empty.
    """
    counts = np.zeros((PARTS, interactions.n_users), dtype=np.int64)  # of each user
    occurs = np.zeros((PARTS, interactions.n_items), dtype=bool)
    for users, rows in interactions.blocks():
        limits = interactions.offsets[users.start : users.stop + 1] - rows.start
        for number in range(PARTS):
            mine = part[rows] == number
            counts[number, users] = np.diff(np.concatenate([[0], np.cumsum(mine)])[limits])
            occurs[number, interactions.items[rows][mine]] = True
    if not counts[0].any():
        raise DataError(f"{name}: the training part holds no interactions")
    trained, new_item = counts[0] > 0, np.where(occurs[0], np.cumsum(occurs[0]) - 1, -1)
    user_ids, item_ids = interactions.user_ids[trained], interactions.item_ids[occurs[0]]
    found = [_Part(interactions, count, trained) for count in counts]
    for users, rows in interactions.blocks():
        known = np.repeat(trained[users], interactions.degrees[users]) if not trained[users].all() else None
        items, own = new_item[interactions.items[rows]], part[rows]
        for number, each in enumerate(found):
            here = (own == number) & (items >= 0)
            each.add(here if known is None else here & known, items, interactions, users, rows)
    train, valid, test = (each.interactions(user_ids, item_ids) for each in found)
    of_valid, of_test = (
        HeldOut(
            interactions=int(counts[number].sum()),
            unknown_users=int((counts[number, ~trained] > 0).sum()),
            unknown_items=int((occurs[number] & ~occurs[0]).sum()),
            left_out=int(counts[number].sum()) - each.n_interactions,
        )
        for number, each in enumerate((valid, test), start=1)
    )
    return Dataset(name, train, valid, test, SplitReport(how, of_valid, of_test, 0, short_users))


class _Part:
    """The interactions of a part, as they are found. There is room for as many as ``counts`` [n] says of the users who
    are ``trained`` [n]."""

    def __init__(self, interactions: Interactions, counts: Ints, trained: NDArray[np.bool_]) -> None:
        size = int(counts[trained].sum())
        self.items, self.trained, self.filled = mapped.empty(size, np.int64), trained, 0
        self.times = None if interactions.timestamps is None else mapped.empty(size, np.int64)
        self.positions = None if interactions.positions is None else mapped.empty(size, np.int64)
        self.counts = np.zeros(trained.size, dtype=np.int64)

    def add(self, here: NDArray[np.bool_], items: Ints, interactions: Interactions, users: slice, rows: slice) -> None:
        """Add the rows ``here`` of a block, whose ``items`` are given."""
        size = int(here.sum())
        place = slice(self.filled, self.filled + size)
        self.items[place] = items[here]
        if self.times is not None and interactions.timestamps is not None:
            self.times[place] = interactions.timestamps[rows][here]
        if self.positions is not None and interactions.positions is not None:
            self.positions[place] = interactions.positions[rows][here]
        limits = interactions.offsets[users.start : users.stop + 1] - rows.start
        self.counts[users] = np.diff(np.concatenate([[0], np.cumsum(here)])[limits])
        self.filled += size

    def interactions(self, user_ids: NDArray[np.generic], item_ids: NDArray[np.generic]) -> Interactions:
        """All of them."""
        offsets = np.concatenate([[0], np.cumsum(self.counts[self.trained])])
        times, positions = (None if each is None else each[: self.filled] for each in (self.times, self.positions))
        return Interactions(user_ids, item_ids, offsets, self.items[: self.filled], times, positions)
