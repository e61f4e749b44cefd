"""The server's tables: their optimiser's moments, running averages, and the step on the rows that clients touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, distinct, from_fixed
from perfedrec.methods.federated.settings import ServerSettings
from perfedrec.nn.optim import server_step


@dataclass(frozen=True)
class Moments:
    """The moments of a server optimiser, both of the shape of the table that it optimises."""

    first: Tensor
    second: Tensor

    @staticmethod
    def zeros(like: Tensor) -> Moments:
        return Moments(torch.zeros_like(like), torch.zeros_like(like))


@dataclass(frozen=True)
class Average:
    """The running average of a table over rounds, updated only where the table changes.

    ``values`` [m, d] are the averages as of the end of round ``rounds`` [m]. A row is constant while nobody touches it,
    so that its average follows in closed form.
    """

    values: Tensor
    rounds: Tensor

    @staticmethod
    def start(table: Tensor) -> Average:
        return Average(table.clone(), torch.zeros(table.shape[0], dtype=torch.int64, device=table.device))

    def advance(self, table: Tensor, rows: Tensor, upto: int, decay: float) -> None:
        """Update the averages of ``rows`` [r] of the ``table`` to round ``upto``, in place."""
        passed = (upto - self.rounds[rows]).to(torch.float32)[:, None]
        current, values = table.index_select(0, rows), self.values.index_select(0, rows)
        self.values.index_copy_(0, rows, current + decay**passed * (values - current))
        self.rounds.index_fill_(0, rows, upto)

    def as_of(self, table: Tensor, upto: int, decay: float) -> Tensor:
        """[m, d] the averages of all rows as of round ``upto``."""
        copy = Average(self.values.clone(), self.rounds.clone())
        copy.advance(table, torch.arange(table.shape[0], device=table.device), upto, decay)
        return copy.values


def means(aggregate: Aggregate, weights: Tensor) -> Tensor:
    """[U, d] the summed rows divided by the ``weights`` [G] of the clients that contributed to their table."""
    tables = torch.div(aggregate.keys, aggregate.n_items, rounding_mode="floor")
    return from_fixed(aggregate.sums) / weights[tables, None]


def over_tables(keys: Tensor, rows: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """The items [r], ascending, and for each item the sum [r, d] of its ``rows`` [U, d] over all tables. ``keys`` [U]
    are those of the rows."""
    items, inverse = distinct(keys % n_items, n_items)
    return items, rows.new_zeros(items.numel(), rows.shape[1]).index_add_(0, inverse, rows)


def sparse_step(
    settings: ServerSettings, table: Tensor, moments: Moments | None, rows: Tensor, change: Tensor, share: float = 1.0
) -> None:
    """One step of the server's optimiser on the touched ``rows`` [r] of a ``table``, in place.

    ``change`` [r, d] is the weighted mean of the clients' changes. ``share`` scales the server's learning rate.
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
