"""The clients of a round: their selection, their weights in the sums, and clusters of similar users."""

from __future__ import annotations

from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from perfedrec.core.keys import Key, bits, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows
from perfedrec.methods.federated.settings import SelectionSettings, ServerSettings

STEPS = 15  # iterations of k-means; most clusterings no longer change after ten


def select(n_users: int, selection: SelectionSettings, key: Key, device: torch.device) -> Tensor:
    """A cohort of users, each with the same probability: of a fixed size, or by Poisson sampling (each user
    independently)."""
    size = selection.n_clients_per_round
    if selection.sampling == "poisson":
        everyone = torch.arange(n_users, device=device)
        return everyone[uniform(key.spread(everyone), 1).squeeze(1) < size / n_users]
    return choose(n_users, size, key).to(device)


def select_proportional(labels: Tensor, n_clients: int, key: Key) -> Tensor:
    """A cohort in which each cluster has its share of the population (largest remainders), uniform within a cluster."""
    sizes = torch.bincount(labels)
    shares = sizes * (min(n_clients, labels.numel()) / labels.numel())
    quotas = shares.floor().to(torch.int64)
    rest = min(n_clients, labels.numel()) - int(quotas.sum())
    quotas[(shares - quotas).argsort(descending=True, stable=True)[:rest]] += 1
    users = torch.arange(labels.numel(), device=labels.device)
    draws = bits(key.spread(users), 1).squeeze(1) & ((1 << 48) - 1)
    members = ((labels << 48) | draws).argsort()  # by cluster, and in random order within each
    places = users - (sizes.cumsum(0) - sizes)[labels[members]]
    return members[places < quotas[labels[members]]]


def cluster(vectors: Tensor, n_clusters: int, previous: Tensor | None, key: Key) -> tuple[Tensor, Tensor]:
    """k-means over all users: labels [n] and centroids [K, d] for the directions of ``vectors`` [n, d].

    It starts from the ``previous`` centroids, so that a cluster keeps its number and its model from one clustering to
    the next. Vectors are scaled to unit length first, because length reflects activity rather than taste.
    """
    unit = torch.nn.functional.normalize(vectors, dim=1).to("cpu", torch.float64).numpy()
    rng = np.random.default_rng(key.value)
    with one_thread(), catch_warnings():  # a second thread pool would slow torch's down
        # Ignored: warnings of empty clusters. Such a cluster keeps its centroid and can get members later. If all users
        # are equal, every centroid is that of the first user.
        simplefilter("ignore")
        if previous is None:
            centroids, _ = kmeans2(unit, min(n_clusters, unit.shape[0]), iter=1, minit="++", rng=rng)
        else:
            centroids = previous.to("cpu", torch.float64).numpy()
        centroids, labels = kmeans2(unit, centroids, iter=STEPS, minit="matrix")
    return torch.from_numpy(labels.astype(np.int64)).to(vectors.device), torch.from_numpy(centroids).to(
        vectors.device, torch.float32
    )


def weights(rows: Rows, server: ServerSettings) -> Tensor:
    """[B] the weight of each client in the sums: 1, or its number of interactions."""
    if server.weighting == "interactions":
        return rows.counts.to(torch.float32)
    return torch.ones(rows.n_users, device=rows.users.device)
