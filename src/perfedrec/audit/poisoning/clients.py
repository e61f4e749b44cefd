"""A data set with malicious clients among its users, and the items that an adversary wants in lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, DataError
from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.data import Dataset
from perfedrec.data.dataset import Attributes
from perfedrec.data.interactions import Ids, Interactions, Ints

FEW = 0.5
"""Targets are drawn among the items with interactions whose number of users is at most this quantile of all of them."""


def draw_targets(dataset: Dataset, n: int, seed: int) -> Tensor:
    """int64 [n] random items, ascending, with few users: at least one, and at most the median of all items.

    They depend on the data and on ``seed`` alone, so that all attacks have the same. Raises :class:`ConfigError` where
    there are fewer such items.
    """
    degrees = dataset.train.item_degrees
    few = np.flatnonzero((degrees > 0) & (degrees <= np.quantile(degrees[degrees > 0], FEW)))
    if few.size < n:
        raise ConfigError(f"{n} targets are wanted, and only {few.size} items have few users; expected fewer targets")
    chosen = few[choose(few.size, n, Key(seed).fold("targets")).numpy()]
    return torch.from_numpy(np.sort(chosen))


def named_targets(dataset: Dataset, item_ids: Sequence[int | str]) -> Tensor:
    """int64 [t] the items with these ids, ascending. Raises :class:`perfedrec.core.errors.DataError` for an unknown
    id."""
    try:
        return torch.tensor(sorted({dataset.train.item_index(each) for each in item_ids}), dtype=torch.int64)
    except DataError as error:
        raise DataError(f"target: {error} (without a target, items that few users have are drawn)") from None


def n_malicious(n_honest: int, share: float) -> int:
    """The number of malicious clients that are added to ``n_honest`` users: ``share`` times as many, at least 1."""
    return max(round(share * n_honest), 1)


def with_clients(dataset: Dataset, lists: Sequence[Ints], held: Sequence[Ints] | None = None) -> Dataset:
    """The data set with a further user for each of the ``lists`` of items, after its own users. These users validate
    with the items that they have ``held`` out; nothing by default. Where users have attributes, they have those of
    random other users."""
    n = len(lists)
    if not n:
        return dataset
    ids = _more_ids(dataset.train.user_ids, n)
    given = dataset.user_attributes
    if given is not None:
        twins = choose(dataset.n_users, n, Key(0).fold("attributes of malicious clients")).numpy()
        values = np.concatenate([given.values, given.values[np.resize(twins, n)]])
        given = Attributes(given.names, values, given.ranges)
    nothing = [np.empty(0, dtype=np.int64)] * n
    return replace(
        dataset,
        name=f"{dataset.name} with {counted(n, 'malicious client')}",
        train=_extended(dataset.train, ids, lists),
        valid=_extended(dataset.valid, ids, nothing if held is None else held),
        test=dataset.test if dataset.new_users is not None else _extended(dataset.test, ids, nothing),
        user_attributes=given,
        truth=None,
        origin=None,
    )


def _more_ids(ids: Ids, n: int) -> Ids:
    """The ids and ``n`` more that are none of them."""
    if ids.dtype.kind == "i":
        return np.concatenate([ids, int(ids.max()) + 1 + np.arange(n)])
    known, stem = set(ids.tolist()), "malicious"
    while any(f"{stem}-{each}" in known for each in range(n)):
        stem += "-client"
    names = [f"{stem}-{each}" for each in range(n)]
    return np.array([*ids.tolist(), *names], dtype=object)


def _extended(part: Interactions, ids: Ids, lists: Sequence[Ints]) -> Interactions:
    """The interactions of a part with those of further users; times and positions, which training does not use, are
    left out."""
    limits = part.offsets[-1] + np.cumsum([each.size for each in lists])
    offsets = np.concatenate([part.offsets, limits]).astype(np.int64)
    return Interactions(ids, part.item_ids, offsets, np.concatenate([part.items, *lists]).astype(np.int64))
