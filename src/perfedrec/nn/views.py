"""The views for contrastive learning: random noise, as privacy mechanisms add it, used as data augmentation."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.keys import Key, uniform
from perfedrec.nn.propagation import Bipartite


def perturb(vectors: Tensor, noise: float, key: Key) -> Tensor:
    """[n, d] ``e' = e + noise sign(e) * u / ||u||`` for ``vectors`` [n, d], with ``u`` uniform on (0, 1)^d.

    SimGCL, Yu et al., SIGIR 2022, eq. 7. The ``key`` decides ``u``.
    """
    keys = key.spread(torch.arange(vectors.shape[0], device=vectors.device))
    direction = functional.normalize(uniform(keys, vectors.shape[1]), dim=1)
    return vectors + noise * torch.sign(vectors.detach()) * direction


def thinned(vectors: Tensor, share: float, key: Key) -> Tensor:
    """[n, d] the ``vectors`` without a random ``share`` of their numbers, below 1; the others are divided by what is
    left (1 - share)."""
    keys = key.spread(torch.arange(vectors.shape[0], device=vectors.device))
    return vectors * (uniform(keys, vectors.shape[1]) >= share) / (1 - share)


Pair: TypeAlias = tuple[Tensor, Tensor]
"""Vectors of users [n, d] and of items [m, d]."""


def noisy_layers(
    graph: Bipartite, users: Tensor, items: Tensor, n_layers: int, noise: float, key: Key, first: Pair | None = None
) -> list[Pair]:
    """Layers 1 to ``n_layers`` of LightGCN, each of users [n, d] and of items [m, d], with noise in every layer.

    Who computes several views of one graph gives what they share, their ``first`` layer without noise.
    """
    layers = []
    for layer in range(n_layers):
        users, items = first if first is not None and layer == 0 else graph.passed(users, items)
        if noise:
            users = perturb(users, noise, key.fold("users", layer))
            items = perturb(items, noise, key.fold("items", layer))
        layers.append((users, items))
    return layers


def noisy_lightgcn(
    graph: Bipartite, users: Tensor, items: Tensor, n_layers: int, noise: float, key: Key, first: Pair | None = None
) -> Pair:
    """Final vectors of users [n, d] and of items [m, d] of one view: LightGCN with noise in every propagated layer.

    As in SimGCL, the mean is over layers 1 to K: layer 0 is the same in both views.
    """
    return mean_of(noisy_layers(graph, users, items, n_layers, noise, key, first))


def mean_of(layers: list[Pair]) -> Pair:
    """The means over layers: of users [n, d] and of items [m, d]."""
    users, items = layers[0]
    for more_users, more_items in layers[1:]:
        users, items = users + more_users, items + more_items
    return users / len(layers), items / len(layers)
