"""FedRAP: additive personalisation (Li, Long and Zhou, ICLR 2024)."""

from __future__ import annotations

from math import tanh

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.segments import dot


class AdditiveSettings(Settings):
    """Options of the additive personalisation."""

    apart: float = Field(0.01, ge=0, description="lambda, weight of the distance between personal and shared vectors")
    sparsity: float = Field(0.001, ge=0, description="mu, weight of the L1 norm of the shared vectors")
    learning_rate: float = Field(
        0.01, ge=0, description="step of the personal vectors, as a share of the step of the shared ones"
    )
    warm_up: float = Field(
        10.0, gt=0, description="rounds over which both weights grow, as tanh(participations / warm_up)"
    )


class FedRAPSettings(FederatedSettings):
    """Options of FedRAP."""

    additive: AdditiveSettings = AdditiveSettings()


class FedRAP(Federated[ServerState, Broadcast, ClientState]):
    """``s_ui = p_u . (c_i + d_ui)``: shared item vectors ``c`` plus a client's own ``d_u``, which never leave it. The
    loss has the terms ``- lambda ||d_u - c||^2 + mu |c|_1`` (equation 4), whose weights grow from 0 (section 3.3).

    Departs from the paper: ``d_u`` exists only for a client's own items, because a table for each user does not fit on
    a phone; it explains what the user has seen, and so shapes ``c`` and ``p_u``. Both take one common step, ``d_u`` a
    share of it. ``||d_u - c||^2`` counts up to 1 per item, because it would grow without bound otherwise; the server's
    optimiser is an option, FedAvg in the paper; one negative per label.
    """

    Options = FedRAPSettings
    settings: FedRAPSettings

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(private[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return private @ items.T

    def embedding(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Embedding | None:
        return Embedding(client_state.private, broadcast.items)

    def begins(self, client_state: ClientState, positions: Tensor, received: Tensor) -> Tensor:
        own = (positions >= 0).nonzero().squeeze(1)
        return torch.zeros_like(received).index_copy(0, own, client_state.rows[positions[own]])

    def keeps(self, begun: Tensor, delta: Tensor) -> Tensor:
        return begun + self.settings.additive.learning_rate * (delta - begun)

    def penalty(
        self, received: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: ClientState
    ) -> Tensor:
        options, rounds = self.settings.additive, client_state.participations.tolist()
        growth = torch.tensor([tanh(each / options.warm_up) for each in rounds], device=received.device)
        shared, personal = received + delta - begun, self.keeps(begun, delta)
        distance = (personal - shared).square().sum(1).clamp(max=1.0)
        each = options.sparsity * shared.abs().sum(1) - options.apart * distance
        return growth * received.new_zeros(len(rounds)).index_add(0, segments, each)
