"""Methods whose server keeps several item tables, and mixes one from them for each user, by vectors that users
report."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key
from perfedrec.core.types import Embedding, Rows, Spec
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.privacy.settings import PrivacySettings


@dataclass(frozen=True, kw_only=True)
class MixedState(ServerState):
    """Adds ``reports`` [n, L, d], the last report of each user; zeros for a user who has sent none."""

    reports: Tensor


@dataclass(frozen=True, kw_only=True)
class MixedBroadcast(Broadcast):
    """Adds the tables' ``offsets`` [K m, d], and ``weights`` [B, K] by which each user's own table is made from
    them."""

    weights: Tensor = field(metadata={"per": "user"})
    offsets: Tensor

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives: the table that was made for it, and the shared one. With ``together`` the
        bytes of a node, which receives all tables and its users' weights."""
        if together:
            return 4 * (self.items.numel() + self.offsets.numel() + self.weights.numel())
        return 8 * self.items.numel()


S = TypeVar("S", bound=MixedState)
B = TypeVar("B", bound=MixedBroadcast)


class Mixed(Federated[S, B, ClientState]):
    """User u's table has the rows ``t_ui = q_i + sum_k w_uk o_ki``: shared vectors plus a mixture of the offsets of K
    tables. A method says how users are compared (:meth:`mixing_weights`). Scores are products with the user vectors of
    :meth:`embedding`."""

    broadcast_type = MixedBroadcast

    @property
    def n_reported(self) -> int:
        """L, the number of vectors in a user's report."""
        return 1

    @abstractmethod
    def mixing_weights(self, state: S, users: Tensor) -> Tensor:
        """[B, K] the weights of the tables for ``users`` [B], of whom some may be NEWCOMER."""

    def _init(self, spec: Spec, key: Key) -> MixedState:
        common = super()._init(spec, key)
        return MixedState(
            **vars(common), reports=common.items.new_zeros(spec.n_users, self.n_reported, common.items.shape[1])
        )

    def broadcast(self, state: S, users: Tensor) -> B:
        assert state.offsets is not None
        common, weights = super().broadcast(state, users), self.mixing_weights(state, users)
        made: B = self.broadcast_type(**vars(common), weights=weights, offsets=state.offsets)  # type: ignore[assignment]
        return made

    def table_rows(self, broadcast: B, items: Tensor, segments: Tensor) -> Tensor:
        tables = torch.arange(broadcast.weights.shape[1], device=items.device) * broadcast.items.shape[0]
        own = functional.embedding_bag(
            items[:, None] + tables, broadcast.offsets, mode="sum", per_sample_weights=broadcast.weights[segments]
        )
        return super().table_rows(broadcast, items, segments) + own

    def contributes_to(self, broadcast: B, rows: Rows, client_state: ClientState) -> Tensor:
        return broadcast.weights.argmax(1)

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        if aggregate.reports is not None and aggregate.report_users is not None:
            state.reports[aggregate.report_users] = aggregate.reports
        return super().server(state, phase, aggregate, key)

    def scores(self, broadcast: B, rows: Rows, client_state: ClientState) -> Tensor:
        scores, own = super().scores(broadcast, rows, client_state), self.embedding(broadcast, rows, client_state).users
        tables = broadcast.offsets.split(broadcast.items.shape[0])
        for weights, offsets in zip(broadcast.weights.T, tables, strict=True):
            scores.addcmul_(weights[:, None], own @ offsets.T)
        return scores

    @abstractmethod
    def embedding(self, broadcast: B, rows: Rows, client_state: ClientState) -> Embedding: ...

    def own_rows(self, broadcast: B, rows: Rows, client_state: ClientState) -> Tensor:
        """[R, d] the vectors of users' own items after local training, from which reports are made."""
        return self.table_rows(broadcast, rows.items, rows.segments) + client_state.rows


def check_reports(name: str, privacy: PrivacySettings) -> None:
    """Raise ValueError if privacy hides what the method ``name`` compares users by."""
    if privacy.sums:
        raise ValueError(f"{name} compares users by their uploads; expected privacy.aggregation = sparse")
    if privacy.randomised_response:
        raise ValueError(f"{name} reports a mean over real items; expected no privacy.randomised_response")
