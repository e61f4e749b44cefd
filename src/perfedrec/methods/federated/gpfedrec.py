"""GPFedRec: personalisation guided by a graph of users (Zhang et al., KDD 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Rows, Spec
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.mixed import Mixed, MixedBroadcast, MixedState, check_reports
from perfedrec.methods.federated.pfedrec import PFedRec
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import ClientState
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
        check_reports("gpfedrec", self.privacy)
        return self


@dataclass(frozen=True, kw_only=True)
class LandmarkState(MixedState):
    """Adds ``landmarks`` [K, d]; each of them has one of the tables beside the shared one. A report is one vector."""

    landmarks: Tensor | None = None


class GPFedRec(Mixed[LandmarkState, MixedBroadcast], PFedRec[LandmarkState, MixedBroadcast, ClientState]):
    """The server compares users by the item vectors that they upload, and gives each user an item table of its own: the
    mean over its neighbours in the graph of users (equations 6 to 8). A penalty keeps a client's rows near this table.

    Departs from the paper: the similarity of two users goes through ``K`` landmarks, ``sim(u, v) ~ sum_k a_uk a_vk``
    (Nystroem), so that the server holds K tables instead of n, and uploads can be summed; users are compared by the
    mean of their items' protected vectors instead of whole tables; score functions are linear; the server's optimiser
    is an option.
    """

    Options = GPFedRecSettings
    settings: GPFedRecSettings

    def n_tables(self) -> int:
        return self.settings.graph.n_landmarks

    def table_share(self, state: LandmarkState) -> float:
        return 0.0 if state.landmarks is None else self.settings.graph.learning_rate

    def init(self, spec: Spec, key: Key) -> LandmarkState:
        return LandmarkState(**vars(self._init(spec, key)))

    def mixing_weights(self, state: LandmarkState, users: Tensor) -> Tensor:
        if state.landmarks is None:
            return state.items.new_full((users.numel(), self.n_tables()), 1 / self.n_tables())
        similar = functional.normalize(state.reports[users.clamp(min=0), 0], dim=1) @ state.landmarks.T
        weights: Tensor = (self.settings.graph.sharpness * similar).softmax(1)
        weights[users == NEWCOMER] = 1 / self.n_tables()
        return weights

    def penalty(
        self, received: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: ClientState
    ) -> Tensor:
        pulled = received.new_zeros(client_state.private.shape[0]).index_add(0, segments, delta.square().sum(1))
        return pulled * self.settings.graph.guidance

    def report(self, broadcast: MixedBroadcast, rows: Rows, client_state: ClientState, key: Key) -> Tensor:
        own = self.own_rows(broadcast, rows, client_state)
        mean = segment_sum(own, rows.segments, rows.n_users) / rows.counts.clamp(min=1)[:, None]
        return mean[:, None]

    def server(self, state: LandmarkState, phase: str, aggregate: Aggregate, key: Key) -> LandmarkState:
        graph, state = self.settings.graph, super().server(state, phase, aggregate, key)
        if state.round % graph.every:
            return state
        _, landmarks = cohort.cluster(state.reports[:, 0], graph.n_landmarks, state.landmarks, key.fold("graph"))
        return replace(state, landmarks=landmarks)

    def embedding(self, broadcast: MixedBroadcast, rows: Rows, client_state: ClientState) -> Embedding:
        return Embedding(client_state.private[:, :-1], broadcast.items, broadcast.weights.argmax(1))
