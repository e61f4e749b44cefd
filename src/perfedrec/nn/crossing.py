"""Attribute embedding with feature crossing and attention (PerFedRec, Luo, Xiao and Song, CIKM 2022, section 3.2).

The layer-0 vector of a node with attributes ``a`` and identity vector ``v`` is the mean of three vectors ``z_k``,
weighted by attention: ``v``; the attribute embedding ``x = A a``; and the crossed features ``y`` of a DCN-V2 network
(Wang et al., WWW 2021), ``y_0 = x, y_{l+1} = x * (W_l y_l + b_l) + y_l``. The attention weights are
``softmax_k(h . tanh(z_k))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.nn.flat import Flat


@dataclass(frozen=True)
class Crossing:
    """The shape of such a network. The weights of each client are a flat vector [D].

    ``n_attributes`` is the number F of inputs, ``dim`` the number d of outputs, and ``n_layers`` the number of cross
    layers.
    """

    n_attributes: int
    dim: int
    n_layers: int = 2

    @property
    def _flat(self) -> Flat:
        cross = ((self.dim, self.dim), (self.dim,)) * self.n_layers
        return Flat(((self.dim, self.n_attributes), *cross, (self.dim,)))

    @property
    def size(self) -> int:
        """D, the number of weights."""
        return self._flat.size

    def init(self, key: Key, scale: float) -> Tensor:
        """[D] initial weights: Gaussian embeddings of the given ``scale``, small cross layers, equal attention."""
        cross = (self.dim**-0.5 * 0.1, 0.0) * self.n_layers
        return self._flat.init(key, (scale, *cross, 0.0))

    def __call__(self, weights: Tensor, vectors: Tensor, attributes: Tensor) -> Tensor:
        """Layer-0 vectors [B, L, d] of L nodes for each of B clients, each client with its own ``weights`` [B, D].

        ``vectors`` [B, L, d] are the identity vectors of the nodes. ``attributes`` are [B, L, F], or [1, L, F] where
        all clients have the same nodes.
        """
        embedding, *cross, query = self._flat.unpack(weights)
        x = attributes @ embedding.transpose(1, 2)
        y = x
        for matrix, bias in zip(cross[::2], cross[1::2], strict=True):
            y = x * (y @ matrix.transpose(1, 2) + bias[:, None]) + y
        candidates = torch.stack([vectors, x.expand_as(vectors), y.expand_as(vectors)], dim=2)
        attention = torch.softmax(torch.tanh(candidates) @ query[:, None, :, None], dim=2)
        return (attention * candidates).sum(2)
