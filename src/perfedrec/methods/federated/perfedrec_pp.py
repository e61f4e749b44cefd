"""PerFedRec++ (Luo et al., ACM TIST 2024, arXiv 2305.06622): PerFedRec with self-supervised pre-training before it.

Pre-training is the paper's contrastive one (:mod:`perfedrec.methods.federated.contrastive`), on two views of the graph
that the privacy mechanisms produce; or, our extensions, the loss of another graph method on the same views
(:mod:`perfedrec.methods.federated.graph_losses`), or federated subspace iteration
(:mod:`perfedrec.methods.federated.spectral`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.algorithm import Phase
from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.core.types import Plan, Published, Rows, Spec, Update
from perfedrec.methods.federated import neighbourhood, spectral, summing
from perfedrec.methods.federated.contrastive import Contrastive
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.phases import CLUSTERS, DEGREES, JOIN, SIZES, SPECTRAL
from perfedrec.methods.federated.state import (
    Clusters,
    LowRank,
    PerFedRecBroadcast,
    PerFedRecClient,
    PerFedRecState,
    Pretrained,
    Service,
)
from perfedrec.nn.propagation import Bipartite
from perfedrec.privacy.protection import MISSING

LEAST_ENERGY = 0.01
"""The least energy of passes that is taken for true. Honest ones keep the first singular value, which is 1; forged ones
can make the sum negative, and users' first vectors would grow without limit."""


