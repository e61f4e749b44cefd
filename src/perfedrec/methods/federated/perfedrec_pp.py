"""PerFedRec++ (Luo et al., ACM TIST 2024, arXiv 2305.06622): PerFedRec preceded by self-supervised pre-training.

Two kinds of pre-training: the paper's contrastive one, on two views of the graph that the privacy mechanisms
themselves produce, and spectral pre-training by federated subspace iteration, our extension.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.algorithm import Phase
from perfedrec.core.keys import Key, fold_in, normal, uniform
from perfedrec.core.sampling import choose
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows, Spec, Update
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.neighbourhood import Service
from perfedrec.methods.federated.network import Broadcast
from perfedrec.methods.federated.perfedrec import ClientState, PerFedRec, State
from perfedrec.methods.federated.phases import CLUSTERS, SPECTRAL
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.nn.losses import info_nce
from perfedrec.nn.propagation import Bipartite, edge_weights
from perfedrec.nn.segments import segment_sum
from perfedrec.nn.views import noisy_lightgcn
from perfedrec.privacy import uploads
from perfedrec.privacy.mechanisms import share_scale

TRUSTED = 2.0
"""An item takes part in noisy passes if its released degree is so many standard deviations of the noise above 0."""


class PerFedRecPP(PerFedRec):
    """PerFedRec++ (Luo et al., TIST 2024): PerFedRec with the phases of pre-training in its prelude.

    Departs from the paper, besides what PerFedRec does: contrastive pre-training has two independently protected graphs
    and no raw edge, and starts from small vectors; spectral pre-training, and a mix with the model that it ends with,
    are ours.
    """

    @property
    def joins(self) -> bool:
        return self.neighbours or self.settings.pretraining.kind == "contrastive"

    def _pretraining(self) -> list[Phase]:
        pretraining, phases = self.settings.pretraining, list[Phase]()
        if pretraining.kind == "spectral":
            phases += [SPECTRAL] * pretraining.passes
            phases += [CLUSTERS] * (pretraining.cluster_passes if self.settings.clusters.enabled else 0)
        return phases

    @property
    def n_views(self) -> int:
        pretraining = self.settings.pretraining
        return 2 if pretraining.kind == "contrastive" and pretraining.edge_perturbation else 1

    def init(self, spec: Spec, key: Key) -> State:
        state = super().init(spec, key)
        if self.settings.pretraining.kind == "spectral":
            state = self._restart(state, orthonormal(state.items))
        return state

    @property
    def noisy(self) -> bool:
        """Whether spectral pre-training is done under noise."""
        return self.settings.privacy.noise.spectral > 0

    def client(
        self, phase: str, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        if phase not in ("spectral", "clusters"):
            return super().client(phase, broadcast, rows, client_state, key)
        ones, privacy = torch.ones(rows.n_users, device=rows.users.device), self.settings.privacy
        told = rows if self.sums else self._labelled(broadcast, rows, client_state, key.fold("labels"))
        product = gram_rows(broadcast.items, told, broadcast.degrees)
        if self.noisy:
            # The first direction is known from the degrees, and would take most of the bound; so would rare items.
            product[:, 0] = 0
            product *= trusted(broadcast.items)[rows.items, None]
        product = uploads.stretched(product, told.segments, rows.n_users, privacy)
        keys = fold_in(key.fold("noise").spread(rows.users)[told.segments], told.items)
        product = uploads.protect(product, privacy, keys)
        reporting = self.settings.clusters.enabled and not self.sums
        reports = self._report(broadcast, told, client_state.vectors, key) if reporting else None
        part = Update(rows.users, broadcast.groups, ones, told.segments, told.items, product, reports=reports)
        return uploads.bounded(part, privacy, phase), client_state

    def _prepare(self, state: State, phase: str, aggregate: Aggregate, key: Key) -> State:
        state = super()._prepare(state, phase, aggregate, key)
        if phase == "degrees" and self.noisy:
            sums = torch.zeros_like(state.degrees).index_copy_(0, aggregate.keys, from_fixed(aggregate.sums).squeeze(1))
            known = sums > TRUSTED * self._noise("degrees", aggregate.clients, state)
            state = self._restart(state, deflated(state.items, state.degrees, known))
        if phase == "spectral":
            image = torch.zeros_like(state.items).index_copy_(0, aggregate.keys, from_fixed(aggregate.sums))
            energy = float((state.items * image).sum())  # about the sum of the leading squared singular values
            if self.settings.privacy.noise_scale:  # of parts that were stretched: the first value is known to be 1
                energy /= max(float(torch.linalg.matrix_norm(image, 2)), 1e-12)
            basis = self._next_basis(state, image, aggregate.clients)
            state = replace(
                self._restart(state, basis), pretrained=basis.clone() if self.settings.personal.pretrained else None
            )
            if self.settings.model.encoder == "lightgcn" and self.phases[state.round - 1 :].count(SPECTRAL) == 1:
                state = self._scale(state, energy)
            if self.sums and self.phases[state.round : state.round + 1] == [CLUSTERS]:
                state = self._cluster(state, key.fold("cluster"))
        elif phase == "clusters" and state.offsets is not None:
            fill_clusters(state.offsets, state.items, aggregate)
        return state

    def _noise(self, phase: str, clients: int, state: State) -> float:
        """Standard deviation of the noise in the sums of so many clients in a phase that asked everybody."""
        law, scale = share_scale(self.settings.privacy, phase, state.service.reports.shape[0])
        return float(scale * (clients * (2 if law == "laplace" else 1)) ** 0.5)

    def _next_basis(self, state: State, image: Tensor, clients: int) -> Tensor:
        """The basis of the next pass, or that which the last one ends with."""
        if not self.noisy:
            return orthonormal(image)
        known = trusted(state.items)
        if self.phases[state.round - 1 :].count(SPECTRAL) > 1:
            return deflated(image, state.degrees, known)
        return denoised(image, state.degrees, known, self._noise("spectral", clients, state) ** 2)

    def _scale(self, state: State, energy: float) -> State:
        """Bring the singular vectors to the scale of LightGCN's first vectors, items ``V`` and users ``N V`` alike."""
        (n_items, dim), n_users = state.items.shape, state.service.reports.shape[0]
        scale = self.settings.model.init_scale * n_items**0.5
        lift = (n_users * dim / (max(energy, 1e-12) * n_items)) ** 0.5
        return replace(self._restart(state, state.items * scale), lift=lift)

    def _pretrained(
        self, service: Service, phase: str, aggregate: Aggregate, key: Key
    ) -> tuple[Service, Tensor | None]:
        """Contrastive pre-training; the table comes back by token, the users find their vectors at the service.

        It starts from small random vectors (at this point the users' own are random as well) and is brought to the
        scale of the model afterwards: the loss sees directions alone, and Adam turns small vectors quickly.
        """
        settings, model = self.settings.pretraining, self.settings.model
        if settings.kind != "contrastive" or phase != "join" or not aggregate.clients:
            return service, None
        assert service.graph is not None
        assert aggregate.edges is not None
        key, n_items, device = key.fold("contrast"), aggregate.n_items, service.reports.device
        everyone, every_item = (torch.arange(n, device=device) for n in (len(service.reports), n_items))
        start = [
            normal(key.fold(side).spread(nodes), model.embedding_dim) * settings.init_scale
            for side, nodes in (("users", everyone), ("items", every_item))
        ]
        graphs = []
        for broadcast in range(2):  # each one selects its own clients, as a round of training does
            selected = uniform(key.fold("view", broadcast).spread(everyone), 1).squeeze(1) >= settings.node_dropout
            number = broadcast % self.n_views
            graphs.append(neighbourhood.graph(aggregate.edges, number, len(everyone), n_items, selected))
        n_layers = max(model.n_layers, 1)  # without propagation no view would know its graph
        users, table = contrast(graphs, start[0], start[1], n_layers, settings, key)
        users, table = users * (model.init_scale / table.std()), table * (model.init_scale / table.std())
        layers = torch.stack([users, service.graph.to_users(table)], dim=1)[:, : service.reports.shape[1]]
        return replace(service, start=users, reports=layers.contiguous()), table


