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
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import SyntheticTruth
from perfedrec.data.interactions import Interactions, Ints

POPULARITY_EXPONENT = 0.8
ACTIVITY_SIGMA = 0.7
FEWEST = 3  # leave-one-out takes two
START, YEAR = 1_700_000_000, 365 * 86_400


def synthetic(
    users: int = 2000,
    items: int = 1500,
    clusters: int = 5,
    interactions_per_user: float = 20,
    seed: int = 0,
    strength: float = 0.8,
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
    keys = _draw_distinct(truth, wanted, strength, rng)
    times = START + rng.integers(YEAR, size=keys.size)
    rows, columns = np.divmod(keys, items)
    interactions = Interactions.from_rows(np.arange(users), np.arange(items), rows, columns, times)
    return interactions, truth


def _draw_distinct(truth: SyntheticTruth, wanted: Ints, strength: float, rng: np.random.Generator) -> Ints:
    """``wanted[u]`` distinct items for each user u, as keys ``user * n_items + item``."""
    n_items = truth.popularity.size
    labels = truth.item_clusters.reshape(n_items, -1).T  # [facets, m]
    n_clusters = int(labels.max()) + 1
    tastes = (labels + n_clusters * np.arange(labels.shape[0])[:, None]).ravel()  # of all facets, one after the other
    by_taste = np.argsort(tastes, kind="stable")
    limits = np.concatenate([[0.0], np.cumsum(np.tile(truth.popularity, labels.shape[0])[by_taste])])
    first = np.searchsorted(tastes[by_taste], np.arange(tastes.max() + 2))
    low, high = limits[first[:-1]], limits[first[1:]]  # the range of cumulative weights that belongs to each taste
    wished = truth.user_clusters + (0 if truth.user_facets is None else n_clusters * truth.user_facets)

    def draw(rows: Ints) -> Ints:
        own = rng.random(rows.size) < strength
        taste = wished[rows]
        start: NDArray[np.float64] = np.where(own, low[taste], 0.0)
        end: NDArray[np.float64] = np.where(own, high[taste], limits[n_items])  # the first facet has all items
        position = np.searchsorted(limits, start + (end - start) * rng.random(rows.size), side="right") - 1
        return rows * n_items + by_taste[np.minimum(position, tastes.size - 1)] % n_items

    done: list[Ints] = []
    pool = np.zeros(0, dtype=np.int64)
    missing, tries = wanted.copy(), 1
    while (active := np.flatnonzero(missing)).size:
        pool = np.concatenate([pool, draw(np.repeat(active, missing[active] * tries))])
        pool = pool[np.sort(np.unique(pool, return_index=True)[1])]  # distinct, in the order drawn
        pool = pool[np.argsort(pool // n_items, kind="stable")]
        owners = pool // n_items
        place = np.arange(pool.size) - np.searchsorted(owners, owners)
        pool, owners = pool[place < wanted[owners]], owners[place < wanted[owners]]
        missing = np.zeros_like(wanted)
        missing[active] = wanted[active] - np.bincount(owners, minlength=wanted.size)[active]
        finished = missing[owners] == 0
        done.append(pool[finished])
        pool, tries = pool[~finished], min(2 * tries, 64)
    return np.concatenate(done)
