"""Contrastive pre-training (PerFedRec++, section 4.3) at the neighbourhood service, between two views of its graph.

The privacy mechanisms make the views: selection of clients acts as node dropout, decoys and masking perturb edges, and
noise is added in every layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key, normal, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Published
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.methods.federated.state import B, C, S, Service
from perfedrec.nn.losses import info_nce
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.views import noisy_lightgcn


class Contrastive(GraphMethod[S, B, C]):
    """A graph method with contrastive pre-training at its service if ``pretraining.kind`` is "contrastive"."""

    @property
    def contrasts(self) -> bool:
        """Whether there is contrastive pre-training."""
        return bool(self.settings.pretraining.kind == "contrastive")

    @property
    def joins(self) -> bool:
        return super().joins or self.contrasts

    @property
    def n_views(self) -> int:
        """The number of independently protected edge sets that each client sends."""
        return 2 if self.contrasts and self.settings.pretraining.edge_perturbation else 1

    def pretrain(self, service: Service, aggregate: Aggregate, key: Key) -> tuple[Service, Published]:
        """Contrastive pre-training. It publishes the table [m, d] by token; the users' vectors stay at the service, in
        ``start``.

        It starts from small random vectors (the users' own are random at this point, too) and scales the result to the
        model's vectors afterwards. The loss depends only on directions, and Adam turns small vectors quickly.
        """
        service, published = super().pretrain(service, aggregate, key)
        settings, model = self.settings.pretraining, self.settings.model
        if not self.contrasts:
            return service, published
        assert service.graph is not None
        assert aggregate.edges is not None
        key, n_items, device = key.fold("contrast"), aggregate.n_items, service.reports.device
        everyone, every_item = (torch.arange(n, device=device) for n in (len(service.reports), n_items))
        start = [
            normal(key.fold(side).spread(nodes), model.embedding_dim) * settings.init_scale
            for side, nodes in (("users", everyone), ("items", every_item))
        ]
        graphs = []
        for view in range(2):  # each view has its own clients, like a round of training
            selected = uniform(key.fold("view", view).spread(everyone), 1).squeeze(1) >= settings.node_dropout
            number = view % self.n_views
            graphs.append(neighbourhood.graph(aggregate.edges, number, len(everyone), n_items, selected))
        n_layers = max(model.n_layers, 1)  # without propagation the views would not depend on their graphs
        users, table = contrast(graphs, start[0], start[1], n_layers, settings, key)
        users, table = users * (model.init_scale / table.std()), table * (model.init_scale / table.std())
        layers = torch.stack([users, service.graph.to_users(table)], dim=1)[:, : service.reports.shape[1]]
        return replace(service, start=users, reports=layers.contiguous()), replace(published, table=table)


def contrast(
    graphs: list[Bipartite], users: Tensor, items: Tensor, n_layers: int, settings: PretrainingSettings, key: Key
) -> tuple[Tensor, Tensor]:
    """Adam on InfoNCE between two views of the graph (section 4.3 of the paper); the loss is that of users plus that of
    items.

    ``users`` [n, d] and ``items`` [m, d] are the vectors to start from. Returns the trained ones.
    """
    users, items = users.clone().requires_grad_(), items.clone().requires_grad_()
    optimizer = torch.optim.Adam([users, items], lr=settings.learning_rate)
    with one_thread():
        for step in range(settings.steps):
            step_key = key.fold("step", step)
            chosen = [
                choose(vectors.shape[0], settings.batch_size, step_key.fold(side)).to(vectors.device)
                for side, vectors in (("users", users), ("items", items))
            ]
            views = [
                noisy_lightgcn(graph, users, items, n_layers, settings.noise, step_key.fold("noise", number))
                for number, graph in enumerate(graphs)
            ]
            loss = torch.stack(
                [
                    info_nce(views[0][side][nodes], views[1][side][nodes], settings.temperature)
                    for side, nodes in enumerate(chosen)
                ]
            ).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return users.detach(), items.detach()
