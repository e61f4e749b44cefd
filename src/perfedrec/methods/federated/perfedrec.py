"""PerFedRec (Luo, Xiao and Song, CIKM 2022): a global model, one model per cluster of users, and each user's own.

Decisions where the papers are silent:

* A cluster's model is an offset from the global table. A member trains on the sum of both; its change moves the global
  table and the offset of its cluster, so that one objective is optimised at two levels.
* The local model is the client's own fine-tuned rows, kept as offsets from the table it received.
* Where clients contribute to sums alone (``privacy.aggregation``), they assign themselves to clusters, and add to their
  items' neighbour sums what has changed since they last did: the same computation, with nobody's vector in it.
* The models are mixed by their scores, which makes each one's part in a recommendation exact. Where pre-training ends
  with a model that can recommend (our extension), that one can be mixed in as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum, from_fixed
from perfedrec.core.algorithm import Phase
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key, bits, fold_in, normal
from perfedrec.core.sampling import paired, ranks
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Plan, Published, Rows, Spec, Update
from perfedrec.methods.federated import cohort, neighbourhood, summing
from perfedrec.methods.federated.base import Shim
from perfedrec.methods.federated.cohort import Average, Moments, sparse_step
from perfedrec.methods.federated.neighbourhood import Service
from perfedrec.methods.federated.network import Broadcast, Network
from perfedrec.methods.federated.personal import Mixture
from perfedrec.methods.federated.phases import CLUSTERS, DEGREES, JOIN
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.nn import losses
from perfedrec.nn.optim import adam
from perfedrec.nn.propagation import Star, edge_weights
from perfedrec.nn.segments import dot, expand, segment_sum
from perfedrec.privacy import uploads
from perfedrec.privacy.labels import Labels, label
from perfedrec.privacy.ledger import Release
from perfedrec.privacy.mechanisms import Guarantee, compose, mechanisms_of
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.privacy.uploads import protect


@dataclass(frozen=True)
class State:
    """The server side: coordinator and neighbourhood service.

    ``round`` rounds played; ``items`` [m, d] the global table and ``average`` its running average; ``offsets`` [K m, d]
    the cluster models as differences from it; ``dense`` [D] shared dense weights; ``labels`` [n] and ``centroids``
    [K, d] the clusters, ``None`` before the first clustering; ``degrees`` [m]; ``tokens`` [m] names of the items
    towards the service, which does not hold their key; ``neighbours`` [2, m, d] the sums that it published last, in
    item order; ``lift`` and ``pretrained`` [m, d] see :class:`perfedrec.methods.federated.network.View`.

    Where clients contribute to sums alone: no ``labels``; ``tally`` [K, d + 1] the clusters' sums since the last
    clustering and their ``shares`` [K] of the clients; ``gathered`` [L, m, d] neighbour sums of the users' layers.
    """

    round: int
    items: Tensor
    degrees: Tensor
    service: Service
    items_moments: Moments | None = None
    average: Average | None = None
    offsets: Tensor | None = None
    offsets_moments: Moments | None = None
    dense: Tensor | None = None
    dense_moments: Moments | None = None
    labels: Tensor | None = None
    centroids: Tensor | None = None
    item_attributes: Tensor | None = None
    tokens: Tensor | None = None
    neighbours: Tensor | None = None
    lift: float | None = None
    pretrained: Tensor | None = None
    tally: Tensor | None = None
    shares: Tensor | None = None
    gathered: Tensor | None = None


@dataclass(frozen=True)
class ClientState:
    """What never leaves a client: its vector ``vectors`` [B, d] with Adam's moments and ``steps`` [B], the fine-tuned
    offsets ``rows`` [R, d] of its own item rows, the logits ``mix`` [B, 4] of its weights for the local, cluster,
    global and pre-trained model, the ``loss`` [B] of its last round per positive, a ``secret`` word [B] from which
    sticky decoys follow, in how many rounds of training it took part (``taken`` [B]), and the layers ``sent`` [B, L, d]
    that it last added to neighbour sums."""

    vectors: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    mix: Tensor
    loss: Tensor
    secret: Tensor
    taken: Tensor
    sent: Tensor
    rows: Tensor = field(metadata={"per": "row"})


class PerFedRec:
    """PerFedRec (Luo, Xiao and Song, CIKM 2022) as pure functions over explicit state; see
    :class:`perfedrec.core.types.Algorithm`.

    Departs from the paper: users of a cluster are selected at random, in proportion to its size; the cluster models are
    offsets from the global one; models are mixed by their scores; a client has its items' neighbour sums instead of the
    neighbours; attributes are an option; the server's optimiser is an option, FedAvg in the paper.
    """

    Options: ClassVar[type[Settings]] = PerFedRecSettings
    broadcast_type: ClassVar[type[Any]] = Broadcast

    def __init__(self, settings: PerFedRecSettings | None = None) -> None:
        self.settings = settings or PerFedRecSettings()
        self.options: Settings = getattr(self, "options", self.settings)
        self.network = Network(self.settings.model, self.settings.client)
        # Neighbour sums are layers of LightGCN; the spectral form has none.
        model = self.settings.model
        self.neighbours = model.neighbours and model.encoder == "lightgcn" and model.n_layers > 0
        self.sums = self.settings.privacy.sums

    # --- the server's side ---

    @property
    def joins(self) -> bool:
        """Whether clients hand protected edges to the neighbourhood service before training, or join its sums."""
        return self.neighbours

    @property
    def n_reported(self) -> int:
        """L, the user layers that neighbour sums are made of (higher ones follow from the item layers)."""
        return min(self.settings.model.n_layers, 2) if self.neighbours else 1

    @property
    def n_summed(self) -> int:
        """L where clients contribute to neighbour sums themselves, else 0."""
        return self.n_reported if self.neighbours and self.sums else 0

    aggregator = Sum()

    @property
    def protection(self) -> Protection:
        return Shim(self.settings.privacy, self.phases)

    @property
    def needs_service(self) -> bool:
        return self.reports_vectors

    def without_tokens(self, state: State) -> State:
        return replace(state, tokens=None)

    def centroids(self, state: State) -> Tensor | None:
        return state.centroids

    @property
    def reports_vectors(self) -> bool:
        """Whether clients hand over protected vectors of their own."""
        return not self.sums and (self.joins or self.settings.clusters.enabled)

    @property
    def needs_degrees(self) -> bool:
        """Whether it starts from item degrees that no phase of its own releases."""
        return not self.sums

    @property
    def n_views(self) -> int:
        """Independently protected edge sets that each client hands over."""
        return 1

    @property
    def phases(self) -> list[Phase]:
        """The phases played before training, one round each."""
        return ([DEGREES] if self.sums else []) + self._pretraining() + ([JOIN] if self.joins else [])

    def _pretraining(self) -> list[Phase]:
        """The phases of pre-training."""
        return []

    def init(self, spec: Spec, key: Key) -> State:
        model, clusters = self.settings.model, self.settings.clusters
        if model.attributes and not spec.n_user_attributes and spec.item_attributes is None:
            raise ConfigError(
                "model.attributes is true, but the data set has no attributes; expected user_attributes.csv or "
                "item_attributes.csv beside the data"
            )
        items = torch.arange(spec.n_items, device=spec.item_degrees.device)
        table = normal(key.fold("items").spread(items), model.embedding_dim) * model.init_scale
        adaptive = self.settings.server.optimizer != "fedavg"
        offsets = table.new_zeros(clusters.n_clusters * spec.n_items, model.embedding_dim) if clusters.enabled else None
        dense = self.network.init(spec, key.fold("dense"))
        dim = model.embedding_dim
        degrees = spec.item_degrees.to(torch.float32)
        return State(
            round=0,
            items=table,
            degrees=torch.ones_like(degrees) if self.sums else degrees,  # of people's data until they are released
            service=self.open_service(spec.n_users, table.device),
            items_moments=Moments.zeros(table) if adaptive else None,
            average=Average.start(table) if self.settings.server.averaging else None,
            offsets=offsets,
            offsets_moments=Moments.zeros(offsets) if adaptive and offsets is not None else None,
            dense=None if dense is None else dense.to(table.device),
            dense_moments=Moments.zeros(dense.to(table.device)) if adaptive and dense is not None else None,
            item_attributes=spec.item_attributes if model.attributes else None,
            tokens=neighbourhood.tokens(spec.n_items, key).to(table.device) if self.joins and not self.sums else None,
            tally=table.new_zeros(clusters.n_clusters, dim + 1) if clusters.enabled and self.sums else None,
            gathered=table.new_zeros(self.n_summed, spec.n_items, dim) if self.n_summed else None,
        )

    def training_round(self, state: State) -> int:
        """Rounds of training played, without the prelude (negative while it lasts)."""
        return state.round - len(self.phases)

    def releases(self, rounds: int, n_users: int) -> list[Release]:
        """Everything that a run of so many rounds lets out of the clients, for the ledger.

        What clients share with the neighbourhood service counts as released as well.
        """
        privacy, found = self.settings.privacy, []
        if not self.sums:
            found.append(Release("degrees", 1, Guarantee(reason="item degrees are taken as public"), 1))
        names = [each.name for each in self.phases]
        for phase in dict.fromkeys(names):
            times = names.count(phase)
            found.append(Release(phase, times, compose(mechanisms_of(privacy, phase)), times))
        return [*found, cohort.training_release(privacy, self.settings.selection, rounds, n_users)]

    def n_groups(self, state: State) -> int:
        """Tables that contributions are summed in: one per cluster, or one, and one per layer of neighbour sums."""
        if self.phase(state) in ("degrees", "spectral"):
            return 1
        return self._n_models(state) + self.n_summed

    def _n_models(self, state: State) -> int:
        return self.settings.clusters.n_clusters if state.centroids is not None else 1

    def phase(self, state: State) -> str:
        """The phase of the next round; before the first one, item degrees may be asked for."""
        if state.round < 0:
            return "degrees"
        return self.phases[state.round].name if state.round < len(self.phases) else "train"

    def groups(self, state: State, users: Tensor) -> Tensor:
        """[B] the users' clusters, -1 for newcomers; all 0 before the first clustering."""
        if state.labels is None:
            return torch.zeros_like(users)
        return torch.where(users == NEWCOMER, -1, state.labels[users.clamp(min=0)])

    def plan(self, state: State, key: Key) -> Plan:
        n_users, device = state.service.reports.shape[0], state.items.device
        if state.round < len(self.phases):
            return Plan(self.phases[state.round].name, torch.arange(n_users, device=device))
        selection = self.settings.selection
        if state.labels is not None and self.settings.clusters.proportional and selection.sampling == "fixed":
            return Plan("train", cohort.select_proportional(state.labels, selection.n_clients_per_round, key))
        return Plan("train", cohort.select(n_users, selection, key, device))

    def broadcast(self, state: State, users: Tensor) -> Broadcast:
        new, start, groups = users == NEWCOMER, state.service.start, self.groups(state, users)
        return Broadcast(
            items=state.items,
            degrees=state.degrees,
            groups=groups,
            offsets=None if state.centroids is None else state.offsets,
            dense=state.dense,
            item_attributes=state.item_attributes,
            tokens=state.tokens,
            neighbours=state.neighbours,
            start=None if start is None else start[users.clamp(min=0)].masked_fill(new[:, None], 0.0),
            lift=state.lift,
            pretrained=state.pretrained,
            trained=self.training_round(state) > 0,
            centroids=state.centroids if self.sums or bool((groups < 0).any()) else None,
            tally=self.sums
            and state.centroids is not None
            and self.training_round(state) < self.settings.clusters.stop,
        )

    def release(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        return uploads.released(aggregate, self.settings.privacy, phase, asked, key)

    def aborted(self, phase: str, clients: int, asked: int) -> bool:
        return uploads.aborted(clients, self.settings.privacy, phase, asked)

    def server(self, state: State, phase: str, aggregate: Aggregate, key: Key) -> State:
        service, published = self.serve(state.service, phase, state.round + 1, aggregate, state.centroids, key)
        if state.tokens is not None:
            published = published.named(state.tokens)
        return self.coordinate(replace(state, service=service), phase, aggregate, published, key)

    def open_service(self, n_users: int, device: Any = None) -> Service:
        """What the neighbourhood service holds before the first round."""
        layers = 0 if self.sums else self.n_reported
        return Service(torch.zeros(n_users, layers, self.settings.model.embedding_dim, device=device))

    def serve(
        self, service: Service, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """The neighbourhood service's part of a round, ``played`` rounds having been played with it.

        Takes reports and edges in, and publishes every few rounds fresh neighbour sums and a clustering of all users,
        by the mean of the layers that they reported last, from the last ``centroids`` on.
        """
        if aggregate.reports is not None and aggregate.report_users is not None:
            service.reports[aggregate.report_users] = aggregate.reports
        if aggregate.edges is not None:
            graph = neighbourhood.graph(aggregate.edges, 0, service.reports.shape[0], aggregate.n_items)
            service = replace(service, graph=graph)
        service, table = self._pretrained(service, phase, aggregate, key)
        trained, clusters, labels, sums = played - len(self.phases), self.settings.clusters, None, None
        if self.neighbours and service.graph is not None and self._refreshes(trained):  # no graph: nobody has joined
            sums = neighbourhood.neighbour_sums(service.graph, service.reports, self.settings.model.n_layers)
        ends = phase == "spectral" and self.phases[played : played + 1] == [CLUSTERS] and aggregate.clients
        for due, own in ((ends, key.fold("cluster")), (clusters.due(trained), key)):
            if due and not self.sums:
                points = service.reports.mean(1)
                labels, centroids = cohort.cluster(points, clusters.n_clusters, centroids, own)
        return service, Published(sums, table, labels, centroids if labels is not None else None)

    def _pretrained(
        self, service: Service, phase: str, aggregate: Aggregate, key: Key
    ) -> tuple[Service, Tensor | None]:
        """Pre-training at the service, and the table [m, d] by token that comes of it, if there is any."""
        return service, None

    def _refreshes(self, trained: int) -> bool:
        """Whether neighbour sums are published after so many rounds of training."""
        return trained >= 0 and trained % self.settings.model.refresh_every == 0

    def coordinate(self, state: State, phase: str, aggregate: Aggregate, published: Published, key: Key) -> State:
        """The coordinator's part of a round: it needs neither reports nor edges.

        ``published`` has items by their places, what the coordinator is not to know left out.
        """
        if aggregate.clients and state.gathered is not None and phase in ("join", "train"):
            aggregate = self._gather(state, aggregate)
        state = replace(state, round=state.round + 1)
        if aggregate.clients:
            if phase == "train":
                self._learn(state, aggregate)
            else:
                state = self._prepare(state, phase, aggregate, key)
        if published.table is not None:
            state = self._restart(state, published.table)
        if published.labels is not None:
            state = replace(state, labels=published.labels, centroids=published.centroids)
        if published.neighbours is not None:
            state = replace(state, neighbours=published.neighbours)
        return self._publish(state, key) if self.sums else state

    def _restart(self, state: State, items: Tensor) -> State:
        """The state with another global table; a running average starts again from it."""
        average = Average.start(items) if state.average is not None else None
        return replace(state, items=items, average=average)

    def _gather(self, state: State, aggregate: Aggregate) -> Aggregate:
        """Take the neighbour sums out of the tables of an aggregate."""
        assert state.gathered is not None
        start = self._n_models(state) * aggregate.n_items
        place = int(torch.searchsorted(aggregate.keys, start))
        state.gathered.flatten(0, 1).index_add_(0, aggregate.keys[place:] - start, from_fixed(aggregate.sums[place:]))
        return replace(aggregate, keys=aggregate.keys[:place], sums=aggregate.sums[:place])

    def _prepare(self, state: State, phase: str, aggregate: Aggregate, key: Key) -> State:
        """What a round of the prelude does to the tables: nothing but degrees, unless there is pre-training."""
        return self._with_degrees(state, aggregate) if phase == "degrees" else state

    def _with_degrees(self, state: State, aggregate: Aggregate) -> State:
        """The state with released item degrees.

        Without noise these are counts. With noise a client's part in each of its items is ``1 / sqrt(|I_u|)``; the sums
        are brought to the scale of counts by the mean of ``sqrt(|I_u|)``, which follows from them, and items below the
        mean degree are given it, because little is known of them.
        """
        sums = torch.zeros_like(state.degrees).index_copy_(0, aggregate.keys, from_fixed(aggregate.sums).squeeze(1))
        if self.settings.privacy.noise.degrees:
            sums = sums * (sums.sum() / state.service.reports.shape[0]).clamp(min=1.0)
            sums = sums.clamp(min=max(float(sums.mean()), 1.0))
        return replace(state, degrees=sums)

    def _learn(self, state: State, aggregate: Aggregate) -> None:
        """Global table, cluster offsets and dense weights take their steps; only touched rows are read or written."""
        settings = self.settings
        weights, keys, sums = from_fixed(aggregate.weights), aggregate.keys, from_fixed(aggregate.sums)
        if self.sums:  # what is expected, because nobody knows who has which cluster, and counts are not released
            shares = state.shares if state.shares is not None else weights.new_ones(self._n_models(state))
            size = min(settings.selection.n_clients_per_round, state.service.reports.shape[0])
            weights = shares * (size / shares.sum())
        touched, total = keys, sums
        if state.centroids is not None and state.offsets is not None:
            touched, total = cohort.over_tables(keys, sums, aggregate.n_items)
            mean, share = cohort.means(aggregate, weights), settings.clusters.learning_rate
            sparse_step(settings.server, state.offsets, state.offsets_moments, keys, mean, share)
        if state.average is not None:
            state.average.advance(state.items, touched, state.round - 1, settings.server.averaging)
        sparse_step(settings.server, state.items, state.items_moments, touched, total / weights.sum())
        if state.average is not None:
            state.average.advance(state.items, touched, state.round, settings.server.averaging)
        n_dense = 0 if state.dense is None else state.dense.numel()
        if aggregate.dense is not None and state.dense is not None:
            every = torch.arange(n_dense, device=state.dense.device)
            change = from_fixed(aggregate.dense[:n_dense]) / weights.sum()
            sparse_step(settings.server, state.dense, state.dense_moments, every, change)
        if aggregate.dense is not None and state.tally is not None and aggregate.dense.numel() > n_dense:
            state.tally.add_(from_fixed(aggregate.dense[n_dense:]).view_as(state.tally))

    def _publish(self, state: State, key: Key) -> State:
        """What the service does every few rounds, where clients contribute to sums alone."""
        trained = self.training_round(state)
        if state.gathered is not None and self._refreshes(trained):
            state = replace(state, neighbours=neighbourhood.published(list(state.gathered.unbind(0))))
        return self._cluster(state, key) if self.settings.clusters.due(trained) else state

    def _cluster(self, state: State, key: Key) -> State:
        """A new clustering by the sums of those heard."""
        assert state.tally is not None
        if state.centroids is None:
            centroids = summing.first_centroids(state.items, self.settings.clusters.n_clusters, key)
            return replace(state, centroids=centroids)
        centroids, shares = summing.recentre(state.centroids, state.tally)
        return replace(state, centroids=centroids, shares=shares, tally=torch.zeros_like(state.tally))

    # --- the client's side ---

    def init_clients(self, rows: Rows, key: Key) -> ClientState:
        model, personal, n = self.settings.model, self.settings.personal, rows.n_users
        device = rows.users.device
        vectors = normal(key.fold("vectors").spread(rows.users), model.embedding_dim) * model.init_scale
        if model.encoder == "spectral":
            vectors = torch.zeros_like(vectors)
        shares = torch.tensor([personal.local, personal.cluster, personal.global_, personal.pretrained], device=device)
        return ClientState(
            vectors=vectors,
            first=torch.zeros_like(vectors),
            second=torch.zeros_like(vectors),
            steps=torch.zeros(n, dtype=torch.int64, device=device),
            mix=shares.clamp(min=1e-12).log().repeat(n, 1),
            loss=torch.zeros(n, device=device),
            secret=bits(key.fold("secret").spread(rows.users), 1).squeeze(1),
            taken=torch.zeros(n, dtype=torch.int64, device=device),
            sent=torch.zeros(n, self.n_summed, model.embedding_dim, device=device),
            rows=torch.zeros(rows.items.numel(), model.embedding_dim, device=device),
        )

    def client(
        self, phase: str, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        if phase == "degrees":
            return self._degrees(broadcast, rows, client_state, key), client_state
        broadcast = self._placed(broadcast, rows, client_state)
        if phase == "join":
            return (
                self._join_sums(broadcast, rows, client_state)
                if self.sums
                else self._join(broadcast, rows, client_state, key)
            )
        return self._train(broadcast, rows, client_state, key)

    @property
    def finetune_rounds(self) -> int:
        """Propagation makes a vector of a newcomer's items at once; without it the vector has to be learned."""
        return 1 if self.settings.model.n_layers or self.settings.model.encoder == "spectral" else 10

    def init_new_user(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> ClientState:
        """After spectral pre-training a user's vector starts at the sum of its items', which are on another scale."""
        if broadcast.lift is None:
            return client_state
        own = edge_weights(rows, broadcast.degrees)[:, None] * broadcast.items.index_select(0, rows.items)
        return replace(client_state, vectors=broadcast.lift * segment_sum(own, rows.segments, rows.n_users))

    def without_privacy(self) -> Self:
        return type(self)(self.options.model_copy(update={"privacy": PrivacySettings()}))  # type: ignore[arg-type]

    def _placed(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Broadcast:
        """The view of clients that assign themselves to a cluster."""
        if broadcast.centroids is None:
            return broadcast
        vectors = self._layers(broadcast, rows, self._own_vectors(broadcast, client_state)).mean(1)
        nearest = summing.assign(broadcast.centroids, vectors)
        return replace(
            broadcast, groups=nearest if self.sums else torch.where(broadcast.groups < 0, nearest, broadcast.groups)
        )

    def _degrees(self, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key) -> Update:
        """Each client's part in the item degrees: 1 for each of its items (of joint length 1 where noise is added).

        Where uploads show items, of those that its uploads show: decoys are counted, and masked items are not.
        """
        if not self.sums:
            privacy, n_items = self.settings.privacy, broadcast.items.shape[0]
            rows = label(rows, n_items, privacy, 0, key.fold("degrees"), client_state.secret).rows
        ones = torch.ones(rows.items.numel(), 1, device=rows.items.device)
        weights = torch.ones(rows.n_users, device=rows.items.device)
        part = Update(rows.users, broadcast.groups, weights, rows.segments, rows.items, ones)
        return uploads.bounded(part, self.settings.privacy, "degrees")

    def _join_sums(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> tuple[Update, ClientState]:
        """Once, before training: a first part in the neighbour sums."""
        client_state = self.init_new_user(broadcast, rows, client_state)
        layers = self._layers(broadcast, rows, client_state.vectors)
        update = Update(
            users=rows.users,
            groups=broadcast.groups,
            weights=cohort.weights(rows, self.settings.server),
            segments=rows.segments.repeat(self.n_summed),
            items=rows.items.repeat(self.n_summed),
            deltas=summing.neighbour_rows(rows, broadcast.degrees, layers),
            tables=self._neighbour_tables(broadcast, rows),
        )
        return uploads.bounded(update, self.settings.privacy, "join"), replace(client_state, sent=layers)

    def _neighbour_tables(self, broadcast: Broadcast, rows: Rows) -> Tensor:
        """[R L] the tables that rows of neighbour sums belong to: those after the models' tables."""
        first = 1 if broadcast.offsets is None else self.settings.clusters.n_clusters
        return torch.arange(first, first + self.n_summed, device=rows.items.device).repeat_interleave(
            rows.items.numel()
        )

    def _join(
        self, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        """Once, before training: protected edges for the neighbourhood service, and a first protected report."""
        assert broadcast.tokens is not None
        told = [
            self._labelled(broadcast, rows, client_state, key.fold("edges", number)) for number in range(self.n_views)
        ]
        edges = [
            torch.stack([torch.full_like(each.items, number), each.segments, broadcast.tokens[each.items]], dim=1)
            for number, each in enumerate(told)
        ]
        client_state = self.init_new_user(broadcast, told[0], client_state)
        update = Update(
            users=rows.users,
            groups=broadcast.groups,
            weights=cohort.weights(rows, self.settings.server),
            reports=self._report(broadcast, told[0], client_state.vectors, key),
            edges=torch.cat(edges),
        )
        return update, client_state

    def _labelled(self, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key) -> Rows:
        """The items that clients admit to: their own with decoys, less the masked ones."""
        return label(rows, broadcast.items.shape[0], self.settings.privacy, 0, key, client_state.secret).rows

    def _train(
        self, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        """E local steps on the client's own vector and rows; the protected change of the rows is handed over."""
        client, privacy, n_items = self.settings.client, self.settings.privacy, broadcast.items.shape[0]
        n_negatives = None if client.loss == "bpr" else client.n_negatives
        labels = label(rows, n_items, privacy, n_negatives, key.fold("labels"), client_state.secret)
        labelled, owners = labels.rows, labels.owners

        star, vectors, moments = (
            self.network.star(broadcast, labelled),
            self._own_vectors(broadcast, client_state),
            client_state,
        )
        items = torch.cat([labelled.items, labels.negatives])
        segments = torch.cat([labelled.segments, owners])
        base, n_labelled = broadcast.table_rows(items, broadcast.groups[segments]), labelled.items.numel()
        delta, dense = (
            torch.zeros_like(base),
            None if broadcast.dense is None else broadcast.dense.repeat(rows.n_users, 1),
        )
        loss = torch.zeros(rows.n_users, device=segments.device)
        for step_number in range(client.local_steps):
            now = base + delta if step_number else base
            parts_now = (vectors, now[:n_labelled], now[n_labelled:], dense)
            leaves = [each.detach().requires_grad_() for each in parts_now if each is not None]
            loss = self._loss(
                broadcast, labels, star, leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None
            )
            gradients = torch.autograd.grad(loss.sum(), leaves)
            rate, betas = client.user_learning_rate, (0.9, 0.999)
            step, first, second, steps = adam(
                gradients[0], moments.first, moments.second, moments.steps, rate, betas, 1e-8
            )
            vectors, moments = vectors + step, replace(moments, first=first, second=second, steps=steps)
            delta.add_(torch.cat(gradients[1:3]), alpha=-client.learning_rate)
            if dense is not None:
                mean = gradients[3] / labelled.counts.clamp(min=1)[:, None]
                dense = torch.add(dense, mean, alpha=-client.dense_learning_rate)

        real = (labels.positions >= 0).nonzero().squeeze(1)
        own = client_state.rows.index_copy(0, labels.positions[real], delta.index_select(0, real))
        mean_loss = loss.detach() / labelled.counts.clamp(min=1)
        client_state = replace(moments, vectors=vectors, rows=own, loss=mean_loss, taken=client_state.taken + 1)
        if self.settings.personal.learned:
            client_state = replace(
                client_state, mix=self._mixture(broadcast, rows, client_state).learned(key.fold("mix"))
            )

        change = None if dense is None or broadcast.dense is None else dense - broadcast.dense
        if self.sums:
            return self._contribute_to_sums(broadcast, rows, client_state, segments, items, delta, change)
        noise, dense_noise = key.fold("noise").spread(rows.users), key.fold("dense noise").spread(rows.users)
        reporting = self.neighbours or self.settings.clusters.enabled
        update = Update(
            users=rows.users,
            groups=broadcast.groups,
            weights=cohort.weights(rows, self.settings.server),
            segments=segments,
            items=items,
            deltas=protect(delta, privacy, fold_in(noise[segments], items)),
            dense=None if change is None else protect(change, privacy, dense_noise),
            reports=self._report(broadcast, labelled, vectors, key) if reporting else None,
        )
        return uploads.bounded(update, privacy, "train"), client_state

    def _contribute_to_sums(
        self,
        broadcast: Broadcast,
        rows: Rows,
        client_state: ClientState,
        segments: Tensor,
        items: Tensor,
        delta: Tensor,
        dense: Tensor | None,
    ) -> tuple[Update, ClientState]:
        """The change of rows [T] and dense weights [B, D], with parts in the clusters' and in the neighbour sums.

        A client that has had its share of rounds hands over zeros.
        """
        privacy, cap = self.settings.privacy, self.settings.selection.max_participations
        tables, active = None, None if cap is None else (client_state.taken <= cap).to(delta.dtype)
        if privacy.clip is not None and privacy.norm == "coordinate":
            delta = delta.clamp(-privacy.clip, privacy.clip)
            dense = None if dense is None else dense.clamp(-privacy.clip, privacy.clip)
        if self.n_summed or broadcast.tally:
            layers = self._layers(broadcast, rows, client_state.vectors)
            if active is not None:  # an idle client's part in the neighbour sums stays what it was
                layers = torch.where(active[:, None, None] > 0, layers, client_state.sent) if self.n_summed else layers
            if broadcast.tally and broadcast.centroids is not None:
                length = summing.SHARE * (privacy.clip or 1.0)
                part = summing.tallies(layers.mean(1), broadcast.groups, broadcast.centroids.shape[0], length)
                dense = part if dense is None else torch.cat([dense, part], dim=1)
            if self.n_summed:
                tables = torch.cat([broadcast.groups[segments], self._neighbour_tables(broadcast, rows)])
                segments = torch.cat([segments, rows.segments.repeat(self.n_summed)])
                items = torch.cat([items, rows.items.repeat(self.n_summed)])
                delta = torch.cat([delta, summing.neighbour_rows(rows, broadcast.degrees, layers - client_state.sent)])
                client_state = replace(client_state, sent=layers)
        if active is not None:
            delta = delta * active[segments, None]
            dense = None if dense is None else dense * active[:, None]
        ones = cohort.weights(rows, self.settings.server)
        update = Update(rows.users, broadcast.groups, ones, segments, items, delta, tables=tables, dense=dense)
        return uploads.bounded(update, privacy, "train"), client_state

    def _own_vectors(self, broadcast: Broadcast, client_state: ClientState) -> Tensor:
        """[B, d] the users' own vectors; those that have not trained yet take the pre-trained ones on offer."""
        if broadcast.start is None:
            return client_state.vectors
        return torch.where(client_state.steps[:, None] > 0, client_state.vectors, broadcast.start)

    def _report(self, broadcast: Broadcast, rows: Rows, vectors: Tensor, key: Key) -> Tensor:
        """[B, L, d] protected vectors for neighbourhood service and clustering, of the items in labelled ``rows``."""
        layers = self._layers(broadcast, rows, vectors)
        keys = key.fold("report").spread(rows.users)
        numbers = torch.arange(layers.shape[1], device=keys.device)
        return protect(layers, self.settings.privacy, fold_in(keys[:, None], numbers))

    def _layers(self, broadcast: Broadcast, rows: Rows, vectors: Tensor) -> Tensor:
        """[B, L, d] the users' layers 0 and 1 where neighbour sums are made of them, else their final vectors."""
        table = broadcast.items.index_select(0, rows.items)
        shared = None if broadcast.dense is None else broadcast.dense[None]
        own, table = self.network.layer0(broadcast, rows, vectors, table, rows.items, None, shared)
        if self.neighbours:
            layers = [own]
            if self.settings.model.n_layers > 1:
                below = edge_weights(rows, broadcast.degrees)[:, None] * table
                layers.append(segment_sum(below, rows.segments, rows.n_users))
        else:
            layers = [self.network.star(broadcast, rows).users(own, table, rows.segments)]
        return torch.stack(layers, dim=1)

    def _loss(
        self,
        broadcast: Broadcast,
        labels: Labels,
        star: Star,
        vectors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        dense: Tensor | None,
    ) -> Tensor:
        """[B] each client's loss, from its vector and its rows ``positives`` [P, d] and ``negatives`` [T, d]."""
        client, rows, owners, finish = self.settings.client, labels.rows, labels.owners, self.network.finish
        users0, up0 = self.network.layer0(broadcast, rows, vectors, positives, rows.items, rows.segments, dense)
        _, down0 = self.network.layer0(broadcast, rows, vectors, negatives, labels.negatives, owners, dense)
        up, down = finish(star.items(up0, rows.items)), finish(star.items(down0, labels.negatives))
        user = star.users(users0, up0, rows.segments)
        context = expand(user, rows.segments)
        if client.leave_one_out:
            context = context - star.edge[:, None] * up0
        context = finish(context)
        positive = dot(context, up)
        if client.loss == "bpr":
            segments = rows.segments
            if owners.numel() < rows.items.numel():  # somebody has nearly all items: fewer negatives than positives
                pairs, others = paired(rows, owners)
                context, positive, down = context[pairs], positive[pairs], expand(down, others)
                segments = segments[pairs]
            result = losses.bpr(positive, dot(context, down), segments, rows.n_users)
        else:
            flat, places = dot(expand(finish(user), owners), down), (owners, ranks(owners, rows.n_users))
            shared = flat.new_full((rows.n_users, client.n_negatives), -torch.inf).index_put(places, flat)
            result = losses.sampled_softmax(positive, shared, rows.segments, client.temperature)
        if client.l2:
            squares = segment_sum(positives.square().sum(1), rows.segments, rows.n_users) + vectors.square().sum(1)
            squares = squares + segment_sum(negatives.square().sum(1), owners, rows.n_users)
            result = result + 0.5 * client.l2 * squares
        return result

    # --- scoring ---

    def serving(self, state: State) -> State:
        """Tables and clusters alone, the global table averaged where it is to be; shares storage with ``state``."""
        items, average = state.items, state.average
        if average is not None:
            items = average.as_of(items, state.round, self.settings.server.averaging)
        reports = state.service.reports[:, :0]
        return replace(
            state,
            items=items,
            average=None,
            items_moments=None,
            offsets=None if state.centroids is None else state.offsets,
            offsets_moments=None,
            dense_moments=None,
            tokens=None,
            tally=None,
            gathered=None,
            service=Service(reports, start=state.service.start),
        )

    def user_vectors(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Tensor:
        """[B, d] the users' final vectors, with which items are scored in training: what an attacker would like."""
        return self._mixture(broadcast, rows, client_state).parts["cluster"].users

    def embedding(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Embedding:
        """The final vectors of the model that all users share, and the users' clusters.

        It is the global one; before the first round of training the pre-trained one, where that recommends alone.
        """
        mixture = self._mixture(broadcast, rows, client_state)
        model = mixture.parts["pretrained" if broadcast.pretrained is not None and not broadcast.trained else "global"]
        groups = None if broadcast.offsets is None else mixture.broadcast.groups
        items = model.items(mixture.every, torch.zeros_like(mixture.every))
        return Embedding(model.finish(model.users), items, groups)

    def _mixture(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Mixture:
        broadcast = self._placed(broadcast, rows, client_state)
        return Mixture(
            self.network,
            broadcast,
            rows,
            self._own_vectors(broadcast, client_state),
            client_state.rows,
            client_state.mix,
        )

    def scores(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> Tensor:
        """[B, m] scores of the personal model for all items."""
        return self._mixture(broadcast, rows, client_state).scores()

    def explain(self, broadcast: Broadcast, rows: Rows, client_state: ClientState) -> dict[str, Tensor]:
        """The parts [B, m] that each model has in :meth:`scores`; their sum is the score."""
        return self._mixture(broadcast, rows, client_state).explain()
