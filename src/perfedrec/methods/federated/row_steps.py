"""What a round applies of the sum of its changes: the largest ones that wait in a bank, and none above a bound.

Both are parts of HiCS, "hierarchical gradient clipping with sparsified updating" (Yuan, Nguyen, Yin, "Manipulating
Federated Recommender Systems: Poisoning with Synthetic Users and Its Countermeasures", SIGIR 2023). They need only the
sum of a round, so they also work where nobody sees what a single client sends.

Departs from the paper, of which only the abstract and a summary were at hand: the bound on a client's rows is
``defence.row_clip``; bounds are stated, not found from data; the bank has a table for each table of the server, and
keeps mean changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.robust import BELOW
from perfedrec.methods.federated.defence import DefenceSettings
from perfedrec.methods.federated.tables import means


def applied(bank: Tensor | None, aggregate: Aggregate, weights: Tensor, defence: DefenceSettings) -> Aggregate:
    """What a round applies of its ``aggregate``: what the ``bank`` releases (:func:`released`), each row within
    ``defence.row_step`` (:func:`bounded`)."""
    return bounded(released(bank, aggregate, weights, defence.sparse), weights, defence.row_step)


def empty_bank(items: Tensor, n_tables: int, share: float | None) -> Tensor | None:
    """[K m, d] zeros for ``n_tables`` tables (K is at least 1) of the shape of ``items`` [m, d]; ``None`` where no
    ``share`` of the changes is applied."""
    return None if share is None else items.new_zeros(max(n_tables, 1) * items.shape[0], items.shape[1])


def released(bank: Tensor | None, aggregate: Aggregate, weights: Tensor, share: float | None) -> Aggregate:
    """Add a round's ``aggregate`` to the ``bank`` [K m, d] in place, take the largest changes out of it, and return
    these in place of the round's.

    The bank has the mean changes of the clients of each of K tables, ``weights`` [K] are those of the round's clients.
    Of the items whose change over all tables is not 0 the ``share`` with the largest norm is taken, at least one item;
    of equal ones those with lower numbers. What waits for a table without clients in this round goes on waiting.
    ``None``: no bank, and the aggregate as it is.
    """
    if bank is None or share is None:
        return aggregate
    n_items, present = aggregate.n_items, weights > 0
    known = present[aggregate.keys // n_items]
    mine = replace(aggregate, keys=aggregate.keys[known], sums=aggregate.sums[known])
    bank.index_add_(0, mine.keys, means(mine, weights))
    shares = (weights / weights.sum())[:, None, None]
    sizes = torch.linalg.vector_norm((bank.view(-1, n_items, bank.shape[1]) * shares).sum(0), dim=1)
    n = -(-int((sizes > 0).sum()) * share // 1)
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[sizes.argsort(descending=True, stable=True)[: max(int(n), 1)]] = True
    keys = (bank.any(1).view(-1, n_items) & chosen & present[:, None]).flatten().nonzero().squeeze(1)
    sums = bank[keys].to(torch.float64) * (weights[keys // n_items].to(torch.float64) * FIXED_POINT)[:, None]
    bank[keys] = 0.0
    return replace(aggregate, keys=keys, sums=sums)


def bounded(aggregate: Aggregate, weights: Tensor, bound: float | None) -> Aggregate:
    """The ``aggregate`` with each row shortened so that the mean change of its table, whose clients have the
    ``weights`` [K], has a norm of at most ``bound``; then the mean over all tables has so too. ``None``: no bound.

    A plain server moves a row by its learning rate times this at most. FedAdam divides by the changes that it is used
    to, so there it limits how much a single round counts. Rows within the bound stay as they are, bit for bit.
    """
    if bound is None:
        return aggregate
    norms = torch.linalg.vector_norm(means(aggregate, weights), dim=1).to(torch.float64)
    over = norms > bound
    factors = torch.where(over, bound * BELOW / norms, 1.0)
    return replace(aggregate, sums=aggregate.sums * factors[:, None])
