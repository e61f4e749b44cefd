"""k-means on points whose clusters are known."""

import torch

from perfedrec.core.keys import Key
from perfedrec.nn.clustering import first_centroids, k_means

POINTS = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])


def test_centroids_are_the_means_of_their_members() -> None:
    labels, centroids = k_means(POINTS, torch.tensor([[1.0, 1.0], [9.0, 1.0]]))
    assert labels.tolist() == [0, 0, 1, 1]
    assert centroids.tolist() == [[0.0, 1.0], [10.0, 2.0]]


def test_a_cluster_without_members_keeps_its_centroid() -> None:
    labels, centroids = k_means(POINTS, torch.tensor([[5.0, 1.0], [99.0, 99.0]]))
    assert labels.tolist() == [0, 0, 0, 0]
    assert centroids.tolist() == [[5.0, 1.5], [99.0, 99.0]]


def test_first_centroids_are_spread_and_keyed() -> None:
    first = first_centroids(POINTS, 2, Key(0))
    assert torch.equal(first, first_centroids(POINTS, 2, Key(0)))
    assert {each > 5 for each in first[:, 0].tolist()} == {False, True}
    assert first_centroids(POINTS, 9, Key(0)).shape == (4, 2)
    assert torch.equal(first_centroids(torch.ones(3, 2), 2, Key(0)), torch.ones(2, 2, dtype=torch.float64))
