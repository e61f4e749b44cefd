"""FedCIA: aggregation of collaborative information (Han et al., SIGIR 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.aggregate import BASIS_GRID, FIXED_POINT, Aggregate, from_fixed
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows, Update
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.settings import FedMFSettings
from perfedrec.methods.federated.spectral import nystroem
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.flat import apply_per_client
from perfedrec.privacy.labels import Labels


class CollaborativeSettings(Settings):
    """Options of the aggregation of similarities."""

    weight: float = Field(
        1.0,
        ge=0,
        description="weight of what is in the mean of the clients' item similarities and not in the similarities of "
        "their mean item vectors; 1: all of it; 0: item vectors are averaged",
    )


class FedCIASettings(FedMFSettings):
    """Options of FedCIA."""

    collaborative: CollaborativeSettings = CollaborativeSettings()


class FedCIA(FedMF[ServerState, Broadcast, ClientState]):
    """Clients' item similarities ``S_u = Q_u Q_u^T`` are averaged, not their item vectors ``Q_u``, and each client
    fits its item vectors to the mean. Vectors that mean the same in another direction are not averaged away.

    No similarity matrix leaves a client. Client u starts from the shared vectors ``Q`` and changes them by ``D_u``, and
    the mean of all ``S_u`` is ``(Q + D)(Q + D)^T + C`` with the mean change ``D`` and the covariance ``C`` of the
    changes. So a client sends the rows of ``D_u`` that it changed, and those of ``D_u D_u^T Q``, from which the server
    has ``C Q`` and with it an approximation of ``C`` (Nystroem). What it sends follows from ``D_u`` alone: who sees it
    learns no more than in FedMF. Both are sums, which secure aggregation can take.

    Departs from the paper: every user is a client of its own, instead of a hundred clients with many users each.
    Instead of a hundred steps towards the mean, clients start from its best factor with d columns, turned so that it is
    nearest to ``Q + D`` and fits the clients' user vectors; rows that nobody changed stay. The server's optimiser takes
    the step to it; FedAvg with step 1 takes all of it. The variant without parameters (a graph filter on each client)
    is left out: the similarity matrix of a single user is its list of items.
    Written from the paper's abstract and from public code, not from its full text.
    """

    Options = FedCIASettings
    settings: FedCIASettings

    def n_groups(self, state: ServerState) -> int:
        return 2 if self.phase(state) == TRAIN.name else 1

    def hand_over(
        self, update: Update, broadcast: Broadcast, rows: Rows, labels: Labels, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        segments, items, deltas = update.segments, update.items, update.deltas
        assert segments is not None
        assert items is not None
        assert deltas is not None
        spread = spread_rows(deltas, probe(broadcast)[items], segments, rows.n_users)
        both = replace(
            update,
            segments=segments.repeat(2),
            items=items.repeat(2),
            deltas=torch.cat([deltas, spread]),
            tables=torch.cat([torch.zeros_like(items), torch.ones_like(items)]),
        )
        return super().hand_over(both, broadcast, rows, labels, client_state, key)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> None:
        m, weight = aggregate.n_items, self.group_weights(state, aggregate).sum()
        place = int(torch.searchsorted(aggregate.keys, m))
        touched, tables = aggregate.keys[:place], torch.zeros(2 * m, state.items.shape[1], device=state.items.device)
        tables.index_copy_(0, aggregate.keys, from_fixed(aggregate.sums) / weight)
        mean, image = tables.split(m)
        columns = probe(state)
        with one_thread():
            covariance = nystroem(columns, image - mean @ (mean.T @ columns))
        new = factor(state.items + mean, covariance * self.settings.collaborative.weight**0.5)
        change = (new - state.items)[touched].to(torch.float64) * (float(weight) * FIXED_POINT)
        super().server_step(state, replace(aggregate, keys=touched, sums=change))


def probe(record: ServerState | Broadcast) -> Tensor:
    """[m, d] the columns that similarities are multiplied by: the shared item vectors or, where sums are taken in a
    basis, their part in it."""
    if record.basis is None:
        return record.items
    basis = record.basis.to(torch.float32) / BASIS_GRID
    with one_thread():
        return basis @ (basis.T @ record.items)


def spread_rows(deltas: Tensor, columns: Tensor, segments: Tensor, n: int) -> Tensor:
    """[T, d] the rows of ``D_u D_u^T Q`` for the changes ``deltas`` [T, d] of the clients ``segments`` [T] and the rows
    ``columns`` [T, d] of ``Q``."""
    return apply_per_client(lambda _, padded: padded[0] @ (padded[0].mT @ padded[1]), [deltas, columns], segments, n)


def factor(vectors: Tensor, covariance: Tensor) -> Tensor:
    """[m, d] the factor ``F`` for which ``F F^T`` is nearest to ``V V^T + C C^T``; of all such factors the one nearest
    to V. V are ``vectors`` [m, d], and C [m, k] is a factor of the ``covariance``."""
    whole, target = torch.cat([vectors, covariance], dim=1).to(torch.float64), vectors.to(torch.float64)
    with one_thread():
        best = whole @ torch.linalg.eigh(whole.T @ whole)[1][:, -vectors.shape[1] :]
        left, _, right = torch.linalg.svd(best.T @ target)
        turned: Tensor = best @ (left @ right)
    return turned.to(torch.float32)
