"""Parts that federated algorithms share: a cohort, its weights and its release, clusters of users, tables of groups,
and the server's sparse step."""

from __future__ import annotations

from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, distinct, from_fixed
from perfedrec.core.keys import Key, bits, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows
from perfedrec.methods.federated.settings import SelectionSettings, ServerSettings
from perfedrec.nn.optim import server_step
from perfedrec.privacy.ledger import Release
from perfedrec.privacy.mechanisms import compose, mechanisms_of
from perfedrec.privacy.settings import PrivacySettings

STEPS = 15  # of k-means; most clusterings stand still after ten


def select(n_users: int, selection: SelectionSettings, key: Key, device: torch.device) -> Tensor:
    """A cohort of users, all alike: of a fixed size, or each user by a coin of its own (Poisson)."""
    size = selection.n_clients_per_round
    if selection.sampling == "poisson":
        everyone = torch.arange(n_users, device=device)
        return everyone[uniform(key.spread(everyone), 1).squeeze(1) < size / n_users]
    return choose(n_users, size, key).to(device)


def select_proportional(labels: Tensor, n_clients: int, key: Key) -> Tensor:
    """A cohort with each cluster's share of the population (largest remainders), uniform within a cluster."""
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
    """k-means over all users: labels [n] and centroids [K, d] for unit-length ``vectors`` [n, d].

    Starts from the ``previous`` centroids, so that a cluster keeps its number and its model from one clustering to the
    next. Directions are clustered, not lengths: a vector's length tells activity rather than taste.
    """
    unit = torch.nn.functional.normalize(vectors, dim=1).to("cpu", torch.float64).numpy()
    rng = np.random.default_rng(key.value)
    with one_thread(), catch_warnings():  # a second pool of threads would be in the way of torch's for rounds
        # An empty cluster keeps its centroid, and gets members when somebody fits; where all users are alike, the first
        # of them is every centroid.
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


def training_release(privacy: PrivacySettings, selection: SelectionSettings, rounds: int, n_users: int) -> Release:
    """What so many rounds of training let out of the clients, for the ledger."""
    cap = rounds if selection.max_participations is None else min(rounds, selection.max_participations)
    rate = min(1.0, selection.n_clients_per_round / n_users)
    return Release("training", rounds, compose(mechanisms_of(privacy, "train")), cap, selection.sampling, rate)


@dataclass(frozen=True)
class Moments:
    """Moments of a server optimiser, of the shape of what it optimises."""

    first: Tensor
    second: Tensor

    @staticmethod
    def zeros(like: Tensor) -> Moments:
        return Moments(torch.zeros_like(like), torch.zeros_like(like))


@dataclass(frozen=True)
class Average:
    """Running average of a table over rounds, brought up to date only where the table changes.

    ``values`` [m, d] as of the end of round ``rounds`` [m] of each row; a row is constant between two touches, so that
    its average follows in closed form.
    """

    values: Tensor
    rounds: Tensor

    @staticmethod
    def start(table: Tensor) -> Average:
        return Average(table.clone(), torch.zeros(table.shape[0], dtype=torch.int64, device=table.device))

    def advance(self, table: Tensor, rows: Tensor, upto: int, decay: float) -> None:
        """Average ``rows`` [r] of the ``table`` over the rounds up to ``upto``, in place."""
        passed = (upto - self.rounds[rows]).to(torch.float32)[:, None]
        current, values = table.index_select(0, rows), self.values.index_select(0, rows)
        self.values.index_copy_(0, rows, current + decay**passed * (values - current))
        self.rounds.index_fill_(0, rows, upto)

    def as_of(self, table: Tensor, upto: int, decay: float) -> Tensor:
        """[m, d] the average of all rows over the rounds up to ``upto``."""
        copy = Average(self.values.clone(), self.rounds.clone())
        copy.advance(table, torch.arange(table.shape[0], device=table.device), upto, decay)
        return copy.values


def means(aggregate: Aggregate, weights: Tensor) -> Tensor:
    """[U, d] the summed rows of each table over the ``weights`` [G] of those who contributed to it."""
    tables = torch.div(aggregate.keys, aggregate.n_items, rounding_mode="floor")
    return from_fixed(aggregate.sums) / weights[tables, None]


def over_tables(keys: Tensor, rows: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """Items [r], ascending, and the sums [r, d] over all tables of their ``rows`` [U, d], which ``keys`` [U] name."""
    items, inverse = distinct(keys % n_items, n_items)
    return items, rows.new_zeros(items.numel(), rows.shape[1]).index_add_(0, inverse, rows)


def sparse_step(
    settings: ServerSettings, table: Tensor, moments: Moments | None, rows: Tensor, change: Tensor, share: float = 1.0
) -> None:
    """One step of the server's optimiser on the touched ``rows`` [r] of a ``table``, in place.

    ``change`` [r, d] is the weighted mean of the clients' changes, ``share`` scales the server's learning rate.
    """
    first = None if moments is None else moments.first.index_select(0, rows)
    second = None if moments is None else moments.second.index_select(0, rows)
    betas = (settings.beta1, settings.beta2)
    rate = settings.learning_rate * share
    step, first, second = server_step(settings.optimizer, change, first, second, rate, betas, settings.epsilon)
    table.index_add_(0, rows, step)
    if moments is not None and first is not None and second is not None:
        moments.first.index_copy_(0, rows, first)
        moments.second.index_copy_(0, rows, second)
