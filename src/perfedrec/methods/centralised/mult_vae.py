"""Mult-VAE: a variational autoencoder with a multinomial likelihood (Liang et al., WWW 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, normal, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows, block_rows
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.nn.flat import Flat
from perfedrec.nn.segments import segment_sum


class MultVAESettings(Settings):
    """Options of Mult-VAE."""

    embedding_dim: int = Field(200, ge=1, description="K, length of a user's latent vector")
    hidden_dim: int = Field(600, ge=1, description="width of the hidden layers of encoder and decoder")
    dropout: float = Field(0.5, ge=0, lt=1, description="share of a user's items that the encoder does not see")
    beta: float = Field(0.2, ge=0, description="final weight of the KL divergence")
    annealing_steps: int = Field(2000, ge=0, description="steps in which this weight grows from 0")
    learning_rate: float = Field(0.001, gt=0, description="step of Adam")
    batch_size: int = Field(500, ge=1, description="users per step")


@dataclass(frozen=True)
class Autoencoder:
    """The flat ``weights`` [D] of encoder and decoder, with Adam's moments ``first`` and ``second`` [D] and its number
    of ``steps``."""

    weights: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    steps: int = 0


class MultVAE(Method):
    """``z_u ~ N(mu(x_u), sigma^2(x_u))`` and ``score_u = f(z_u)``, with one hidden layer of tanh in encoder and decoder
    (section 2). It minimises ``-sum_{i in I_u} log softmax(f(z_u))_i + beta KL(q(z_u | x_u) || N(0, 1))``. The encoder
    sees a user's items divided by the root of their number, some of them dropped out; recommendations use ``z = mu``.

    Departs from the paper: users have one item held out in validation, as for all methods here, while the paper trains
    on other users than it tests; first weights are normal draws.
    """

    Options = MultVAESettings
    settings: MultVAESettings
    trained = True
    item_based = True

    def network(self, n_items: int) -> tuple[Flat, list[float]]:
        """The weights for ``n_items`` items, and the size of the first ones (Glorot and Bengio, 2010; biases 0)."""
        hidden, latent = self.settings.hidden_dim, self.settings.embedding_dim
        layers = [(n_items, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, n_items)]
        shapes = tuple(shape for layer in layers for shape in (layer, layer[1:]))
        return Flat(shapes), [scale for layer in layers for scale in ((2 / sum(layer)) ** 0.5, 0.0)]

    def init(self, data: Training, key: Key) -> Autoencoder:
        flat, scales = self.network(data.n_items)
        weights = flat.init(key, scales).to(data.rows.items.device)
        return Autoencoder(weights, torch.zeros_like(weights), torch.zeros_like(weights))

    def epoch(self, state: Autoencoder, data: Training, key: Key) -> tuple[Autoencoder, float]:
        order = choose(data.n_users, data.n_users, key.fold("order")).to(state.weights.device)
        parts = order.split(self.settings.batch_size)
        batches = [(users.numel(), (users, state.steps + number)) for number, users in enumerate(parts)]
        done = descend(
            [state.weights],
            state,
            self.settings.learning_rate,
            batches,
            lambda learned, batch: self.loss(learned[0], *batch, data, key),
        )
        return Autoencoder(done.parameters[0], done.first, done.second, done.steps), done.loss

    def loss(self, weights: Tensor, users: Tensor, steps: int, data: Training, key: Key) -> Tensor:
        """The mean loss of ``users`` [b] after a number of ``steps``, a scalar; the ``key`` decides dropout and z."""
        settings = self.settings
        rows, places = block_rows(data.rows.offsets, data.rows.items, users)
        seen = uniform(key.fold("dropout").spread(places), 1).squeeze(1) >= settings.dropout
        mean, log_variance = self.encoded(weights, rows, seen / (1 - settings.dropout), data.n_items)
        noise = normal(key.fold("latent").spread(users), settings.embedding_dim)
        logits = self.decoded(weights, mean + noise * (log_variance / 2).exp(), data.n_items)
        own = segment_sum(logits[rows.segments, rows.items][:, None], rows.segments, users.numel()).squeeze(1)
        likelihood = own - rows.counts * logits.logsumexp(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
        share = min(1.0, steps / settings.annealing_steps) if settings.annealing_steps else 1.0
        return (share * settings.beta * divergence - likelihood).mean()

    def encoded(self, weights: Tensor, rows: Rows, values: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z, each [b, K], for ``rows`` with ``values`` [R]."""
        into, bias, out, out_bias = self.network(n_items)[0].unpack(weights)[:4]
        scaled = values * rows.counts.clamp(min=1).to(weights.dtype).rsqrt()[rows.segments]
        sums = functional.embedding_bag(rows.items, into, rows.offsets[:-1], mode="sum", per_sample_weights=scaled)
        mean, log_variance = (torch.tanh(sums + bias) @ out + out_bias).chunk(2, dim=1)
        return mean, log_variance

    def decoded(self, weights: Tensor, latent: Tensor, n_items: int) -> Tensor:
        """[b, m] the logits ``f(z)`` of ``latent`` vectors [b, K]."""
        into, bias, out, out_bias = self.network(n_items)[0].unpack(weights)[4:]
        return torch.tanh(latent @ into + bias) @ out + out_bias

    def serving(self, state: Autoencoder, data: Training) -> Autoencoder:
        return Autoencoder(state.weights)

    def scores(self, state: Autoencoder, data: Training, users: Tensor) -> Tensor:
        rows, _ = block_rows(data.rows.offsets, data.rows.items, users)
        ones = torch.ones_like(rows.items, dtype=state.weights.dtype)
        return self.decoded(state.weights, self.encoded(state.weights, rows, ones, data.n_items)[0], data.n_items)