def gram_rows(basis: Tensor, rows: Rows, degrees: Tensor) -> Tensor:
    """[R, d] each client's part of ``N^T N Omega``: ``n_u (n_u^T Omega)`` on the rows of its own items.

    ``N = D_u^-1/2 R D_i^-1/2`` and ``n_u`` its row; ``basis`` [m, d] is Omega. The Frobenius norm of a client's part is
    at most ``||n_u||^2 <= 1`` for an orthonormal basis.
    """
    weights = edge_weights(rows, degrees)[:, None]
    projection = segment_sum(weights * basis.index_select(0, rows.items), rows.segments, rows.n_users)
    return weights * projection.index_select(0, rows.segments)


def trusted(basis: Tensor) -> Tensor:
    """[m] the items of a noisy pass: rows of the others are 0 in the basis [m, d], but for its first column."""
    return basis[:, 1:].any(1)


def deflated(matrix: Tensor, degrees: Tensor, known: Tensor) -> Tensor:
    """[m, d] an orthonormal basis whose first column is ``sqrt(degrees)``, the first singular vector of ``N``.

    The others span what the columns of ``matrix`` [m, d] but the first have besides it. All over the ``known`` [m]
    items alone.
    """
    first = degrees.sqrt()[:, None]
    return orthonormal(torch.cat([first, matrix[:, 1:]], dim=1) * known[:, None]) * known[:, None]


