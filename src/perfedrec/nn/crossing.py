"""Attribute embedding with feature crossing and attention (PerFedRec, Luo, Xiao and Song, CIKM 2022, section 3.2).

The layer-0 vector of a node with attributes ``a`` and identity vector ``v`` is an attention-weighted mean of three
vectors: ``v``; the attribute embedding ``x = A a``; and its crosses ``y`` from a DCN-V2 network (Wang et al., WWW
2021): ``y_0 = x, y_{l+1} = x * (W_l y_l + b_l) + y_l``. Attention weights are ``softmax_k(h . tanh(z_k))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from perfedrec.core.keys import Key, normal


@dataclass(frozen=True)
class Crossing:
    """The shape of one such network; its weights live in flat vectors [D], one per client.

    ``n_attributes`` F inputs, ``dim`` d outputs, ``n_layers`` cross layers.
    """

    n_attributes: int
    dim: int
    n_layers: int = 2

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        cross = [(self.dim, self.dim), (self.dim,)] * self.n_layers
        return [(self.dim, self.n_attributes), *cross, (self.dim,)]

    @property
    def size(self) -> int:
        """D, the number of weights."""
        return sum(prod(shape) for shape in self._shapes)

    def init(self, key: Key, scale: float) -> Tensor:
        """[D] weights: Gaussian embeddings of the given scale, small cross layers, even attention."""
        parts = []
        for number, shape in enumerate(self._shapes):
            draws = normal(key.fold(number).spread(torch.zeros((), dtype=torch.int64)), prod(shape))
            factor = scale if number == 0 else (self.dim**-0.5 * 0.1 if len(shape) == 2 else 0.0)
            parts.append(draws * factor)
        return torch.cat(parts)

    def __call__(self, weights: Tensor, vectors: Tensor, attributes: Tensor) -> Tensor:
        """Layer-0 vectors [B, L, d] of L nodes for each of B clients with their own ``weights`` [B, D].

        ``vectors`` [B, L, d] and ``attributes`` [B, L, F] (or [1, L, F] where all clients see the same nodes).
        """
        sizes = [prod(shape) for shape in self._shapes]
        pieces = [
            piece.view(weights.shape[0], *shape)
            for piece, shape in zip(weights.split(sizes, dim=1), self._shapes, strict=True)
        ]
        embedding, *cross, query = pieces
        x = attributes @ embedding.transpose(1, 2)
        y = x
        for matrix, bias in zip(cross[::2], cross[1::2], strict=True):
            y = x * (y @ matrix.transpose(1, 2) + bias[:, None]) + y
        candidates = torch.stack([vectors, x.expand_as(vectors), y.expand_as(vectors)], dim=2)
        attention = torch.softmax(torch.tanh(candidates) @ query[:, None, :, None], dim=2)
        return (attention * candidates).sum(2)
