"""The clients of a round: their selection, their weights in the sums, and clusters of similar users."""

from __future__ import annotations

import torch
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
    sizes = torch.bincount(labels)
    shares = sizes * (min(n_clients, labels.numel()) / labels.numel())
    quotas = shares.floor().to(torch.int64)
    rest = min(n_clients, labels.numel()) - int(quotas.sum())
    quotas[(shares - quotas).argsort(descending=True, stable=True)[:rest]] += 1
    # Few users have a draw so small that they can be among the first of their cluster: only these are sorted.
    small = ((quotas + 8 * (quotas + 4).sqrt()) / sizes.clamp(min=1) * 2.0**48).to(torch.int64)
    draws, near = _first_draws(labels, small, key)
    found = torch.bincount(labels[near], minlength=sizes.numel())
    if bool((found < quotas).any()):
        draws, near = _first_draws(labels, torch.full_like(small, 1 << 48), key)
        found = sizes
    members = near[draws.argsort()]  # by cluster, in random order within each
    places = torch.arange(members.numel(), device=labels.device) - (found.cumsum(0) - found)[labels[members]]
    return members[places < quotas[labels[members]]]


def _first_draws(labels: Tensor, small: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """The users whose draw of 48 bits is less than what is ``small`` [K] in their cluster, ascending, and their draws
    with the cluster in the bits above."""
    if usable(labels, small):
        from perfedrec.methods.federated import kernels

        draws, near = torch.empty_like(labels), torch.empty_like(labels)
        count = kernels.first_draws(
            key.value & ((1 << 64) - 1), *(each.numpy() for each in (labels, small, draws, near))
        )
        return draws[:count], near[:count]
    draws = bits(key.spread(torch.arange(labels.numel(), device=labels.device)), 1).squeeze(1) & ((1 << 48) - 1)
    near = (draws < small[labels]).nonzero().squeeze(1)
    return (labels[near] << 48) | draws[near], near


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
