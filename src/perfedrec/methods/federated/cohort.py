"""The clients of a round: their selection, their weights in the sums, and clusters of similar users."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.compiled import usable
from perfedrec.core.keys import Key, bits, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.types import Rows
from perfedrec.methods.federated.settings import SelectionSettings, ServerSettings
from perfedrec.nn.clustering import first_centroids, k_means


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
    sizes = np.bincount(labels.numpy(force=True))
    size, single = min(n_clients, labels.numel()), np.float32
    shares = sizes.astype(single) * single(size / labels.numel())
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas.astype(single) - shares, kind="stable")[: size - int(quotas.sum())]] += 1
    # Few users have a draw so small that they can be among the first of their cluster: only these are sorted.
    small = ((quotas + 8 * np.sqrt(quotas + 4)) / sizes.clip(min=1) * 2.0**48).astype(np.int64)
    draws, near = _first_draws(labels, small, key)
    if (np.bincount(draws >> 48, minlength=sizes.size) < quotas).any():
        draws, near = _first_draws(labels, np.full_like(small, 1 << 48), key)
    order = np.argsort(draws)  # by cluster, in random order within each
    starts = np.searchsorted(draws[order], np.arange(sizes.size) << 48)
    chosen = [order[start : start + quota] for start, quota in zip(starts, quotas, strict=True)]
    return torch.from_numpy(near[np.concatenate(chosen)]).to(labels.device)


def _first_draws(labels: Tensor, small: NDArray[np.int64], key: Key) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The users whose draw of 48 bits is less than what is ``small`` [K] in their cluster, ascending: their draws with
    the cluster in the bits above, and their numbers."""
    if usable(labels):
        from perfedrec.methods.federated import kernels

        draws, near = np.empty(labels.numel(), np.int64), np.empty(labels.numel(), np.int64)
        count = kernels.first_draws(key.value & ((1 << 64) - 1), labels.numpy(), small, draws, near)
        return draws[:count], near[:count]
    words = bits(key.spread(torch.arange(labels.numel(), device=labels.device)), 1).squeeze(1) & ((1 << 48) - 1)
    near_ = (words < torch.from_numpy(small).to(labels.device)[labels]).nonzero().squeeze(1)
    return ((labels[near_] << 48) | words[near_]).numpy(force=True), near_.numpy(force=True)


def cluster(vectors: Tensor, n_clusters: int, previous: Tensor | None, key: Key) -> tuple[Tensor, Tensor]:
    """k-means over all users: labels [n] and centroids [K, d] for the directions of ``vectors`` [n, d].

    It starts from the ``previous`` centroids, so that a cluster keeps its number and its model from one clustering to
    the next. Vectors are scaled to unit length first, because length reflects activity rather than taste.
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    labels, centroids = k_means(unit, first_centroids(unit, n_clusters, key) if previous is None else previous)
    return labels, centroids.to(torch.float32)


def weights(rows: Rows, server: ServerSettings) -> Tensor:
    """[B] the weight of each client in the sums: 1, or its number of interactions."""
    if server.weighting == "interactions":
        return rows.counts.to(torch.float32)
    return torch.ones(rows.n_users, device=rows.users.device)