def denoised(image: Tensor, degrees: Tensor, known: Tensor, variance: float) -> Tensor:
    """[m, d] the basis that a last pass ends with whose sums ``image`` [m, d] hold noise of a ``variance``.

    Wiener filters, which cost no privacy. Rows: the noise is the same on each, the signal grows with an item's degree;
    each row of a ``known`` [m] item is multiplied by the share of signal in the mean energy of those of about its
    degree. Directions: each one is weighted by the root of its singular value. The first column is ``sqrt(degrees)``,
    of length 1.
    """
    result = torch.zeros_like(image)
    result[:, 0] = functional.normalize(degrees.sqrt(), dim=0)
    rows, own = image[known, 1:], degrees[known]
    if not rows.numel():
        return result
    energy, order = rows.square().sum(1), own.argsort(stable=True)
    width = max(rows.shape[0] // 40, 1)
    ranked = functional.pad(energy[order][None, None], (width // 2, (width - 1) // 2), mode="replicate")
    mean = functional.avg_pool1d(ranked, width, 1)[0, 0]
    signal = torch.empty_like(mean)
    signal[order] = (1 - rows.shape[1] * variance / mean.clamp(min=1e-30)).clamp(min=0)
    first = functional.normalize(own.sqrt(), dim=0)[:, None]
    rest = rows * signal[:, None]
    rest = (rest - first * (first.T @ rest)).to(torch.float64)
    with one_thread():
        left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    weighted = left * (values / values[:1].clamp(min=1e-30)).sqrt()
    result[known, 1:] = _widened(weighted, image.shape[1] - 1)
    return result


def orthonormal(matrix: Tensor) -> Tensor:
    """[m, d] an orthonormal basis of the columns, by QR in float64; the last columns are zero where m < d."""
    with one_thread():
        basis: Tensor = torch.linalg.qr(matrix.to(torch.float64))[0]
    return _widened(basis, matrix.shape[1])


def _widened(columns: Tensor, dim: int) -> Tensor:
    """[m, d] float32 of [m, min(m, d)]."""
    return torch.nn.functional.pad(columns, (0, dim - columns.shape[1])).to(torch.float32).contiguous()


def fill_clusters(offsets: Tensor, items: Tensor, aggregate: Aggregate) -> None:
    """Give each cluster the leading singular vectors of its own members' interactions, in place.

    The sum over a cluster's members of their parts of ``N^T N V`` is ``N_k^T N_k V``, one step of subspace iteration on
    the cluster's own matrix from the global basis ``V``. Its left singular vectors, scaled by the fourth root of their
    relative singular values, become the cluster's table: a score, which takes the table twice, then weights a direction
    by how much of the cluster's interactions it explains. Its right singular vectors turn the table to the coordinates
    of the global one, whose length it takes: no score changes by that, but members train both tables with one change,
    and score both with one user vector. ``offsets`` [K m, d], ``items`` [m, d].
    """
    n_items = items.shape[0]
    image = torch.zeros_like(offsets).index_copy_(0, aggregate.keys, from_fixed(aggregate.sums))
    for group in range(offsets.shape[0] // n_items):
        rows = slice(group * n_items, (group + 1) * n_items)
        if not bool(image[rows].any()):
            continue  # a cluster without members keeps the global model
        with one_thread():
            left, values, right = torch.linalg.svd(image[rows].to(torch.float64), full_matrices=False)
            length = items.norm() / min(items.shape) ** 0.5
            table = (left * (values / values[0]).clamp(min=0) ** 0.25) @ right * length
        offsets[rows] = _widened(table, items.shape[1]) - items


def contrast(
    graphs: list[Bipartite], users: Tensor, items: Tensor, n_layers: int, settings: PretrainingSettings, key: Key
) -> tuple[Tensor, Tensor]:
    """Adam on InfoNCE between two views of the graph (method of section 4.3 of the paper); loss = users + items.

    ``users`` [n, d] and ``items`` [m, d] are the vectors to start from; returns the trained ones.
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
