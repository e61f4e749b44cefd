"""PerFedRec (Luo, Xiao and Song, CIKM 2022): a global model, one model per cluster of users, and one per user.

Decisions where the papers leave details open:

* A cluster's model is an offset from the global table. A member trains on the sum of both; its change updates the
  global table and the offset of its cluster, so that one objective is optimised on two levels.
* The local model is the client's own fine-tuned rows, stored as offsets from the table that it received.
* If clients contribute only to sums (``privacy.aggregation``), they assign themselves to clusters.
* The models are mixed by their scores, so that the part of each model in a recommendation is exact. If pre-training
  ends with a model that can recommend (our extension), it can be mixed in as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.errors import ConfigError
from perfedrec.core.inference import InferenceOptions
from perfedrec.core.keys import Key
from perfedrec.core.memory import give_back
from perfedrec.core.scoring import Scoring
from perfedrec.core.types import NEWCOMER, Embedding, Published, Rows, Spec, Update, items_of, of_users
from perfedrec.methods.federated import cohort, neighbourhood, summing
from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.network import Network
from perfedrec.methods.federated.personal import (
    MODELS,
    N_SETTINGS,
    UNTRAINED,
    Mixture,
    Setting,
    logits_of,
    shares_of,
    step,
    turns,
)
from perfedrec.methods.federated.phases import JOIN, SPECTRAL
from perfedrec.methods.federated.settings import ClusterSettings, NeighbourhoodSettings, PerFedRecSettings
from perfedrec.methods.federated.state import (
    Clusters,
    LowRank,
    PerFedRecBroadcast,
    PerFedRecClient,
    PerFedRecState,
    Service,
)
from perfedrec.nn.propagation import Bipartite, edge_weights
from perfedrec.nn.segments import segment_sum
from perfedrec.privacy.labels import Labels


class PerFedRec(GraphMethod[PerFedRecState, PerFedRecBroadcast, PerFedRecClient]):
    """PerFedRec (Luo, Xiao and Song, CIKM 2022) as pure functions over explicit state.

    Departs from the paper: users of a cluster are selected at random, in proportion to its size; the cluster models are
    offsets from the global one; models are mixed by their scores; a client has its items' neighbour sums instead of the
    neighbours; attributes are an option; the server's optimiser is an option, FedAvg in the paper.
    """

    Options = PerFedRecSettings
    settings: PerFedRecSettings
    broadcast_type = PerFedRecBroadcast
    chooses_table = True
    leaves_rows_unread = True
    scored_in_numpy = True

    @property
    def clusters(self) -> ClusterSettings:
        """The options of clustering."""
        return self.settings.clusters

    @cached_property
    def network(self) -> Network:
        model = self.settings.model
        return Network(model.embedding_dim, model.n_layers, model.encoder, model.attributes)

    @property
    def exponents(self) -> tuple[float, float]:
        """Those of the degrees of users and items in spectral pre-training."""
        pretraining = self.settings.pretraining
        return pretraining.user_exponent, pretraining.item_exponent

    @property
    def neighbours(self) -> bool:
        """Whether there are neighbour sums. They are layers of LightGCN; the spectral encoder has none."""
        model = self.settings.model
        return model.neighbours and model.encoder == "lightgcn" and model.n_layers > 0

    @property
    def diffuses(self) -> bool:
        """Whether there is a neighbourhood model."""
        return self.settings.personal.neighbourhood > 0

    @property
    def service_pretrains(self) -> bool:
        """Whether the neighbourhood service finds the singular vectors of spectral pre-training."""
        return False

    @property
    def joins(self) -> bool:
        return super().joins or self.service_pretrains or (self.diffuses and not self.sums)

    @property
    def reports_vectors(self) -> bool:
        return not self.sums and (self.joins or self.clusters.enabled)

    def remarks(self, n_users: int) -> list[str]:
        found, given, usual = super().remarks(n_users), self.settings.neighbourhood, NeighbourhoodSettings()
        changed = [name for name in type(given).model_fields if getattr(given, name) != getattr(usual, name)]
        why = "personal.neighbourhood is 0"
        if self.diffuses:
            changed = [name for name in changed if self.sums and name in ("gamma", "list_length")]
            why = f"no service makes lists for users with privacy.aggregation = {self.settings.privacy.aggregation}"
        return found + [f"neighbourhood.{name}: without effect, because {why}" for name in changed]

    # --- the server ---

    def n_tables(self) -> int:
        return self.clusters.n_clusters if self.clusters.enabled else 0

    @property
    def trains_clusters(self) -> bool:
        """Whether cluster models are trained in every round. In sums of low rank they are not: a cohort has few members
        of a cluster, and their sum would tell much about each of them."""
        return self.clusters.enabled and not self.settings.privacy.low_rank

    @property
    def _clusters_once(self) -> bool:
        """Whether users are clustered before training, and then stay in their clusters: a cluster's model does not
        follow users into another cluster."""
        return False

    def _clusters_after(self, trained: int) -> bool:
        """Whether users are clustered after ``trained`` rounds of training."""
        return not self._clusters_once and self.clusters.due(trained)

    def table_share(self, state: PerFedRecState) -> float:
        return self.clusters.learning_rate if self.trains_clusters and state.clusters.centroids is not None else 0.0

    def n_models(self, state: PerFedRecState) -> int:
        return self.clusters.n_clusters if self.trains_clusters and state.clusters.centroids is not None else 1

    def n_models_of(self, broadcast: PerFedRecBroadcast) -> int:
        return 1 if broadcast.offsets is None or not self.trains_clusters else self.clusters.n_clusters

    def contributes_to(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> Tensor:
        return broadcast.groups if self.trains_clusters else torch.zeros_like(broadcast.groups)

    def _init_dense(self, spec: Spec, key: Key) -> Tensor | None:
        return self.network.init(spec, key, self.settings.model.init_scale)

    def init(self, spec: Spec, key: Key) -> PerFedRecState:
        attributes = self.settings.model.attributes
        if attributes and not spec.n_user_attributes and spec.item_attributes is None:
            raise ConfigError(
                "model.attributes is true, but the data set has no attributes; expected user_attributes.csv or "
                "item_attributes.csv next to the data"
            )
        fields, stats = self._graph(spec, key), None
        if not self.trains_clusters:
            fields["optimizer"] = replace(fields["optimizer"], offsets=None)
        elif self.sums:
            stats = fields["items"].new_zeros(self.clusters.n_clusters, self.settings.model.embedding_dim + 1)
        own = spec.item_attributes if attributes else None
        return PerFedRecState(**fields, clusters=Clusters(stats=stats), item_attributes=own)

    def groups(self, state: PerFedRecState, users: Tensor) -> Tensor:
        """[B] the users' clusters, -1 for users who find it themselves: new users, and all under sums; all 0 before the
        first clustering."""
        labels = state.clusters.labels
        if labels is None:
            return torch.full_like(users, -1 if state.clusters.centroids is not None else 0)
        return of_users(labels, users, -1)

    def select(self, state: PerFedRecState, key: Key) -> Tensor:
        selection, labels = self.settings.selection, state.clusters.labels
        if labels is not None and self.clusters.proportional and selection.sampling == "fixed":
            return cohort.select_proportional(labels, selection.n_clients_per_round, key)
        return super().select(state, key)

    def broadcast(self, state: PerFedRecState, users: Tensor) -> PerFedRecBroadcast:
        received, centroids, trained = self._received(state, users), state.clusters.centroids, self.trained(state)
        asks = state.clusters.labels is None or bool((received["groups"] < 0).any())
        counts = self.sums and self.trains_clusters and centroids is not None and not self._clusters_once
        return PerFedRecBroadcast(
            **received,
            offsets=None if centroids is None else state.offsets,
            item_attributes=state.item_attributes,
            pretrained=state.pretrained.table,
            **(self._neighbourhood(state, users) if state.served else {}),
            user_init_scale=state.pretrained.user_init_scale,
            trained=trained > 0,
            mix=state.mix if state.served else None,
            beta=state.beta if state.served else None,
            turn=state.turn if state.served else None,
            centroids=centroids if asks else None,
            cluster_stats=counts and trained < self.clusters.stop,
        )

    def _neighbourhood(self, state: PerFedRecState, users: Tensor) -> dict[str, Any]:
        """The fields of the neighbourhood model, by name. New users have no lists."""
        near, nearness, factor = state.service.near, state.service.nearness, state.low_rank.factor
        if near is None or nearness is None:
            return {"low_rank": factor}
        near, nearness = of_users(near, users, -1), of_users(nearness, users, 0)
        near = near if state.tokens is None else items_of(near, state.tokens)
        return {"low_rank": factor, "near": near, "nearness": nearness}

    def group_weights(self, state: PerFedRecState, aggregate: Aggregate) -> Tensor:
        """[G] the divisor of each group's sums. If nobody knows who is in which cluster, it is the cluster's share of
        the expected number of clients."""
        if not self.sums:
            return from_fixed(aggregate.weights)
        shares = state.clusters.shares
        shares = from_fixed(aggregate.weights).new_ones(self.n_models(state)) if shares is None else shares
        size = min(self.settings.selection.n_clients_per_round, state.n_users)
        weights: Tensor = shares * (size / shares.sum())
        return weights

    def server_step(self, state: PerFedRecState, aggregate: Aggregate) -> None:
        super().server_step(state, aggregate)
        stats, n_dense = state.clusters.stats, 0 if state.dense is None else state.dense.numel()
        if stats is not None and aggregate.dense is not None and aggregate.dense.numel() > n_dense:
            stats.add_(from_fixed(aggregate.dense[n_dense:]).view_as(stats))

    def pretrain(self, service: Service, aggregate: Aggregate, key: Key) -> tuple[Service, Published]:
        """What the service makes of its graph before training. Users' lists are compared once for all of it."""
        service, published = super().pretrain(service, aggregate, key)
        graph = service.graph
        if graph is None or not (self.diffuses or self.service_pretrains):
            return service, published
        give_back()  # this takes much memory, as the steps below do
        return self.use_graph(service, published, graph, neighbourhood.counted(graph, self.defence.alike), key)

    def use_graph(
        self, service: Service, published: Published, graph: Bipartite, counts: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """The neighbourhood model, in which users count as ``counts`` [n] says. Its lists stay at the service."""
        if self.diffuses:
            given, lists = self.settings.neighbourhood, service.users is None
            near, nearness, factor = neighbourhood.model(graph, key, given, self.defence.holders, counts, lists)
            service, published = replace(service, near=near, nearness=nearness), replace(published, low_rank=factor)
        return service, published

    def serve(
        self, service: Service, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """The service's part of a round, with a clustering of all users when one is due. It clusters the mean of the
        layers that each user reported last, starting from the last ``centroids``."""
        service, published = super().serve(service, phase, played, aggregate, centroids, key)
        if self._clusters_after(played - len(self.phases)):
            published = self.clustered(service, published, centroids, key)
        return service, published

    def clustered(self, service: Service, published: Published, centroids: Tensor | None, key: Key) -> Published:
        """What is published, with a clustering of the users that the service knows. Where these are a sample, there are
        no labels: all users find their cluster themselves."""
        labels, centroids = cohort.cluster(service.reports.mean(1), self.clusters.n_clusters, centroids, key)
        return replace(published, labels=labels if service.users is None else None, centroids=centroids)

    def centroids(self, state: PerFedRecState) -> Tensor | None:
        return state.clusters.centroids

    def coordinate(
        self, state: PerFedRecState, phase: str, aggregate: Aggregate, published: Published, key: Key
    ) -> PerFedRecState:
        state = super().coordinate(state, phase, aggregate, published, key)
        if published.low_rank is not None:
            state = replace(state, low_rank=LowRank(published.low_rank))
        return state

    def regroup(self, state: PerFedRecState, published: Published) -> PerFedRecState:
        clusters = replace(state.clusters, labels=published.labels, centroids=published.centroids)
        return replace(state, clusters=clusters)

    def cluster_by_sums(self, state: PerFedRecState, trained: int, key: Key) -> PerFedRecState:
        return self.recluster(state, key) if self.trains_clusters and self._clusters_after(trained) else state

    def recluster(self, state: PerFedRecState, key: Key) -> PerFedRecState:
        """The state with new clusters, from the sums of the clients that took part since the last clustering."""
        clusters = state.clusters
        assert clusters.stats is not None
        if clusters.centroids is None:
            first = summing.first_centroids(state.items, self.clusters.n_clusters, key)
            return replace(state, clusters=replace(clusters, centroids=first))
        centroids, shares = summing.recentre(clusters.centroids, clusters.stats)
        stats = torch.zeros_like(clusters.stats)
        return replace(state, clusters=replace(clusters, centroids=centroids, shares=shares, stats=stats))

    def serving(self, state: PerFedRecState) -> PerFedRecState:
        served, clusters, service = super().serving(state), replace(state.clusters, stats=None), state.service
        return replace(
            served,
            tokens=None if service.near is None else state.tokens,  # which name the items of the lists
            offsets=None if clusters.centroids is None else state.offsets,
            clusters=clusters,
            service=replace(served.service, near=service.near, nearness=service.nearness),
            low_rank=LowRank(state.low_rank.factor),
            served=True,
        )

    # --- what held-out items decide ---

    @cached_property
    def weights(self) -> Tensor:
        """[models] the weights of the personal models that the settings name."""
        personal = self.settings.personal
        weights = [personal.local, personal.cluster, personal.global_, personal.pretrained]
        return torch.tensor(weights + [personal.neighbourhood] * self.diffuses)

    @property
    def n_choices(self) -> int:
        return N_SETTINGS if self.settings.personal.chosen and turns(self._names(True, UNTRAINED)) else 1

    def _names(self, trained: bool, ready: Sequence[str]) -> list[str]:
        """The models of which the weight can be chosen. Before the first round of training it is those that are
        ``ready`` then."""
        names = [name for name, weight in zip(MODELS, self.weights.tolist(), strict=False) if weight > 0]
        return [name for name in names if trained or name in ready]

    def _ready(self, state: PerFedRecState) -> list[str]:
        """The models that recommend before training, as far as they are there. A coordinator knows it by the phases
        that were played: it may not have the models."""
        played, passes = self.phases[: state.round], self.phases.count(SPECTRAL)
        found = (JOIN if self.service_pretrains else SPECTRAL) in played
        made = played.count(SPECTRAL) == passes if self.sums else JOIN in played
        return ["pretrained"] * found + ["neighbourhood"] * made

    def _setting(self, chosen: PerFedRecState | PerFedRecBroadcast) -> Setting:
        """The setting that was chosen last."""
        beta = self.settings.neighbourhood.beta if chosen.beta is None else chosen.beta
        return Setting(self.weights if chosen.mix is None else chosen.mix, beta)

    def choose(self, state: PerFedRecState, number: int) -> PerFedRecState:
        if self.n_choices == 1:
            return state
        names = self._names(self.trained(state) > 0, self._ready(state))
        found = step(self._setting(state), names, state.turn, number)
        return replace(state, mix=found.weights, beta=found.beta, turn=state.turn + bool(turns(names)))

    def chosen_options(self, state: PerFedRecState) -> dict[str, float]:
        names = self._names(self.trained(state) > 0, self._ready(state))
        if state.mix is None or not turns(names):
            return {}
        shares = shares_of(state.mix, names, state.clusters.centroids is not None)
        found = {f"personal.{name}": share for name, share in shares.items()}
        return found | ({"neighbourhood.beta": self._setting(state).beta} if "neighbourhood" in names else {})

    # --- the clients ---

    def unread(self, phase: str) -> frozenset[str]:
        return frozenset() if self.settings.personal.learned else super().unread(phase)

    def init_clients(self, rows: Rows, key: Key) -> PerFedRecClient:
        mix = logits_of(self.weights.to(rows.users.device)).repeat(rows.n_users, 1)
        return PerFedRecClient(**self._graph_client(rows, key), mix=mix)

    def init_new_user(
        self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient
    ) -> PerFedRecClient:
        """After spectral pre-training a new user's vector starts at the sum of its items' vectors, with the weights of
        pre-training, scaled by ``user_init_scale``."""
        scale = broadcast.user_init_scale
        if scale is None:
            return client_state
        weights = edge_weights(rows, broadcast.degrees, self.exponents)[:, None]
        own = weights * broadcast.items.index_select(0, rows.items)
        return replace(client_state, private=scale * segment_sum(own, rows.segments, rows.n_users))

    def private_of(self, broadcast: PerFedRecBroadcast, client_state: PerFedRecClient) -> Tensor:
        """After spectral pre-training new users, for whom the service has no vector, keep that of
        :meth:`init_new_user`."""
        own = super().private_of(broadcast, client_state)
        if broadcast.start is None or broadcast.user_init_scale is None:
            return own
        return torch.where(broadcast.start.any(1, keepdim=True), own, client_state.private)

    def placed(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> PerFedRecBroadcast:
        """The broadcast with the nearest cluster as group of each client that assigns itself, and with the first vector
        of each client where the service, which knows a sample alone, sends none."""
        if self.service_pretrains and broadcast.start is None and broadcast.user_init_scale is not None:
            broadcast = replace(broadcast, start=self.init_new_user(broadcast, rows, client_state).private)
        if broadcast.centroids is None:
            return broadcast
        vectors = self.layers(broadcast, rows, self.private_of(broadcast, client_state)).mean(1)
        nearest = summing.assign(broadcast.centroids, vectors)
        own = nearest if self.sums else torch.where(broadcast.groups < 0, nearest, broadcast.groups)
        return replace(broadcast, groups=own)

    def clustering(self, broadcast: PerFedRecBroadcast) -> Tensor | None:
        return broadcast.centroids if broadcast.cluster_stats else None

    def item_attributes(self, broadcast: PerFedRecBroadcast) -> Tensor | None:
        return broadcast.item_attributes

    def hand_over(
        self,
        update: Update,
        broadcast: PerFedRecBroadcast,
        rows: Rows,
        labels: Labels,
        client_state: PerFedRecClient,
        key: Key,
    ) -> tuple[Update, PerFedRecClient]:
        if self.settings.personal.learned:
            mix = self.mixture(broadcast, rows, client_state).learned(key.fold("mix"))
            client_state = replace(client_state, mix=mix)
        return super().hand_over(update, broadcast, rows, labels, client_state, key)

    # --- recommending ---

    @property
    def inference(self) -> InferenceOptions | None:
        """``None`` also with networks of attributes, and where users learn their own weights."""
        known = not self.settings.model.attributes and not self.settings.personal.learned
        return super().inference if known else None

    def inference_options(self) -> dict[str, Any]:
        given = self.settings.neighbourhood
        return super().inference_options() | {
            "mixed": True,
            "exponents": self.exponents,
            "chooses_cluster": self.sums,
            "starts_itself": self.service_pretrains,
            "weights": tuple(self.weights.tolist()),
            "alpha": given.alpha,
            "beta": given.beta,
        }

    def mixture(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> Mixture:
        """The models of a block of users, and their weights."""
        broadcast = self.placed(broadcast, rows, client_state)
        private, mix = self.private_of(broadcast, client_state), client_state.mix
        if broadcast.mix is not None:
            mix = logits_of(broadcast.mix).expand_as(mix)
        models = self.network, self.finish, broadcast, rows, private, client_state.rows
        return Mixture(*models, mix, self.settings.neighbourhood)

    def ranked_alike(self, state: PerFedRecState, users: Tensor) -> Tensor:
        """By cluster, and last those who have no list of the neighbourhood model: several exponents ``beta`` take a
        product each for them, and none for the others."""
        groups, near = super().ranked_alike(state, users), state.service.near
        if near is None:
            return groups
        without = (near < 0).all(1)[users.clamp(min=0)] | (users == NEWCOMER)
        return groups + without * (self.clusters.n_clusters + 1)

    @property
    def ranked_at_once(self) -> int:
        return 2048  # the tables of items are made once for them

    def scoring(
        self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient, compared: bool = False
    ) -> Scoring:
        mixture = self.mixture(broadcast, rows, client_state)
        if self.n_choices == 1:
            return mixture.scoring()
        there = {"pretrained": broadcast.pretrained, "neighbourhood": broadcast.low_rank}
        names = self._names(broadcast.trained, [name for name, table in there.items() if table is not None])
        setting, order, turn = self._setting(broadcast), turns(names), broadcast.turn or 0
        if not compared or not order:
            return mixture.scoring([setting])
        settings = [step(setting, names, turn, number) for number in range(self.n_choices)]
        return mixture.scoring(settings, order[turn % len(order)])

    def scores(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> Tensor:
        """[B, m] scores of the personal model for all items."""
        return self.scoring(broadcast, rows, client_state).dense()

    def explain(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> dict[str, Tensor]:
        """The part [B, m] of each model in :meth:`scores`; the parts sum to the score."""
        return self.mixture(broadcast, rows, client_state).explain()

    def embedding(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> Embedding | None:
        """The final vectors of the model that all users share, and the users' clusters.

        This model is the global one or, before the first round of training, the pre-trained one if it then recommends
        alone.
        """
        mixture = self.mixture(broadcast, rows, client_state)
        alone = broadcast.pretrained is not None and not broadcast.trained
        model = mixture.parts["pretrained" if alone else "global"]
        groups = None if broadcast.offsets is None else mixture.broadcast.groups
        items = model.items(mixture.every, torch.zeros_like(mixture.every))
        return Embedding(model.finish(model.users), items, groups)

    def user_vectors(self, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient) -> Tensor | None:
        """[B, d] the users' vectors in the model of their cluster, which training scores."""
        return self.mixture(broadcast, rows, client_state).parts["cluster"].users