class PerFedRecPP(PerFedRec, Contrastive[PerFedRecState, PerFedRecBroadcast, PerFedRecClient]):
    """PerFedRec++ (Luo et al., TIST 2024): PerFedRec with pre-training phases before it.

    Departs from the paper, in addition to PerFedRec's differences: contrastive pre-training uses two independently
    protected graphs and no other edges, and starts from small vectors; spectral pre-training, and the mix with the
    model that it ends with, are ours.
    """

    leaves_rows_unread = True
    scored_in_numpy = True

    @property
    def service_pretrains(self) -> bool:
        pretraining = self.settings.pretraining
        return pretraining.kind == "spectral" and pretraining.at == "service" and not self.sums

    @cached_property
    def pretraining_phases(self) -> tuple[Phase, ...]:
        pretraining = self.settings.pretraining
        if pretraining.kind != "spectral" or self.service_pretrains:
            return ()
        privacy = self.settings.privacy
        noisy = self.sums and bool(privacy.noise.any or privacy.epsilon)  # a cluster's model would be made of noise
        fills = self.clusters.enabled and not privacy.low_rank and not noisy
        filling = pretraining.cluster_passes if fills else 0
        return (SPECTRAL,) * pretraining.passes + (CLUSTERS,) * filling

    @property
    def clustering_phases(self) -> tuple[Phase, ...]:
        if self.service_pretrains:
            return (CLUSTERS,) * (self.settings.pretraining.cluster_passes if self.clusters.enabled else 0)
        fills = self.clusters.enabled and self.subspace is not None and self.pretrains_basis
        return (SIZES, CLUSTERS) if fills else ()

    @property
    def _clusters_once(self) -> bool:
        return CLUSTERS in self.phases

    @property
    def noisy(self) -> bool:
        """Whether spectral pre-training has noise."""
        return self.protection.multiplier(SPECTRAL.name) > 0 if self.pretrains_basis else False

    def asked_before_training(self, n_users: int) -> int:
        most = self.settings.pretraining.clients
        return min(n_users, most) if self.service_pretrains and most else n_users

    def remarks(self, n_users: int) -> list[str]:
        found, asked = super().remarks(n_users), self.asked_before_training(n_users)
        if asked == n_users:
            return found
        return [
            *found,
            f"pre-training asks a sample of {asked:,} of {n_users:,} clients (pretraining.clients); all clients make "
            "their first vectors and choose their clusters themselves, and have no lists of the neighbourhood model",
        ]

    def plan(self, state: PerFedRecState, key: Key) -> Plan:
        plan, asked = super().plan(state, key), self.asked_before_training(state.n_users)
        if asked == state.n_users or plan.phase not in (JOIN.name, CLUSTERS.name):
            return plan
        return Plan(plan.phase, choose(state.n_users, asked, key).sort().values.to(plan.cohort.device))

    # --- the clients ---

    def client(
        self, phase: str, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient, key: Key
    ) -> tuple[Update, PerFedRecClient]:
        if phase not in (SPECTRAL.name, SIZES.name, CLUSTERS.name) or broadcast.probe is not None:
            return super().client(phase, broadcast, rows, client_state, key)
        if phase != SPECTRAL.name and broadcast.centroids is not None and bool((broadcast.groups < 0).any()):
            nearest = summing.assign(broadcast.centroids, self._first_layers(broadcast, rows).mean(1))
            broadcast = replace(broadcast, groups=nearest)
        if phase == SIZES.name:
            return self._placing(broadcast, rows), client_state
        shown = self.handover.labelled(rows, broadcast.items.shape[0], client_state, key.fold("labels"))
        if self.noisy:
            # The first direction follows from the degrees and would use up most of the bound; so would rare items.
            product = spectral.taste_rows(broadcast.items, shown, broadcast.degrees, self.exponents)
            product[:, 0] = 0
            product *= spectral.trusted(broadcast.items)[rows.items, None]
        else:
            product = spectral.gram_rows(broadcast.items, shown, broadcast.degrees, self.exponents)
        reports = None
        if self.clusters.enabled and not self.sums and not self.service_pretrains:
            reports = self._first_layers(broadcast, shown)
        ones = torch.ones(rows.n_users, device=rows.users.device)
        groups, segments, items = broadcast.groups, shown.segments, shown.items
        return Update(rows.users, groups, ones, segments, items, product, reports=reports), client_state

    def _first_layers(self, broadcast: PerFedRecBroadcast, rows: Rows) -> Tensor:
        """[B, L, d] the users' layers from their items alone, by which users are clustered before training: their own
        vectors are still random numbers. Items have the size of the first vectors of training, so that users' layers
        stand out from noise as they do there."""
        items = broadcast.items
        scale = self.settings.model.init_scale * items.numel() ** 0.5 / items.norm().clamp(min=1e-12)
        none = items.new_zeros(rows.n_users, self.n_private())
        return self.layers(replace(broadcast, items=items * scale), rows, none)

    def _placing(self, broadcast: PerFedRecBroadcast, rows: Rows) -> Update:
        """Each client's part of the clusters' sizes: 1 for its own cluster."""
        centroids, none = broadcast.centroids, torch.zeros_like(broadcast.groups)
        n_clusters = 1 if centroids is None else centroids.shape[0]
        own = functional.one_hot(broadcast.groups, n_clusters).to(torch.float32)
        return Update(rows.users, none, torch.ones(rows.n_users, device=none.device), dense=own)

    # --- the server ---

    def n_groups(self, state: PerFedRecState) -> int:
        centroids = state.clusters.centroids
        if self.subspace is not None and self.phase(state) == CLUSTERS.name and centroids is not None:
            return centroids.shape[0]
        return super().n_groups(state)

    def init(self, spec: Spec, key: Key) -> PerFedRecState:
        state = super().init(spec, key)
        return self.restart(state, spectral.orthonormal(state.items)) if self.pretrains_basis else state

    def prepare(self, state: PerFedRecState, phase: str, aggregate: Aggregate, key: Key) -> PerFedRecState:
        state = super().prepare(state, phase, aggregate, key)
        if phase == DEGREES.name and self.noisy:
            sums = torch.zeros_like(state.degrees).index_copy_(0, aggregate.keys, from_fixed(aggregate.sums).squeeze(1))
            deviation = self._deviation(DEGREES, aggregate.clients, state)
            known = sums > spectral.TRUSTED * deviation
            state = self.restart(state, spectral.deflated(state.items, state.degrees, known))
        if phase == SPECTRAL.name and self.pretrains_basis:
            state = self._iterate(state, aggregate, key)
        if SIZES in self.phases[state.round : state.round + 1]:
            first = summing.first_centroids(state.items, self.clusters.n_clusters, key.fold("cluster"))
            state = replace(state, clusters=replace(state.clusters, centroids=first))
        if phase == SIZES.name and aggregate.dense is not None:
            state = self._dissolved(state, from_fixed(aggregate.dense))
        elif phase == CLUSTERS.name and state.offsets is not None:
            spectral.fill_clusters(state.offsets, state.items, aggregate)
        return state

    def _dissolved(self, state: PerFedRecState, sizes: Tensor) -> PerFedRecState:
        """The state without clusters of so few users that a sum over those who answer could have too few of them.
        ``sizes`` [K] of the clusters."""
        centroids, kept = state.clusters.centroids, sizes * (1 - MISSING) >= self.settings.privacy.min_clients
        if centroids is None or state.offsets is None or int(kept.sum()) < 2:
            return replace(state, clusters=Clusters(), offsets=None)
        offsets = state.offsets[: int(kept.sum()) * state.items.shape[0]]
        return replace(state, clusters=Clusters(centroids=centroids[kept]), offsets=offsets)

    def _iterate(self, state: PerFedRecState, aggregate: Aggregate, key: Key) -> PerFedRecState:
        """The state after one pass of subspace iteration."""
        items, image = state.items, torch.zeros_like(state.items)
        image.index_copy_(0, aggregate.keys, from_fixed(aggregate.sums))
        energy = float((state.items * image).sum())  # approximately the sum of the leading squared singular values
        if self.noisy or self.settings.privacy.noise_scale:  # parts were scaled to the bound; the true first value is 1
            energy /= max(float(torch.linalg.matrix_norm(image, 2)), 1e-12)
        if self.noisy:
            deviation = self._deviation(SPECTRAL, aggregate.clients, state)
            images = spectral.remembered(state.pretrained.images, image, deviation)
            basis = self._denoised(state, images, image)
        else:
            images, basis = None, spectral.orthonormal(image)
        table = basis.clone() if self.settings.personal.pretrained else None
        images = None if self._is_last(state) else images
        state = replace(self.restart(state, basis), pretrained=replace(state.pretrained, table=table, images=images))
        if self.sums and (self.diffuses or self.makes_neighbours):
            state = replace(state, low_rank=self._low_rank(state, items, image))
        if self.network.encoder == "lightgcn" and self._is_last(state):
            state = self._scaled(state, energy)
        if self.makes_neighbours and self._is_last(state):
            state = self._with_neighbours(state)
        if self.sums and self.phases[state.round : state.round + 1] == (CLUSTERS,):
            state = self.recluster(state, key.fold("cluster"))
        return state

    def _with_neighbours(self, state: PerFedRecState) -> PerFedRecState:
        """The state with neighbour sums that the server makes of the passes."""
        factor, scale = state.low_rank.factor, state.pretrained.user_init_scale
        assert factor is not None
        assert scale is not None
        assert state.degrees is not None
        length = float(state.degrees.sum()) / state.n_users
        layers = spectral.neighbour_layers(factor, state.items, state.degrees, self.exponents, length, scale)
        neighbours = neighbourhood.published(layers[: self.handover.n_summed])
        return replace(state, neighbours=neighbours, low_rank=state.low_rank if self.diffuses else LowRank())

    def _low_rank(self, state: PerFedRecState, probe: Tensor, image: Tensor) -> LowRank:
        """The neighbourhood model after a pass of ``probe`` [m, d] with its ``image`` [m, d]: all passes together.
        With noise it has the final basis, which all passes are in already."""
        if self.noisy:
            return LowRank(state.items.clone() if self._is_last(state) else None)
        before = state.low_rank
        probes = probe if before.probes is None else torch.cat([before.probes, probe], dim=1)
        images = image if before.images is None else torch.cat([before.images, image], dim=1)
        if self._is_last(state):
            return LowRank(spectral.nystroem(probes, images))
        return LowRank(probes=probes, images=images)

    def _is_last(self, state: PerFedRecState) -> bool:
        """Whether the pass that was just played was the last one. ``state.round`` already counts it."""
        return self.phases[state.round - 1 :].count(SPECTRAL) == 1

    def _deviation(self, phase: Phase, clients: int, state: PerFedRecState) -> float:
        """Standard deviation of the noise in the sums of ``clients`` clients, in a phase in which all users were
        asked."""
        law, scale = self.protection.share_scale(phase.name, state.n_users)
        return float(scale * (clients * (2 if law == "laplace" else 1)) ** 0.5)

    def _denoised(self, state: PerFedRecState, images: Tensor, image: Tensor) -> Tensor:
        """The basis after a noisy pass, from the ``images`` [m, w] of all so far, of which ``image`` [m, d] is the
        newest: for the next pass, with directions of equal length, or the final one."""
        last, known = self._is_last(state), spectral.trusted(state.items)
        basis = spectral.denoised(images, state.degrees, known, image.shape[1], power=0.5 if last else 0.0)
        if last:
            return basis
        if not bool(basis[:, 1:].any()):  # no signal yet, so any directions will do
            return spectral.deflated(image, state.degrees, known)
        return basis * known[:, None]

    def _scaled(self, state: PerFedRecState, energy: float) -> PerFedRecState:
        """Scale the singular vectors to the size of LightGCN's first vectors: items ``V`` and users ``N V`` alike."""
        n_items, dim = state.items.shape
        scale = self.settings.model.init_scale * n_items**0.5
        user_scale = (state.n_users * dim / (max(energy, LEAST_ENERGY) * n_items)) ** 0.5
        return replace(
            self.restart(state, state.items * scale),
            pretrained=Pretrained(state.pretrained.table, user_init_scale=user_scale),
        )

    # --- the service ---

    def use_graph(
        self, service: Service, published: Published, graph: Bipartite, counts: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """Spectral pre-training by the service, on its graph: it asks the clients for nothing more than their edges."""
        service, published = super().use_graph(service, published, graph, counts, key)
        if not self.service_pretrains:
            return service, published
        model, passes = self.settings.model, self.settings.pretraining.passes
        own, least = key.fold("spectral"), self.defence.holders
        table = neighbourhood.leading(graph, model.embedding_dim, passes, own, self.exponents, least, counts)
        user_init_scale, start = None, None
        if self.network.encoder == "lightgcn":  # items and users get the size of LightGCN's first vectors
            table = table * (model.init_scale * table.shape[0] ** 0.5)
        below = graph.normalised(self.exponents).to_users(table)
        below = below * service.share ** self.exponents[1]  # an item has more users than those that the service knows
        if self.network.encoder == "lightgcn":
            user_init_scale = model.init_scale / float(below.square().mean().sqrt().clamp(min=1e-12))
            start = below * user_init_scale
        layers = torch.stack([below if start is None else start, below], dim=1)
        start = start if service.users is None else None
        service = replace(service, start=start, reports=layers[:, : service.reports.shape[1]].contiguous())
        return service, replace(published, table=table, user_init_scale=user_init_scale)

    def coordinate(
        self, state: PerFedRecState, phase: str, aggregate: Aggregate, published: Published, key: Key
    ) -> PerFedRecState:
        state = super().coordinate(state, phase, aggregate, published, key)
        if published.table is None or not self.service_pretrains:
            return state
        table = published.table.clone() if self.settings.personal.pretrained else None
        return replace(state, pretrained=Pretrained(table, user_init_scale=published.user_init_scale))

    def serve(
        self, service: Service, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """The service's part of a round, with a first clustering if the next phase fills the cluster models."""
        service, published = super().serve(service, phase, played, aggregate, centroids, key)
        last = JOIN if self.service_pretrains else SPECTRAL
        fills = phase == last.name and self.phases[played : played + 1] == (CLUSTERS,)
        if fills and aggregate.clients:
            published = self.clustered(service, published, centroids, key.fold("cluster"))
        return service, published
