"""GPFedRec: personalisation guided by a graph of users (Zhang et al., KDD 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.algorithms import parts
from perfedrec.algorithms.federated import FederatedSettings, Kept, Shared
from perfedrec.algorithms.parts import Moments
from perfedrec.algorithms.pfedrec import PFedRec
from perfedrec.core.keys import Key, fold_in
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Aggregate, Embedding, Rows, Spec, distinct, from_fixed
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


@dataclass(frozen=True)
class Graphed(Shared):
    """With ``reports`` [n, 1, d] the last of each user, ``landmarks`` [K, d], and their tables' ``offsets`` [K m, d]
    from the shared one."""

    reports: Tensor | None = None
    landmarks: Tensor | None = None
    offsets: Tensor | None = None
    offsets_moments: Moments | None = None


@dataclass(frozen=True)
class Guided:
    """What clients receive: the table, and by user the table that the graph suggests, as weights [B, K] of the
    landmarks' ``offsets`` [K m, d]; ``nearest`` [B] the most similar landmark."""

    items: Tensor
    weights: Tensor = field(metadata={"per": "user"})
    nearest: Tensor = field(metadata={"per": "user"})
    offsets: Tensor
    dense: Tensor | None = None

    def download_bytes(self) -> int:
        """Bytes that one client receives: the table that was made for it, and the shared one."""
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
    Received = Guided

    def init(self, spec: Spec, key: Key) -> Graphed:
        shared, n_landmarks = super().init(spec, key), self.settings.graph.n_landmarks
        items, device = shared.items, shared.items.device
        reports = torch.zeros(spec.n_users, 1, items.shape[1], device=device)
        offsets = torch.zeros(n_landmarks * items.shape[0], items.shape[1], device=device)
        moments = Moments.zeros(offsets) if self.settings.server.optimizer != "fedavg" else None
        return Graphed(**vars(shared), reports=reports, offsets=offsets, offsets_moments=moments)

    def n_groups(self, state: Graphed) -> int:
        return int(self.settings.graph.n_landmarks)

    def view(self, state: Graphed, users: Tensor) -> Guided:
        assert state.reports is not None
        assert state.offsets is not None
        weights = torch.full((users.numel(), self.n_groups(state)), 1 / self.n_groups(state), device=users.device)
        if state.landmarks is not None:
            similar = functional.normalize(state.reports[users.clamp(min=0), 0], dim=1) @ state.landmarks.T
            weights = (self.settings.graph.sharpness * similar).softmax(1)
            weights[users == NEWCOMER] = 1 / self.n_groups(state)
        return Guided(state.items, weights, weights.argmax(1), state.offsets, state.dense)

    def table_rows(self, view: Guided, items: Tensor, segments: Tensor) -> Tensor:
        tables = torch.arange(view.weights.shape[1], device=items.device) * view.items.shape[0]
        own = functional.embedding_bag(
            items[:, None] + tables, view.offsets, mode="sum", per_sample_weights=view.weights[segments]
        )
        return view.items.index_select(0, items) + own

    def penalty(self, base: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, memory: Kept) -> Tensor:
        squares = delta.square().sum(1)
        pulled = base.new_zeros(memory.private.shape[0]).index_add(0, segments, squares)
        guidance: float = self.settings.graph.guidance
        return pulled * guidance

    def contributes_to(self, view: Guided, rows: Rows, memory: Kept) -> Tensor:
        return view.nearest

    def report(self, view: Guided, rows: Rows, memory: Kept, key: Key) -> Tensor:
        own = self.table_rows(view, rows.items, rows.segments) + memory.rows
        mean = segment_sum(own, rows.segments, rows.n_users) / rows.counts.clamp(min=1)[:, None]
        keys = key.fold("report").spread(rows.users)
        return protect(mean[:, None], self.settings.privacy, fold_in(keys[:, None], torch.zeros_like(keys[:1])))

    def _summed(self, aggregate: Aggregate) -> tuple[Tensor, Tensor]:
        touched, inverse = distinct(aggregate.keys % aggregate.n_items, aggregate.n_items)
        sums = from_fixed(aggregate.sums)
        return touched, sums.new_zeros(touched.numel(), sums.shape[1]).index_add_(0, inverse, sums)

    def server(self, state: Graphed, phase: str, aggregate: Aggregate, key: Key) -> Graphed:
        graph = self.settings.graph
        if aggregate.clients and aggregate.reports is not None and aggregate.report_users is not None:
            assert state.reports is not None
            assert state.offsets is not None
            state.reports[aggregate.report_users] = aggregate.reports
            if state.landmarks is not None:
                weights = from_fixed(aggregate.weights)[aggregate.keys // aggregate.n_items, None]
                mean, share = from_fixed(aggregate.sums) / weights, graph.learning_rate
                server = self.settings.server
                parts.sparse_step(server, state.offsets, state.offsets_moments, aggregate.keys, mean, share)
        state = super().server(state, phase, aggregate, key)
        if state.round % graph.every == 0 and state.reports is not None:
            centroids = parts.cluster(state.reports[:, 0], graph.n_landmarks, state.landmarks, key.fold("graph"))[1]
            state = replace(state, landmarks=centroids)
        return state

    def serving(self, state: Graphed) -> Graphed:
        return replace(cast(Graphed, super().serving(state)), offsets_moments=None)

    def scores(self, view: Guided, rows: Rows, memory: Kept) -> Tensor:
        scores, m = self.all_scores(memory.private, view.items, None), view.items.shape[0]
        for number in range(view.weights.shape[1]):
            part = memory.private[:, :-1] @ view.offsets[number * m : (number + 1) * m].T
            scores.addcmul_(view.weights[:, number, None], part)
        return scores

    def explain(self, view: Any, rows: Rows, memory: Kept) -> dict[str, Tensor]:
        return {"global": self.scores(view, rows, memory)}

    def embedding(self, view: Any, rows: Rows, memory: Kept) -> Embedding:
        return replace(super().embedding(view, rows, memory), groups=view.nearest)
