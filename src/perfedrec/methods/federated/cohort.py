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
    size = min(n_clients, labels.numel())
    sizes, quotas = _quotas(labels, size)
    # Few users have a draw so small that they can be among the first of their cluster: only these are sorted.
    near = (quotas + 8 * np.sqrt(quotas + 4)) / np.maximum(sizes, 1)
    chosen = _first_of_each(labels, quotas, near, size, key)
    if chosen.size < size:
        chosen = _first_of_each(labels, quotas, np.ones(sizes.size), size, key)
    return torch.from_numpy(chosen).to(labels.device)


def _quotas(labels: Tensor, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[K] sizes of the clusters, and their parts of a cohort of this ``size``."""
    share = np.float32(size / labels.numel())
    if usable(labels):
        from perfedrec.methods.federated import kernels

        sizes = np.zeros(int(labels.max()) + 1, np.int64)
        quotas = np.empty_like(sizes)
        if kernels.find_quotas(labels.numpy(), share, size, sizes, np.empty(sizes.size, np.float32), quotas):
            return sizes, quotas
    sizes = np.bincount(labels.numpy(force=True))
    exact = sizes.astype(np.float32) * share
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas.astype(np.float32) - exact, kind="stable")[: size - int(quotas.sum())]] += 1
    return sizes, quotas


def _first_of_each(
    labels: Tensor, quotas: NDArray[np.int64], near: NDArray[np.float64], size: int, key: Key
) -> NDArray[np.int64]:
    """The users with the smallest draws of each cluster, as many as its quota [K], by cluster. Only users whose draw is
    among the share ``near`` [K] of the smallest ones are looked at; with too few of them there are less than ``size``
    users."""
    small = (near * 2.0**48).astype(np.int64)
    if usable(labels):
        from perfedrec.methods.federated import kernels

        draws, users = np.empty(labels.numel(), np.int64), np.empty(labels.numel(), np.int64)
        count = kernels.first_draws(key.value & ((1 << 64) - 1), labels.numpy(), small, draws, users)
        chosen, order = np.empty(size, np.int64), np.argsort(draws[:count])
        return chosen[: kernels.first_of_each(quotas.copy(), (order, draws, users), chosen)]
    words = bits(key.spread(torch.arange(labels.numel(), device=labels.device)), 1).squeeze(1) & ((1 << 48) - 1)
    found = (words < torch.from_numpy(small).to(labels.device)[labels]).nonzero().squeeze(1)
    draws = ((labels[found] << 48) | words[found]).numpy(force=True)
    order = np.argsort(draws)
    starts = np.searchsorted(draws[order], np.arange(quotas.size) << 48)
    firsts = [order[start : start + quota] for start, quota in zip(starts, quotas, strict=True)]
    return np.asarray(found.numpy(force=True)[np.concatenate(firsts)])


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
