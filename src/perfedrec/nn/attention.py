"""Encoders of sequences by self-attention (Vaswani et al., NeurIPS 2017), with given weights; and keyed dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, bits
from perfedrec.nn.linear import linear

STEPS = 1 << 16
"""The chance of dropout is a multiple of 1 / STEPS: a random word has four such numbers."""


@dataclass
class Dropout:
    """Sets numbers to 0 with the chance ``rate`` and divides the others by what is left on average. Every call draws
    anew; the draws of a sequence depend on the ``key`` and on its id (``ids`` [b]) alone."""

    rate: float = 0.0
    key: Key = field(default_factory=lambda: Key(0))
    ids: Tensor | None = None
    calls: int = 0

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` [b, ...] after dropout."""
        limit = round(self.rate * STEPS)
        if not limit or self.ids is None:
            return values
        self.calls += 1
        size = values[0].numel()
        words = bits(self.key.fold("dropout", self.calls).spread(self.ids), -(-size // 4))
        kept = words.view(torch.int16)[:, :size] >= limit - STEPS // 2
        return values * kept.view_as(values) / (1 - limit / STEPS)


@dataclass(frozen=True)
class Encoder:
    """``n_blocks`` blocks of self-attention with ``n_heads`` heads, and a network with ``hidden`` units that is applied
    to each place; vectors have ``dim`` numbers.

    A ``causal`` encoder lets a place see itself and earlier ones, normalises what goes into each part, ``x +
    f(LN(x))``, and ends with a normalisation; its networks have ReLU. Otherwise a place sees all places, what comes out
    is normalised, ``LN(x + f(x))``, and networks have GELU.
    """

    dim: int
    n_blocks: int
    n_heads: int
    hidden: int
    causal: bool

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the weights. The factors of a normalisation are stored less 1."""
        d, h = self.dim, self.hidden
        block = [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (h, d), (h,), (d, h), (d,), (d,), (d,)]
        return block * self.n_blocks + [(d,), (d,)] * self.causal

    @property
    def scales(self) -> list[float]:
        """The size of the first weights: Glorot and Bengio (2010) for matrices, 0 for the others."""
        return [(2 / sum(shape)) ** 0.5 if len(shape) == 2 else 0.0 for shape in self.shapes]

    def __call__(self, weights: Sequence[Tensor], x: Tensor, there: Tensor, dropout: Dropout) -> Tensor:
        """[b, L, d] what the encoder makes of ``x`` [b, L, d], with ``weights`` of :attr:`shapes`.

        ``there`` bool [b, L] are the places that exist: the first ones of each row. What comes out at other places
        means nothing.
        """
        for number in range(self.n_blocks):
            *attention, a, b, into, bias, out, out_bias, c, e = weights[12 * number : 12 * (number + 1)]
            x = self._part(x, partial(self._attended, attention, there), (a, b), dropout)
            x = self._part(x, partial(self._passed, (into, bias, out, out_bias)), (c, e), dropout)
        return self._normalised(x, weights[-2:]) if self.causal else x

    def _part(self, x: Tensor, part: Callable[[Tensor], Tensor], norm: Sequence[Tensor], dropout: Dropout) -> Tensor:
        """One part of a block, with the way around it and its normalisation."""
        if self.causal:
            return x + dropout(part(self._normalised(x, norm)))
        return self._normalised(x + dropout(part(x)), norm)

    def _normalised(self, x: Tensor, norm: Sequence[Tensor]) -> Tensor:
        return functional.layer_norm(x, (self.dim,), 1 + norm[0], norm[1])

    def _attended(self, weights: Sequence[Tensor], there: Tensor, x: Tensor) -> Tensor:
        into, bias, out, out_bias = weights
        query, key, value = linear(x, into, bias).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        # places that do not exist come last, so that no existing place of a causal encoder sees them
        mask = None if self.causal else there[:, None, None, :]
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        return linear(heads.transpose(1, 2).flatten(2), out, out_bias)

    def _passed(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        into, bias, out, out_bias = weights
        inner = linear(x, into, bias)
        return linear(inner.relu() if self.causal else functional.gelu(inner), out, out_bias)
