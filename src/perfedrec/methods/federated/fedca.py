"""FedCA: composite aggregation by similarity and complementarity (Zhang et al., arXiv 2406.03933, 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Rows, Spec
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.mixed import Mixed, MixedBroadcast, MixedState, check_reports
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import ClientState
from perfedrec.nn.geometry import mean_angles, principal_directions, to_simplex
from perfedrec.nn.segments import dot, segment_sum


class CompositeSettings(Settings):
    """Options of the composite aggregation."""

    n_landmarks: int = Field(8, ge=2, description="number of landmarks: typical users, each with an item table")
    every: int = Field(10, ge=1, description="number of rounds from one choice of landmarks to the next")
    similarity: float = Field(0.3, ge=0, description="alpha, how much landmarks with a similar model are preferred")
    complementarity: float = Field(
        0.3, ge=0, description="beta, how much landmarks whose items span other directions are preferred"
    )
    n_directions: int = Field(4, ge=1, description="principal directions of a client's item vectors that are compared")
    learning_rate: float = Field(0.1, ge=0, description="step of a landmark's table, as a share of the server's step")
    own: float = Field(
        0.9, ge=0, le=1, description="rho, how much of its own item vectors a client takes into the next round"
    )


class FedCASettings(FederatedSettings):
    """Options of FedCA."""

    composite: CompositeSettings = CompositeSettings()

    @model_validator(mode="after")
    def _visible(self) -> FedCASettings:
        check_reports("fedca", self.privacy)
        return self


@dataclass(frozen=True, kw_only=True)
class CompositeState(MixedState):
    """Adds the ``landmarks`` [K, L, d], which are reports of K users, the ``centroids`` [K, d] that they were chosen
    by, and the ``shares`` [K] of users nearest to each. A report has a user's mean item vector and then the principal
    directions."""

    landmarks: Tensor | None = None
    centroids: Tensor | None = None
    shares: Tensor | None = None


class FedCA(Mixed[CompositeState, MixedBroadcast]):
    """``s_ui = p_u . t_ui``. The server makes a table for each user, with weights that solve

    ``min_w sum_v (w_v - p_v)^2 - 2 alpha s_uv w_v - 2 beta c_uv w_v``, ``w >= 0``, ``sum_v w_v = 1``.

    ``p_v`` is the share of v in plain averaging, ``s`` the similarity of two models, ``1 / (1 + distance)``, and ``c``
    the complementarity of the items of two users: ``1 - cos`` of the mean principal angle of the subspaces that their
    item vectors span. The solution is the point of the simplex nearest to ``p + alpha s + beta c``. A client starts
    from ``rho`` of its own vectors and ``1 - rho`` of this table.

    We had the abstract and the authors' public code, not the full text. The code adds ``beta cos`` and so prefers users
    with the same subspace; the abstract asks for complementary ones, which is what we do.

    Departs from the code: the users v are K landmarks (users nearest to the centroids of k-means over mean vectors), so
    that the server holds K tables instead of n; a user contributes to the landmark with the most similar model. Models
    are compared by the direction of a user's mean item vector instead of one principal component of its whole table.
    Principal angles are exact. Own vectors exist for a client's own items only. The server's optimiser is an option.
    """

    Options = FedCASettings
    settings: FedCASettings

    @property
    def n_reported(self) -> int:
        return 1 + self.settings.composite.n_directions

    def n_tables(self) -> int:
        return self.settings.composite.n_landmarks

    def table_share(self, state: CompositeState) -> float:
        return 0.0 if state.landmarks is None else self.settings.composite.learning_rate

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> CompositeState:
        return CompositeState(**vars(self._init(spec, key)))

    def groups(self, state: CompositeState, users: Tensor) -> Tensor:
        if state.landmarks is None:
            return torch.zeros_like(users)
        return similarities(state.reports[users.clamp(min=0)], state.landmarks).argmax(1)

    def mixing_weights(self, state: CompositeState, users: Tensor) -> Tensor:
        if state.landmarks is None or state.shares is None:
            return state.items.new_full((users.numel(), self.n_tables()), 1 / self.n_tables())
        options, reports = self.settings.composite, state.reports[users.clamp(min=0)]
        known = (reports.flatten(1).any(1) & (users != NEWCOMER))[:, None]
        gain = options.similarity * similarities(reports, state.landmarks)
        gain = gain + options.complementarity * complementarities(reports, state.landmarks)
        return to_simplex(state.shares + torch.where(known, gain, 0.0))

    def server(self, state: CompositeState, phase: str, aggregate: Aggregate, key: Key) -> CompositeState:
        state, options = super().server(state, phase, aggregate, key), self.settings.composite
        known = state.reports[state.reports.flatten(1).any(1)]
        if state.round % options.every or known.shape[0] < options.n_landmarks:
            return state
        _, centroids = cohort.cluster(known[:, 0], options.n_landmarks, state.centroids, key.fold("landmarks"))
        typical = (functional.normalize(known[:, 0], dim=1) @ centroids.T).argmax(0)
        landmarks = known[typical]
        nearest = torch.bincount(similarities(known, landmarks).argmax(1), minlength=options.n_landmarks)
        return replace(state, landmarks=landmarks, centroids=centroids, shares=nearest / known.shape[0])

    # --- the clients ---

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(private[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return private @ items.T

    def embedding(self, broadcast: MixedBroadcast, rows: Rows, client_state: ClientState) -> Embedding:
        return Embedding(client_state.private, broadcast.items, broadcast.weights.argmax(1))

    def contributes_to(self, broadcast: MixedBroadcast, rows: Rows, client_state: ClientState) -> Tensor:
        return broadcast.groups

    def begins(self, client_state: ClientState, positions: Tensor, received: Tensor) -> Tensor:
        own = (positions >= 0).nonzero().squeeze(1)
        start = self.settings.composite.own * client_state.rows[positions[own]]
        return torch.zeros_like(received).index_copy(0, own, start)

    def report(self, broadcast: MixedBroadcast, rows: Rows, client_state: ClientState, key: Key) -> Tensor:
        own = self.own_rows(broadcast, rows, client_state)
        mean = segment_sum(own, rows.segments, rows.n_users) / rows.counts.clamp(min=1)[:, None]
        directions = principal_directions(own, rows.segments, rows.n_users, self.settings.composite.n_directions)
        return torch.cat([mean[:, None], directions], dim=1)


def similarities(reports: Tensor, landmarks: Tensor) -> Tensor:
    """[B, K] ``1 / (1 + distance)`` of the directions of mean vectors."""
    mine, theirs = (functional.normalize(each[:, 0], dim=1) for each in (reports, landmarks))
    closeness: Tensor = 1 / (1 + (mine[:, None] - theirs).norm(dim=2))
    return closeness


def complementarities(reports: Tensor, landmarks: Tensor) -> Tensor:
    """[B, K] ``1 - cos`` of the mean principal angle between the subspaces of users and landmarks."""
    mine, theirs = (functional.normalize(each[:, 1:], dim=2) for each in (reports, landmarks))
    return 1 - mean_angles(mine[:, None], theirs).cos()
