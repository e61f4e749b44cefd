"""k-means, with the same result on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.threads import one_thread

STEPS = 15  # most clusterings no longer change after ten


def first_centroids(vectors: Tensor, n_clusters: int, key: Key) -> Tensor:
    """[K, d] first centroids, spread over the ``vectors`` [n, d] (k-means++), in float64; K is at most n.

    If all vectors are equal, every centroid is the first of them. The cost grows with the square of K.
    """
    from scipy.cluster.vq import kmeans2  # 8 MB, which runs without clusters do not need

    with _quietly():
        rng, n = np.random.default_rng(key.value), min(n_clusters, vectors.shape[0])
        found, _ = kmeans2(_array(vectors), n, iter=1, minit="++", rng=rng)
    return torch.from_numpy(found).to(vectors.device)


def k_means(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """k-means over ``vectors`` [n, d] from the first ``centroids`` [K, d]: labels [n], and centroids [K, d] in float64.

    A cluster without members keeps its centroid, and can get members in a later step.
    """
    from scipy.cluster.vq import kmeans2

    with _quietly():
        found, labels = kmeans2(_array(vectors), _array(centroids), iter=STEPS, minit="matrix")
    return torch.from_numpy(labels.astype(np.int64)).to(vectors.device), torch.from_numpy(found).to(vectors.device)


def _array(vectors: Tensor) -> np.ndarray:
    return vectors.detach().to("cpu", torch.float64).numpy()


@contextmanager
def _quietly() -> Iterator[None]:
    """On one thread, because a second thread pool would slow torch's down; without warnings of empty clusters."""
    with one_thread(), catch_warnings():
        simplefilter("ignore")
        yield
