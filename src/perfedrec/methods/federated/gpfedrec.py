"""GPFedRec: personalisation guided by a graph of users (Zhang et al., KDD 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key, fold_in
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Rows, Spec
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.base import Download, FederatedSettings, Kept, Shared
from perfedrec.methods.federated.pfedrec import PFedRec
from perfedrec.nn.segments import segment_sum
from perfedrec.privacy.uploads import protect


class GraphSettings(Settings):
    """The graph of users."""

    n_landmarks: int = Field(8, ge=2, description="typical users, through which all others are related")
    every: int = Field(10, ge=1, description="rounds between two constructions of the graph")
    sharpness: float = Field(5.0, gt=0, description="how much more the most similar landmarks count")
    learning_rate: float = Field(0.1, ge=0, description="step of a landmark's table, as a share of the server's step")
    guidance: float = Field(0.01, ge=0, description="weight of staying near the vectors that the graph suggests")


class GPFedRecSettings(FederatedSettings):
    """Options of GPFedRec."""

    graph: GraphSettings = GraphSettings()

    @model_validator(mode="after")
    def _visible(self) -> GPFedRecSettings:
        if self.privacy.sums:
            raise ValueError("gpfedrec relates users by what they upload; expected privacy.aggregation = sparse")
        if self.privacy.randomised_response:
            raise ValueError("gpfedrec reports a mean over real items; expected no privacy.randomised_response")
        return self


@dataclass(frozen=True, kw_only=True)
class Graphed(Shared):
    """With ``reports`` [n, 1, d] the last of each user, and the ``landmarks`` [K, d], whose are the tables
    beside the shared one."""

    reports: Tensor
    landmarks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Guided(Download):
    """With the tables' ``offsets`` [K m, d], from which each user's own is made, by its ``weights`` [B, K]."""

    weights: Tensor = field(metadata={"per": "user"})
    offsets: Tensor

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives: the table that was made for it, and the shared one; ``together`` the users of
        a node receive the landmarks' tables and their weights."""
        if together:
            return 4 * (self.items.numel() + self.offsets.numel() + self.weights.numel())
        return 8 * self.items.numel()


class GPFedRec(PFedRec):
    """The server relates users by the item vectors that they upload, and gives each one an item table of its own, the
    mean over its neighbours in that graph (equations 6 to 8); a client's rows are kept near it.

    Departs from the paper: the similarity of two users goes through ``K`` landmarks, ``sim(u, v) ~ sum_k a_uk a_vk``
    (Nystroem), so that the server holds K tables instead of n, and uploads can be summed; users are compared by the
    mean of their items' protected vectors instead of whole tables; score functions are linear; the server's optimiser
    is an option.
    """

    Options = GPFedRecSettings
    broadcast_type = Guided

    def n_tables(self) -> int:
        return int(self.settings.graph.n_landmarks)

    def table_share(self, state: Graphed) -> float:
        return 0.0 if state.landmarks is None else float(self.settings.graph.learning_rate)

    def init(self, spec: Spec, key: Key) -> Graphed:
        shared = super().init(spec, key)
        return Graphed(**vars(shared), reports=shared.items.new_zeros(spec.n_users, 1, shared.items.shape[1]))

    def broadcast(self, state: Graphed, users: Tensor) -> Guided:
        assert state.offsets is not None
        weights = torch.full((users.numel(), self.n_tables()), 1 / self.n_tables(), device=users.device)
        if state.landmarks is not None:
            similar = functional.normalize(state.reports[users.clamp(min=0), 0], dim=1) @ state.landmarks.T
            weights = (self.settings.graph.sharpness * similar).softmax(1)
            weights[users == NEWCOMER] = 1 / self.n_tables()
        return Guided(items=state.items, dense=state.dense, weights=weights, offsets=state.offsets)

    def table_rows(self, broadcast: Guided, items: Tensor, segments: Tensor) -> Tensor:
        tables = torch.arange(broadcast.weights.shape[1], device=items.device) * broadcast.items.shape[0]
        own = functional.embedding_bag(
            items[:, None] + tables, broadcast.offsets, mode="sum", per_sample_weights=broadcast.weights[segments]
        )
        return super().table_rows(broadcast, items, segments) + own

    def penalty(self, base: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: Kept) -> Tensor:
        pulled = base.new_zeros(client_state.private.shape[0]).index_add(0, segments, delta.square().sum(1))
        return pulled * float(self.settings.graph.guidance)

    def contributes_to(self, broadcast: Guided, rows: Rows, client_state: Kept) -> Tensor:
        return broadcast.weights.argmax(1)

    def report(self, broadcast: Guided, rows: Rows, client_state: Kept, key: Key) -> Tensor:
        own = self.table_rows(broadcast, rows.items, rows.segments) + client_state.rows
        mean = segment_sum(own, rows.segments, rows.n_users) / rows.counts.clamp(min=1)[:, None]
        keys = key.fold("report").spread(rows.users)
        return protect(mean[:, None], self.settings.privacy, fold_in(keys[:, None], torch.zeros_like(keys[:1])))

    def server(self, state: Graphed, phase: str, aggregate: Aggregate, key: Key) -> Graphed:
        graph = self.settings.graph
        if aggregate.reports is not None and aggregate.report_users is not None:
            state.reports[aggregate.report_users] = aggregate.reports
        state = super().server(state, phase, aggregate, key)
        if state.round % graph.every:
            return state
        _, landmarks = cohort.cluster(state.reports[:, 0], graph.n_landmarks, state.landmarks, key.fold("graph"))
        return replace(state, landmarks=landmarks)

    def scores(self, broadcast: Guided, rows: Rows, client_state: Kept) -> Tensor:
        scores = super().scores(broadcast, rows, client_state)
        for weights, offsets in zip(
            broadcast.weights.T, broadcast.offsets.split(broadcast.items.shape[0]), strict=True
        ):
            scores.addcmul_(weights[:, None], client_state.private[:, :-1] @ offsets.T)
        return scores

    def embedding(self, broadcast: Any, rows: Rows, client_state: Kept) -> Embedding:
        return replace(super().embedding(broadcast, rows, client_state), groups=broadcast.weights.argmax(1))
