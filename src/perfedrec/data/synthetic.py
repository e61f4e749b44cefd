"""Synthetic interactions with known taste clusters.

How they are drawn. Each item belongs to one of ``clusters`` taste clusters of equal size, and each user to one of them
with equal probability. Item popularity follows a power law: the item of rank r (ranks are random) has weight r^-0.8.
The number of items of a user is log-normal, with a mean of about ``interactions_per_user`` and sigma 0.7. A user draws
these items one after the other: with probability ``strength`` from the items of the user's own cluster, otherwise from
all items, in both cases in proportion to the weights. An item that the user already has is drawn again. Times are
uniform over one year and independent of everything else.

With several ``facets`` the items are grouped into ``clusters`` taste clusters anew for each facet, and each user has
one facet, by which its cluster is meant. Users of different facets like the same items for different reasons: a model
of all users together has to know all groupings, a model of the users of one facet only one.

More than :data:`USERS_AT_ONCE` users draw block by block, each block with a generator of its own, into files that are
mapped into memory (:mod:`perfedrec.core.mapped`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perfedrec.core import mapped
from perfedrec.core.errors import DataError
from perfedrec.data.dataset import SyntheticTruth
from perfedrec.data.interactions import Interactions, Ints, stable_order

POPULARITY_EXPONENT = 0.8
ACTIVITY_SIGMA = 0.7
STRENGTH = 0.8
FEWEST = 3  # leave-one-out takes two
USERS_AT_ONCE = 1 << 18
"""Users whose interactions are drawn together, with one generator of random numbers."""
START, YEAR = 1_700_000_000, 365 * 86_400


def synthetic(
    users: int = 2000,
    items: int = 1500,
    clusters: int = 5,
    interactions_per_user: float = 20,
    seed: int = 0,
    strength: float = STRENGTH,
    facets: int = 1,
) -> tuple[Interactions, SyntheticTruth]:
    """Draw interactions of ``users`` users and ``items`` items as this module describes; ids are 0, 1, 2, ...

    A user has at least 3 items, and at most as many as half of a cluster. Returns the interactions and the truth behind
    them. Raises :class:`DataError` for sizes that make this impossible, for a ``strength`` outside 0 to 1, and for a
    negative ``seed``.
    """
    if min(users, items, clusters, facets) < 1 or seed < 0:
        raise DataError("synthetic data need users, items, clusters and facets of at least 1, and a seed of at least 0")
    if not 0 <= strength <= 1:
        raise DataError(f"synthetic data: strength is the share drawn from the own cluster, 0 to 1, got {strength}")
    largest = items // clusters // 2
    if not FEWEST <= interactions_per_user <= largest:
        raise DataError(
            f"synthetic data: interactions_per_user must lie between {FEWEST} and half of a cluster's items, "
            f"{largest} for {items} items in {clusters} clusters, got {interactions_per_user:g}"
        )
    rng = np.random.default_rng(seed)
    truth = SyntheticTruth(
        user_clusters=rng.integers(clusters, size=users),
        item_clusters=rng.permutation(np.arange(items) % clusters),  # equal sizes, so that none is empty
        popularity=np.power(rng.permutation(items) + 1.0, -POPULARITY_EXPONENT, dtype=np.float64),
    )
    if facets > 1:
        others = [rng.permutation(np.arange(items) % clusters) for _ in range(facets - 1)]
        truth = replace(
            truth,
            item_clusters=np.stack([truth.item_clusters, *others], axis=1),
            user_facets=rng.integers(facets, size=users),
        )
    activity = rng.lognormal(np.log(interactions_per_user) - ACTIVITY_SIGMA**2 / 2, ACTIVITY_SIGMA, size=users)
    wanted = np.clip(np.rint(activity), FEWEST, largest).astype(np.int64)
    tastes, offsets = _Tastes(truth, strength), np.concatenate([[0], np.cumsum(wanted)])
    if users <= USERS_AT_ONCE:
        chosen, times = tastes.draw(slice(0, users), wanted, rng)
    else:
        chosen, times = _in_blocks(tastes, wanted, offsets, seed)
    return Interactions(np.arange(users), np.arange(items), offsets, chosen, times), truth


def how_drawn(users: int) -> tuple[str, ...]:
    """A remark on how the interactions of a number of ``users`` are drawn, where there are many."""
    if users <= USERS_AT_ONCE:
        return ()
    return (f"{users:,} users were drawn in blocks of {USERS_AT_ONCE:,}, each with random numbers of its own",)


def _in_blocks(tastes: _Tastes, wanted: Ints, offsets: Ints, seed: int) -> tuple[Ints, Ints]:
    """The items of all users, who get ``wanted`` [n] each, and their times. Blocks are drawn in several threads."""
    items, times = (mapped.empty(int(offsets[-1]), np.int64) for _ in range(2))

    def draw(first: int) -> None:
        users = slice(first, min(first + USERS_AT_ONCE, wanted.size))
        rows, rng = slice(offsets[users.start], offsets[users.stop]), np.random.default_rng([seed, first])
        items[rows], times[rows] = tastes.draw(users, wanted[users], rng)

    import torch  # whose threads the user has chosen; nothing else in this room needs it

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(0, wanted.size, USERS_AT_ONCE)))
    return items, times


class _Tastes:
    """What users choose from: with probability ``strength`` the items of their own taste, otherwise all."""

    def __init__(self, truth: SyntheticTruth, strength: float) -> None:
        self.n_items, self.strength = truth.popularity.size, strength
        labels = truth.item_clusters.reshape(self.n_items, -1).T  # [facets, m]
        n_clusters = int(labels.max()) + 1
        tastes = (labels + n_clusters * np.arange(labels.shape[0])[:, None]).ravel()  # of all facets, one by one
        self.by_taste = np.argsort(tastes, kind="stable")
        self.limits = np.concatenate([[0.0], np.cumsum(np.tile(truth.popularity, labels.shape[0])[self.by_taste])])
        first = np.searchsorted(tastes[self.by_taste], np.arange(tastes.max() + 2))
        self.low, self.high = self.limits[first[:-1]], self.limits[first[1:]]  # the cumulative weights of each taste
        self.wished = truth.user_clusters + (0 if truth.user_facets is None else n_clusters * truth.user_facets)

    def _items(self, users: Ints, rng: np.random.Generator) -> Ints:
        """An item for each of ``users``, who may occur several times."""
        own = rng.random(users.size) < self.strength
        taste = self.wished[users]
        start: NDArray[np.float64] = np.where(own, self.low[taste], 0.0)
        end: NDArray[np.float64] = np.where(own, self.high[taste], self.limits[self.n_items])  # all of the first facet
        position = np.searchsorted(self.limits, start + (end - start) * rng.random(users.size), side="right") - 1
        return self.by_taste[np.minimum(position, self.by_taste.size - 1)] % self.n_items

    def draw(self, users: slice, wanted: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """``wanted`` [B] distinct items for each of the ``users``, user by user and ascending, and their times."""
        done: list[Ints] = []
        pool = np.zeros(0, dtype=np.int64)  # keys: the user's place in the block, times n_items, plus the item
        missing, tries = wanted.copy(), 1
        while (active := np.flatnonzero(missing)).size:
            rows = np.repeat(active, missing[active] * tries)
            pool = np.concatenate([pool, rows * self.n_items + self._items(rows + users.start, rng)])
            pool = pool[_first(pool)]  # distinct, in the order drawn
            owners = pool // self.n_items
            if bool(np.any(owners[1:] < owners[:-1])):
                pool = pool[stable_order(owners)]
                owners = pool // self.n_items
            counts = np.bincount(owners, minlength=wanted.size)
            kept = np.arange(pool.size) - (np.cumsum(counts) - counts)[owners] < wanted[owners]
            pool, owners = pool[kept], owners[kept]
            missing = np.zeros_like(wanted)
            missing[active] = wanted[active] - np.bincount(owners, minlength=wanted.size)[active]
            finished = missing[owners] == 0
            done.append(pool[finished])
            pool, tries = pool[~finished], min(2 * tries, 64)
        keys = np.concatenate(done)
        times = START + rng.integers(YEAR, size=keys.size)
        order = stable_order(keys)
        return keys[order] % self.n_items, times[order]


def _first(keys: Ints) -> NDArray[np.bool_]:
    """bool [rows] whether each of ``keys`` is the first one of its value."""
    order = stable_order(keys)
    ordered, first = keys[order], np.zeros(keys.size, dtype=bool)
    first[order[np.concatenate([[True], ordered[1:] > ordered[:-1]])]] = True
    return first
