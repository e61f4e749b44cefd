"""GPFedRec: personalisation guided by a graph of users (Zhang et al., KDD 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Rows, Spec
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.pfedrec import PFedRec
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.segments import segment_sum


class GraphSettings(Settings):
    """Options of the graph of users."""

    n_landmarks: int = Field(
        8, ge=2, description="number of landmarks: typical users, through which all users are compared"
    )
    every: int = Field(10, ge=1, description="number of rounds from one construction of the graph to the next")
    sharpness: float = Field(
        5.0,
        gt=0,
        description="how strongly the most similar landmarks are preferred (inverse temperature of the softmax)",
    )
    learning_rate: float = Field(0.1, ge=0, description="step of a landmark's table, as a share of the server's step")
    guidance: float = Field(
        0.01,
        ge=0,
        description="weight of the penalty that keeps a client's rows near the vectors that the graph suggests",
    )


class GPFedRecSettings(FederatedSettings):
    """Options of GPFedRec."""

    graph: GraphSettings = GraphSettings()

    @model_validator(mode="after")
    def _visible(self) -> GPFedRecSettings:
        if self.privacy.sums:
            raise ValueError("gpfedrec compares users by their uploads; expected privacy.aggregation = sparse")
        if self.privacy.randomised_response:
            raise ValueError("gpfedrec reports a mean over real items; expected no privacy.randomised_response")
        return self


@dataclass(frozen=True, kw_only=True)
class LandmarkState(ServerState):
    """Adds ``reports`` [n, 1, d], the last report of each user, and ``landmarks`` [K, d]; each landmark has one of the
    tables beside the shared one."""

    reports: Tensor
    landmarks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LandmarkBroadcast(Broadcast):
    """Adds the tables' ``offsets`` [K m, d], and ``weights`` [B, K] by which each user's own table is made from
    them."""

    weights: Tensor = field(metadata={"per": "user"})
    offsets: Tensor

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives: the table that was made for it, and the shared one. With ``together`` the
        bytes of a node, which receives the landmarks' tables and its users' weights."""
        if together:
            return 4 * (self.items.numel() + self.offsets.numel() + self.weights.numel())
        return 8 * self.items.numel()


class GPFedRec(PFedRec[LandmarkState, LandmarkBroadcast, ClientState]):
    """The server compares users by the item vectors that they upload, and gives each user an item table of its own: the
    mean over its neighbours in the graph of users (equations 6 to 8). A penalty keeps a client's rows near this table.

    Departs from the paper: the similarity of two users goes through ``K`` landmarks, ``sim(u, v) ~ sum_k a_uk a_vk``
    (Nystroem), so that the server holds K tables instead of n, and uploads can be summed; users are compared by the
    mean of their items' protected vectors instead of whole tables; score functions are linear; the server's optimiser
    is an option.
    """

    Options = GPFedRecSettings
    settings: GPFedRecSettings
    broadcast_type = LandmarkBroadcast

    def n_tables(self) -> int:
        return self.settings.graph.n_landmarks

    def table_share(self, state: LandmarkState) -> float:
        return 0.0 if state.landmarks is None else self.settings.graph.learning_rate

    def init(self, spec: Spec, key: Key) -> LandmarkState:
        common = self._init(spec, key)
        reports = common.items.new_zeros(spec.n_users, 1, common.items.shape[1])
        return LandmarkState(**vars(common), reports=reports)

    def broadcast(self, state: LandmarkState, users: Tensor) -> LandmarkBroadcast:
        assert state.offsets is not None
        weights = torch.full((users.numel(), self.n_tables()), 1 / self.n_tables(), device=users.device)
        if state.landmarks is not None:
            similar = functional.normalize(state.reports[users.clamp(min=0), 0], dim=1) @ state.landmarks.T
            weights = (self.settings.graph.sharpness * similar).softmax(1)
            weights[users == NEWCOMER] = 1 / self.n_tables()
        groups, offsets = self.groups(state, users), state.offsets
        return LandmarkBroadcast(items=state.items, dense=state.dense, groups=groups, weights=weights, offsets=offsets)

    def table_rows(self, broadcast: LandmarkBroadcast, items: Tensor, segments: Tensor) -> Tensor:
        tables = torch.arange(broadcast.weights.shape[1], device=items.device) * broadcast.items.shape[0]
        own = functional.embedding_bag(
            items[:, None] + tables, broadcast.offsets, mode="sum", per_sample_weights=broadcast.weights[segments]
        )
        return super().table_rows(broadcast, items, segments) + own

    def penalty(
        self, received: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: ClientState
    ) -> Tensor:
        pulled = received.new_zeros(client_state.private.shape[0]).index_add(0, segments, delta.square().sum(1))
        return pulled * self.settings.graph.guidance

    def contributes_to(self, broadcast: LandmarkBroadcast, rows: Rows, client_state: ClientState) -> Tensor:
        return broadcast.weights.argmax(1)

    def report(self, broadcast: LandmarkBroadcast, rows: Rows, client_state: ClientState, key: Key) -> Tensor:
        own = self.table_rows(broadcast, rows.items, rows.segments) + client_state.rows
        mean = segment_sum(own, rows.segments, rows.n_users) / rows.counts.clamp(min=1)[:, None]
        return mean[:, None]

    def server(self, state: LandmarkState, phase: str, aggregate: Aggregate, key: Key) -> LandmarkState:
        graph = self.settings.graph
        if aggregate.reports is not None and aggregate.report_users is not None:
            state.reports[aggregate.report_users] = aggregate.reports
        state = super().server(state, phase, aggregate, key)
        if state.round % graph.every:
            return state
        _, landmarks = cohort.cluster(state.reports[:, 0], graph.n_landmarks, state.landmarks, key.fold("graph"))
        return replace(state, landmarks=landmarks)

    def scores(self, broadcast: LandmarkBroadcast, rows: Rows, client_state: ClientState) -> Tensor:
        scores, own = super().scores(broadcast, rows, client_state), client_state.private[:, :-1]
        tables = broadcast.offsets.split(broadcast.items.shape[0])
        for weights, offsets in zip(broadcast.weights.T, tables, strict=True):
            scores.addcmul_(weights[:, None], own @ offsets.T)
        return scores

    def embedding(self, broadcast: LandmarkBroadcast, rows: Rows, client_state: ClientState) -> Embedding:
        return Embedding(client_state.private[:, :-1], broadcast.items, broadcast.weights.argmax(1))
