"""Contrastive pre-training (PerFedRec++, section 4.3) at the neighbourhood service, between two views of its graph.

The privacy mechanisms make the views: selection of clients acts as node dropout, decoys and masking perturb edges, and
noise is added in every layer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.keys import Key, normal, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.settings import Settings
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Published
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.graph_losses import graph_loss, minimise
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.methods.federated.state import B, C, S, Service
from perfedrec.nn.losses import info_nce
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.views import noisy_lightgcn


class Contrastive(GraphMethod[S, B, C]):
    """A graph method with pre-training at its service: the paper's contrastive one if ``pretraining.kind`` is
    "contrastive", or with the loss of a centralised graph method if it has the name of one."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.graph_loss = graph_loss(self.settings.pretraining, self.settings.model.embedding_dim)

    @property
    def contrasts(self) -> bool:
        """Whether the service trains vectors on its graph before training."""
        return self.settings.pretraining.kind not in ("spectral", "none")

    @property
    def joins(self) -> bool:
        return super().joins or self.contrasts

    @property
    def n_views(self) -> int:
        """The number of independently protected edge sets that each client sends."""
        return 2 if self.contrasts and self.settings.pretraining.edge_perturbation else 1

    def pretrain(self, service: Service, aggregate: Aggregate, key: Key) -> tuple[Service, Published]:
        """Pre-training on the graph. It publishes the table [m, d] by token; the users' vectors stay at the service, in
        ``start``.

        It starts from small random vectors (the users' own are random at this point, too) and scales the result to the
        model's vectors afterwards. The contrastive loss depends only on directions, and Adam turns small vectors
        quickly.
        """
        service, published = super().pretrain(service, aggregate, key)
        settings, model = self.settings.pretraining, self.settings.model
        if not self.contrasts:
            return service, published
        assert service.graph is not None
        key, n_items, device = key.fold("contrast"), aggregate.n_items, service.reports.device
        everyone, every_item = (torch.arange(n, device=device) for n in (len(service.reports), n_items))
        graphs = self._views(aggregate, everyone, key)
        if self.graph_loss is not None:
            users, table = minimise(self.graph_loss, service.graph, graphs, settings.epochs, key)
        else:
            start = [
                normal(key.fold(side).spread(nodes), model.embedding_dim) * settings.init_scale
                for side, nodes in (("users", everyone), ("items", every_item))
            ]
            n_layers = max(model.n_layers, 1)  # without propagation the views would not depend on their graphs
            users, table = contrast(graphs, start[0], start[1], n_layers, settings, key)
        users, table = users * (model.init_scale / table.std()), table * (model.init_scale / table.std())
        layers = torch.stack([users, service.graph.to_users(table)], dim=1)[:, : service.reports.shape[1]]
        return replace(service, start=users, reports=layers.contiguous()), replace(published, table=table)

    def coordinate(self, state: S, phase: str, aggregate: Aggregate, published: Published, key: Key) -> S:
        if phase == TRAIN.name and aggregate.clients and self.settings.pretraining.continued:
            aggregate = self._spread_out(state, aggregate, key.fold("contrast"))
        return super().coordinate(state, phase, aggregate, published, key)

    def _spread_out(self, state: S, aggregate: Aggregate, key: Key) -> Aggregate:
        """The ``aggregate`` with a step of the items' contrast, as of one more client with the weight
        ``pretraining.continued``, on the rows of ``batch_size`` random items that clients touched.

        It is the part of InfoNCE that needs nobody's data, on final item vectors e: ``sum_i log mean_j exp(cos(e_i,
        e_j) / t)`` over the other items j, which drives items apart (uniformity).
        """
        settings, n_items = self.settings.pretraining, aggregate.n_items
        places = choose(aggregate.keys.numel(), settings.batch_size, key).to(aggregate.keys.device)
        items, inverse = (aggregate.keys[places] % n_items).unique(return_inverse=True)
        if items.numel() < 2:
            return aggregate
        places = torch.zeros_like(items).index_copy_(0, inverse, places)  # one table of each item
        rows = state.items[items].requires_grad_()
        final = rows / (self.settings.model.n_layers + 1)
        if state.neighbours is not None:
            final = final + state.neighbours[1][items]
        with one_thread():
            (gradient,) = torch.autograd.grad(crowding(final, settings.temperature), rows)
        step = (gradient * -(settings.continued * self.settings.client.learning_rate)).to(torch.float64)
        sums = aggregate.sums.index_add(0, places, step.mul_(FIXED_POINT).round_())
        return replace(aggregate, sums=sums)

    def _views(self, aggregate: Aggregate, everyone: Tensor, key: Key) -> list[Bipartite]:
        """The two views of the graph of ``everyone`` [n], each of other clients, like a round of training, and of edges
        that were protected independently."""
        graphs, dropout = [], self.settings.pretraining.node_dropout
        assert aggregate.edges is not None
        for view in range(2):
            selected = uniform(key.fold("view", view).spread(everyone), 1).squeeze(1) >= dropout
            number = view % self.n_views
            graphs.append(neighbourhood.graph(aggregate.edges, number, len(everyone), aggregate.n_items, selected))
        return graphs


def crowding(vectors: Tensor, temperature: float) -> Tensor:
    """``sum_i log( 1/(b - 1) sum_{j != i} exp(cos(x_i, x_j) / t) )`` over ``vectors`` [b, d], a scalar.

    It is what InfoNCE has for the negatives (Wang and Isola, ICML 2020): the less, the more evenly directions are
    spread.
    """
    unit = functional.normalize(vectors, dim=1)
    cosines = (unit @ unit.T / temperature).masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
    return (cosines.logsumexp(1) - math.log(len(unit) - 1)).sum()


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
