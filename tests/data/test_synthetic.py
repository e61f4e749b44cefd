import hashlib
import sys

import numpy as np
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import SyntheticTruth, describe, load, synthetic
from perfedrec.data.interactions import stable_order
from perfedrec.data.synthetic import POPULARITY_EXPONENT


def same_cluster(strength: float) -> float:
    interactions, truth = synthetic(users=3000, items=4000, clusters=4, strength=strength)
    return float(np.mean(truth.user_clusters[interactions.users_of_rows()] == truth.item_clusters[interactions.items]))


def test_strength_is_the_share_of_items_from_the_own_cluster() -> None:
    assert same_cluster(1.0) == 1.0
    # s + (1 - s) / clusters, a little less because repeats, which are drawn again, are more frequent among few items
    assert 0.83 < same_cluster(0.8) < 0.86
    assert same_cluster(0.0) == pytest.approx(0.25, abs=0.03)


def test_sizes_ids_and_clusters() -> None:
    interactions, truth = synthetic(users=400, items=90, clusters=3, interactions_per_user=10)
    assert interactions.user_ids.tolist() == list(range(400))
    assert interactions.item_ids.tolist() == list(range(90))
    assert np.bincount(truth.item_clusters).tolist() == [30, 30, 30]
    assert np.bincount(truth.user_clusters, minlength=3).min() > 90
    assert interactions.degrees.min() >= 3
    assert interactions.degrees.max() == 15  # half of a cluster


def test_popularity_follows_the_planted_power_law() -> None:
    interactions, truth = synthetic(users=20_000, items=2000, clusters=2, strength=0.5)
    counts = interactions.item_degrees
    ranks = np.argsort(np.argsort(-truth.popularity))
    tail = (ranks >= 50) & (ranks < 1500)  # the most popular items fall short: a user takes each of them once at most
    slope = np.polyfit(np.log(ranks[tail] + 1.0), np.log(counts[tail]), 1)[0]
    assert slope == pytest.approx(-POPULARITY_EXPONENT, abs=0.06)
    assert 0.45 < describe(interactions)["item_degrees"]["gini"] < 0.7


def test_activity_is_log_normal() -> None:
    interactions, _ = synthetic(users=20_000, items=5000, clusters=2, interactions_per_user=40)
    degrees = interactions.degrees
    assert degrees.mean() == pytest.approx(40, rel=0.03)
    assert np.log(degrees).std() == pytest.approx(0.7, abs=0.02)


def test_times_are_within_one_year_and_independent_of_popularity() -> None:
    interactions, truth = synthetic(users=5000)
    times = interactions.timestamps
    assert times is not None
    assert 360 * 86_400 < times.max() - times.min() < 365 * 86_400
    correlation = np.corrcoef(times, truth.popularity[interactions.items])[0, 1]
    assert abs(correlation) < 0.02


def test_the_seed_decides_the_draws_and_zero_is_a_seed() -> None:
    first, again, other = (synthetic(users=100, seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items[:50], other.items[:50])


def test_draws_are_those_of_earlier_versions() -> None:
    interactions, _ = synthetic(users=300, items=200)
    digest = hashlib.sha256()
    for array in (interactions.offsets, interactions.items, interactions.timestamps):
        assert array is not None
        digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "0aed6109eb92054e"


def test_many_users_draw_by_the_same_law_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    together, _ = synthetic(users=900, items=400)
    assert not load("synthetic:users=900,items=400").notes.remarks[2:]
    monkeypatch.setattr(sys.modules["perfedrec.data.synthetic"], "USERS_AT_ONCE", 100)
    blocks, truth = synthetic(users=900, items=400)
    assert np.array_equal(blocks.offsets, together.offsets)
    same = truth.user_clusters[blocks.users_of_rows()] == truth.item_clusters[blocks.items]
    assert 0.75 < same.mean() < 0.9
    heads = [tuple(blocks.items[start : start + 3]) for start in blocks.offsets[:200]]
    assert sum(one == other for one, other in zip(heads[:100], heads[100:], strict=True)) < 10  # blocks differ
    assert np.array_equal(blocks.items, synthetic(users=900, items=400)[0].items)
    *_, remark = load("synthetic:users=900,items=400").notes.lines()
    assert remark == "900 users were drawn in blocks of 100, each with random numbers of its own"


def test_a_stable_order_is_that_of_numpy() -> None:
    keys = np.random.default_rng(0).integers(50, size=400)
    for scale in (1, 1 << 57):  # which leaves no room for places
        assert np.array_equal(stable_order(keys * scale), np.argsort(keys, kind="stable"))
    assert stable_order(keys[:0]).size == 0


def test_users_go_by_the_clusters_of_their_own_facet() -> None:
    interactions, truth = synthetic(users=3000, items=2000, clusters=10, facets=3, strength=1.0)
    assert truth.user_facets is not None
    assert [np.bincount(each).tolist() for each in truth.item_clusters.T] == [[200] * 10] * 3
    users, items = interactions.users_of_rows(), interactions.items
    by_facet = truth.item_clusters[items] == truth.user_clusters[users, None]
    own = truth.user_facets[users]
    assert by_facet[np.arange(own.size), own].all()
    others = [by_facet[own != facet, facet].mean() for facet in range(3)]
    assert np.allclose(others, 0.1, atol=0.03)  # the clusters of another facet say nothing
    assert np.bincount(truth.user_facets).min() > 900


def test_one_facet_is_the_default() -> None:
    one, truth = synthetic(users=50, facets=1)
    assert np.array_equal(one.items, synthetic(users=50)[0].items)
    assert truth.user_facets is None
    assert truth.item_clusters.ndim == 1


def test_truth_of_a_selection() -> None:
    truth = SyntheticTruth(np.array([0, 1, 2]), np.array([2, 1]), np.array([0.5, 1.0]))
    taken = truth.take(np.array([2, 0]), np.array([1]))
    assert (taken.user_clusters.tolist(), taken.item_clusters.tolist(), taken.popularity.tolist()) == (
        [2, 0],
        [1],
        [1.0],
    )
    facets = SyntheticTruth(np.array([0, 1]), np.array([[2, 1], [0, 3]]), np.ones(2), np.array([1, 0]))
    taken = facets.take(np.array([1]), np.array([1]))
    assert (taken.item_clusters.tolist(), taken.user_facets.tolist()) == ([[0, 3]], [0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 0}, "users, items, clusters and facets of at least 1"),
        ({"facets": 0}, "users, items, clusters and facets of at least 1"),
        ({"seed": -1}, "a seed of at least 0"),
        ({"strength": 1.2}, "strength is the share drawn from the own cluster, 0 to 1, got 1.2"),
        ({"items": 100}, "between 3 and half of a cluster's items, 10 for 100 items in 5 clusters, got 20"),
        ({"interactions_per_user": 1}, "between 3 and"),
    ],
)
def test_impossible_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic(**settings)  # type: ignore[arg-type]
