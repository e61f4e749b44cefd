"""CoLR: low-rank updates in directions that all clients share (Nguyen et al., WWW 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.keys import Key, normal
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows, Spec, Update
from perfedrec.methods.federated.base import Federated, LocalBatch
from perfedrec.methods.federated.local import Loss, Parameters
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.spectral import orthonormal
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.segments import dot
from perfedrec.privacy.labels import Labels


class LowRankSettings(Settings):
    """Options of the low-rank updates."""

    rank: int = Field(16, ge=1, description="r, the numbers that a client sends for each item, instead of d")


class CoLRSettings(FederatedSettings):
    """Options of CoLR."""

    update: LowRankSettings = LowRankSettings()

    @model_validator(mode="after")
    def _lower(self) -> CoLRSettings:
        if self.update.rank > self.model.embedding_dim:
            raise ValueError(
                f"update.rank is {self.update.rank}, and vectors have {self.model.embedding_dim} numbers; expected "
                "update.rank of at most model.embedding_dim"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class CoLRState(ServerState):
    """Adds the orthonormal ``directions`` [r, d] of the next round."""

    directions: Tensor


@dataclass(frozen=True, kw_only=True)
class CoLRBroadcast(Broadcast):
    """Adds the ``directions`` [r, d] of the round."""

    directions: Tensor

    def download_bytes(self, together: bool = False) -> int:
        return super().download_bytes(together) + 4 * self.directions.numel()


class CoLR(Federated[CoLRState, CoLRBroadcast, ClientState]):
    """``s_ui = p_u . q_i``. A client changes the item table by ``A_u B`` only: ``B`` [r, d] is random, new in every
    round and the same for all clients; ``A_u`` [m, r] is what a client trains, starting from 0, and sends. The sum over
    clients of ``A_u B`` is the sum of ``A_u`` times ``B``, so that an upload has r numbers for each item instead of d,
    and secure sums stay sums (section 4).

    The rows of ``B`` are orthonormal, as in the authors' public code, there times a factor that is part of the learning
    rate here. A step on ``A_u`` is then a step on the item rows, projected onto the rows of ``B``.

    Departs from the paper: clients receive the whole table instead of the last sum of ``A_u``, because they do not take
    part in every round; changes are divided by the number of clients, not by the number that touched an item; the
    server's optimiser is an option, the mean in the paper; one negative per label instead of four; all clients have the
    same rank (no SCoLR).
    """

    Options = CoLRSettings
    settings: CoLRSettings
    broadcast_type = CoLRBroadcast

    def init(self, spec: Spec, key: Key) -> CoLRState:
        common = self._init(spec, key)
        return CoLRState(**vars(common), directions=self.directions(common.items, key))

    def directions(self, items: Tensor, key: Key) -> Tensor:
        """[r, d] orthonormal random directions, for a table ``items`` [m, d]."""
        numbers = torch.arange(items.shape[1], device=items.device)
        return orthonormal(normal(key.fold("directions").spread(numbers), self.settings.update.rank)).T.contiguous()

    def broadcast(self, state: CoLRState, users: Tensor) -> CoLRBroadcast:
        return CoLRBroadcast(**vars(super().broadcast(state, users)), directions=state.directions)

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(private[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return private @ items.T

    def local_loss(self, batch: LocalBatch[CoLRBroadcast], parameters: Parameters) -> Tensor:
        """The loss at the same rows; its gradient for them lies in the directions of the round."""
        positives, negatives = (
            within(rows, batch.broadcast.directions) for rows in (parameters.positives, parameters.negatives)
        )
        return super().local_loss(batch, replace(parameters, positives=positives, negatives=negatives))

    def loss_name(self) -> Loss | None:
        return None

    def hand_over(
        self,
        update: Update,
        broadcast: CoLRBroadcast,
        rows: Rows,
        labels: Labels,
        client_state: ClientState,
        key: Key,
    ) -> tuple[Update, ClientState]:
        assert update.deltas is not None
        return replace(update, deltas=coordinates(update.deltas, broadcast.directions)), client_state

    def lift(self, state: CoLRState, phase: str, aggregate: Aggregate) -> Aggregate:
        aggregate = super().lift(state, phase, aggregate)
        if phase != TRAIN.name or not aggregate.clients:
            return aggregate
        return replace(aggregate, sums=aggregate.sums @ state.directions.to(torch.float64))

    def server(self, state: CoLRState, phase: str, aggregate: Aggregate, key: Key) -> CoLRState:
        state = super().server(state, phase, aggregate, key)
        return replace(state, directions=self.directions(state.items, key))

    def embedding(self, broadcast: CoLRBroadcast, rows: Rows, client_state: ClientState) -> Embedding | None:
        return Embedding(client_state.private, broadcast.items)

    def user_vectors(self, broadcast: CoLRBroadcast, rows: Rows, client_state: ClientState) -> Tensor | None:
        """[B, r] the part of the users' vectors that uploads can show: that in the directions of the round."""
        return coordinates(client_state.private, broadcast.directions)


def coordinates(rows: Tensor, directions: Tensor) -> Tensor:
    """[T, r] the coordinates of ``rows`` [T, d] in orthonormal ``directions`` [r, d]."""
    return rows @ directions.T


def within(rows: Tensor, directions: Tensor) -> Tensor:
    """The same ``rows`` [T, d], with gradients that are projected onto the ``directions`` [r, d]."""
    given = rows.detach()
    return given + coordinates(rows - given, directions) @ directions
