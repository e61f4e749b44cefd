"""The views for contrastive learning: random noise, as privacy mechanisms add it, used as data augmentation."""

from __future__ import annotations

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


def noisy_layers(
    graph: Bipartite, users: Tensor, items: Tensor, n_layers: int, noise: float, key: Key
) -> list[tuple[Tensor, Tensor]]:
    """Layers 1 to ``n_layers`` of LightGCN, each of users [n, d] and of items [m, d], with noise in every layer."""
    layers = []
    for layer in range(n_layers):
        users, items = graph.to_users(items), graph.to_items(users)
        if noise:
            users = perturb(users, noise, key.fold("users", layer))
            items = perturb(items, noise, key.fold("items", layer))
        layers.append((users, items))
    return layers


def noisy_lightgcn(
    graph: Bipartite, users: Tensor, items: Tensor, n_layers: int, noise: float, key: Key
) -> tuple[Tensor, Tensor]:
    """Final vectors of users [n, d] and of items [m, d] of one view: LightGCN with noise in every propagated layer.

    As in SimGCL, the mean is over layers 1 to K: layer 0 is the same in both views.
    """
    return mean_of(noisy_layers(graph, users, items, n_layers, noise, key))


def mean_of(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The means over layers: of users [n, d] and of items [m, d]."""
    return torch.stack([each for each, _ in layers]).mean(0), torch.stack([each for _, each in layers]).mean(0)
