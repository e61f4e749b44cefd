"""The base of methods whose clients propagate vectors: on their own star graph, and with the sums of their items'
neighbours."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import TRAIN, Phase
from perfedrec.core.keys import Key
from perfedrec.core.scoring import Scoring
from perfedrec.core.types import Embedding, Published, Rows, Spec, Update, of_users
from perfedrec.methods.federated import neighbourhood
from perfedrec.methods.federated.base import LocalBatch
from perfedrec.methods.federated.defence import distinct_edges, hold_pass, hold_reports
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.local import Loss, Parameters
from perfedrec.methods.federated.network import Network, ranking_loss
from perfedrec.methods.federated.phases import DEGREES, JOIN, SPECTRAL
from perfedrec.methods.federated.reporting import Reporting
from perfedrec.methods.federated.state import B, C, GraphBroadcast, GraphClient, GraphState, S, Service
from perfedrec.methods.federated.subspace import with_degrees
from perfedrec.methods.federated.summing import Summing, SummingOnce
from perfedrec.methods.federated.tables import Average
from perfedrec.nn.propagation import HALVES, Star, edge_weights, weighted_sums
from perfedrec.nn.segments import expand, segment_sum
from perfedrec.privacy.labels import Labels
from perfedrec.privacy.ledger import Release
from perfedrec.privacy.mechanisms import Guarantee


class GraphMethod(FedMF[S, B, C]):
    """Matrix factorisation with propagation. Each client has its star graph and the neighbour sums of its items, which
    come from a neighbourhood service or from sums over clients. The coordinator's and the service's parts of a round
    are separate functions."""

    broadcast_type = GraphBroadcast

    # --- what is propagated, and who receives what ---

    @cached_property
    def network(self) -> Network:
        """Layer 0 and propagation."""
        return Network(self.settings.model.embedding_dim, self.settings.model.n_layers)

    @cached_property
    def handover(self) -> Reporting[S, B, C] | Summing[S, B, C]:
        """How clients send vectors and neighbours: as reports and edges, or as parts of sums."""
        summing = Summing if self.subspace is None else SummingOnce
        return summing(self) if self.settings.privacy.sums else Reporting(self)

    @property
    def exponents(self) -> tuple[float, float]:
        """Those of the degrees of users and items in passes over all users."""
        return HALVES

    @property
    def neighbours(self) -> bool:
        """Whether clients use the sums of their items' neighbours."""
        return True

    @property
    def joins(self) -> bool:
        """Whether there is a phase before training in which clients send protected edges to the neighbourhood service,
        or a first part of the neighbour sums."""
        return self.neighbours and (self.subspace is None or self.pretrains_basis) and not self.makes_neighbours

    @property
    def makes_neighbours(self) -> bool:
        """Whether the server makes the first neighbour sums itself, from the passes of pre-training. In a sum over all
        clients one that lies can count for many, and what groups would send of it is in their passes already."""
        return self.neighbours and self.pretrains_basis and bool(self.defence.group_size)

    @property
    def n_reported(self) -> int:
        """L, the number of user layers from which neighbour sums are made (higher user layers follow from the item
        layers)."""
        return min(self.settings.model.n_layers, 2) if self.neighbours else 1

    @property
    def n_views(self) -> int:
        """The number of independently protected edge sets that each client sends."""
        return 1

    @property
    def pretraining_phases(self) -> tuple[Phase, ...]:
        """The phases of pre-training; none by default."""
        return ()

    @property
    def pretrains_basis(self) -> bool:
        """Whether pre-training finds the basis of secure sums, and vectors from which neighbour sums can start."""
        return SPECTRAL in self.pretraining_phases

    @property
    def clustering_phases(self) -> tuple[Phase, ...]:
        """The phases that find clusters before training; none by default."""
        return ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        joins, passes = (JOIN,) if self.joins else (), self.pretraining_phases
        if self.subspace is not None and not self.pretrains_basis:
            passes = (*self.subspace.passes, *passes)
        return (*self.handover.phases, *passes, *joins, *self.clustering_phases)

    @property
    def questions(self) -> tuple[Phase, ...]:
        return (DEGREES,) if self.needs_degrees else ()

    @property
    def needs_degrees(self) -> bool:
        return not self.sums

    @property
    def reports_vectors(self) -> bool:
        return not self.sums and self.joins

    @property
    def needs_service(self) -> bool:
        return self.reports_vectors

    @property
    def finetune_rounds(self) -> int:
        """1 with propagation, which makes a new user's vector from its items at once; otherwise the vector has to be
        learned."""
        return 1 if self.network.n_layers or self.network.encoder == "spectral" else super().finetune_rounds

    def releases(self, rounds: int, n_users: int) -> list[Release]:
        """Everything that a run releases, including what clients send to the neighbourhood service."""
        found = super().releases(rounds, n_users)
        if self.needs_degrees:
            degrees = Release(DEGREES.release, 1, Guarantee(reason="item degrees are taken as public"), 1)
            return [degrees, *found]
        return found

    # --- the server: coordinator and neighbourhood service ---

    def init(self, spec: Spec, key: Key) -> S:
        return cast(S, GraphState(**self._graph(spec, key)))

    def _graph(self, spec: Spec, key: Key) -> dict[str, Any]:
        """The fields of the first :class:`GraphState`, by name."""
        common, degrees = self._init(spec, key), spec.item_degrees.to(torch.float32)
        device, tokens, n_kept = common.items.device, self.handover.tokens(spec, key), self.handover.n_kept
        return {
            **vars(common),
            "degrees": torch.ones_like(degrees) if self.sums else degrees,  # private until they are released
            **({"probe": None} if self.pretrains_basis else {}),
            "service": self.open_service(spec.n_users, device),
            "tokens": None if tokens is None else tokens.to(device),
            "summed": common.items.new_zeros(n_kept, *common.items.shape) if n_kept else None,
        }

    def n_models_of(self, broadcast: B) -> int:
        """:meth:`n_models`, as far as a client knows it from its broadcast."""
        return 1

    def phase(self, state: S) -> str:
        """The name of the next round's phase. Before the first round (round < 0) a coordinator may ask for item
        degrees."""
        return DEGREES.name if state.round < 0 else super().phase(state)

    def n_groups(self, state: S) -> int:
        """One table per model, and one per layer of neighbour sums."""
        if self.phase(state) in (DEGREES.name, SPECTRAL.name):
            return 1
        return self.handover.n_groups(state)

    def broadcast(self, state: S, users: Tensor) -> B:
        return cast(B, GraphBroadcast(**self._received(state, users)))

    def _received(self, state: S, users: Tensor) -> dict[str, Any]:
        """The fields of a :class:`GraphBroadcast`, by name."""
        start = state.service.start
        return {
            "items": state.items,
            "dense": state.dense,
            "groups": self.groups(state, users),
            "degrees": state.degrees,
            "tokens": state.tokens,
            "neighbours": state.neighbours,
            **({} if self.subspace is None else self.subspace.sent(state, self.phase(state))),
            "start": None if start is None else of_users(start, users, 0),
        }

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        if self.sums:
            return self.coordinate(state, phase, aggregate, Published(), key)
        played = state.round + 1
        service, published = self.serve(state.service, phase, played, aggregate, self.centroids(state), key)
        if state.tokens is not None:
            published = published.named(state.tokens)
        state = state if service is state.service else replace(state, service=service)
        return self.coordinate(state, phase, aggregate, published, key)

    def open_service(self, n_users: int, device: torch.device | None = None) -> Service:
        """The neighbourhood service's state before the first round."""
        layers, asked = 0 if self.sums else self.n_reported, self.asked_before_training(n_users)
        known = n_users if asked == n_users else 0
        service = Service(torch.zeros(known, layers, self.settings.model.embedding_dim, device=device))
        if asked == n_users:
            return service
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        return replace(service, users=nobody, share=asked / n_users)

    def asked_before_training(self, n_users: int) -> int:
        """The number of users who are asked in the phases before training: all, or a sample."""
        return n_users

    def serve(
        self, service: Service, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Service, Published]:
        """The neighbourhood service's part of a round; ``played`` is the number of rounds played after it.

        It stores the reports and edges of the ``aggregate``, and publishes new neighbour sums every ``refresh_every``
        rounds.
        """
        if service.users is not None and phase == JOIN.name and aggregate.report_users is not None:
            users = aggregate.report_users.sort().values
            blank = service.reports.new_zeros(users.numel(), *service.reports.shape[1:])
            service = replace(service, users=users, reports=blank)
        if aggregate.reports is not None and aggregate.report_users is not None:
            service.keep(aggregate.report_users, hold_reports(aggregate.reports, self.defence.report_length))
        if aggregate.edges is not None:
            edges, most = distinct_edges(aggregate.edges), self.defence.max_edges
            if most is not None:
                edges = neighbourhood.limited(edges, most, aggregate.n_items, key)
            if service.users is not None:
                edges = torch.stack([edges[:, 0], service.places(edges[:, 1].contiguous()), edges[:, 2]], dim=1)
            graph = neighbourhood.graph(edges, 0, service.reports.shape[0], aggregate.n_items)
            service = replace(service, graph=graph)
        published = Published()
        if phase == JOIN.name and aggregate.clients:
            service, published = self.pretrain(service, aggregate, key)
        if self.neighbours and service.graph is not None and self.refreshes(played - len(self.phases)):
            sums = neighbourhood.neighbour_sums(service.graph, service.reports, self.settings.model.n_layers)
            published = replace(published, neighbours=sums / service.share**0.5)  # those of all users, as expected
        return service, published

    def pretrain(self, service: Service, aggregate: Aggregate, key: Key) -> tuple[Service, Published]:
        """What the service makes of its graph as soon as it has it: its new state, and what it publishes. Nothing by
        default."""
        return service, Published()

    def refreshes(self, trained: int) -> bool:
        """Whether neighbour sums are published after ``trained`` rounds of training."""
        return trained >= 0 and trained % int(self.settings.model.refresh_every) == 0

    def coordinate(self, state: S, phase: str, aggregate: Aggregate, published: Published, key: Key) -> S:
        """The coordinator's part of a round: it needs neither reports nor edges.

        ``published`` has items in the order of item numbers. What the coordinator must not know is left out of it.
        """
        state, aggregate = self.handover.take_sums(state, phase, aggregate)
        if phase == SPECTRAL.name and not self.protection.multiplier(phase):
            aggregate = hold_pass(aggregate, state.degrees, self.exponents[1], self.defence.row_length)
        if aggregate.clients and phase == TRAIN.name:
            self.server_step(state, aggregate)
        state = replace(state, round=state.round + 1)
        if aggregate.clients and phase != TRAIN.name:
            state = self.prepare(state, phase, aggregate, key)
        if published.table is not None:
            state = self.restart(state, published.table)
        if published.centroids is not None:
            state = self.regroup(state, published)
        if published.neighbours is not None:
            state = replace(state, neighbours=published.neighbours)
        return self.handover.publish(state, key)

    def prepare(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        """The state after a phase before training."""
        if phase == SPECTRAL.name and self.subspace is not None:
            return self.subspace.absorb(state, aggregate)
        if phase != DEGREES.name:
            return state
        noisy = self.protection.multiplier(phase) > 0
        return replace(state, degrees=with_degrees(state, aggregate, noisy))

    def restart(self, state: S, items: Tensor) -> S:
        """The state with another global table. A running average starts again from this table."""
        average = Average.start(items) if state.average is not None else None
        return replace(state, items=items, average=average)

    def regroup(self, state: S, published: Published) -> S:
        """The state after the service has clustered users."""
        return state

    def cluster_by_sums(self, state: S, trained: int, key: Key) -> S:
        """The state after a clustering by sums, if one is due after ``trained`` rounds of training."""
        return state

    def centroids(self, state: S) -> Tensor | None:
        return None

    def without_tokens(self, state: S) -> S:
        return replace(state, tokens=None)

    def serving(self, state: S) -> S:
        """The state with only the tables and the pre-trained vectors; it shares storage with ``state``."""
        service = Service(state.service.reports[:, :0], start=state.service.start)
        return replace(super().serving(state), tokens=None, summed=None, service=service)

    # --- the clients ---

    def init_private(self, keys: Tensor) -> Tensor:
        first = super().init_private(keys)
        return torch.zeros_like(first) if self.network.encoder == "spectral" else first

    def init_clients(self, rows: Rows, key: Key) -> C:
        return cast(C, GraphClient(**self._graph_client(rows, key)))

    def _graph_client(self, rows: Rows, key: Key) -> dict[str, Any]:
        """The fields of the first :class:`GraphClient`, by name."""
        common = self._init_clients(rows, key)
        size = (rows.n_users, self.handover.n_kept, self.settings.model.embedding_dim)
        return {**vars(common), "sent": torch.zeros(*size, device=rows.users.device)}

    def client(self, phase: str, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        if phase == DEGREES.name:
            return self._degrees(broadcast, rows, client_state, key), client_state
        if phase == SPECTRAL.name:
            return super().client(phase, broadcast, rows, client_state, key)
        broadcast = self.placed(broadcast, rows, client_state)
        if phase == JOIN.name:
            return self.handover.join(broadcast, rows, client_state, key)
        return super().client(phase, broadcast, rows, client_state, key)

    def placed(self, broadcast: B, rows: Rows, client_state: C) -> B:
        """The broadcast with the groups that clients have chosen themselves, for methods in which they do."""
        return broadcast

    def clustering(self, broadcast: B) -> Tensor | None:
        """[K, d] centroids if clients contribute to the clusters' sums in this round, else ``None``."""
        return None

    def _degrees(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> Update:
        """Each client's part of the item degrees: 1 for each of its items (scaled to joint length 1 where noise is
        added).

        Where uploads show items, the shown items are counted: decoys are counted, and masked items are not.
        """
        rows = self.handover.labelled(rows, broadcast.items.shape[0], client_state, key.fold("degrees"))
        ones = torch.ones(rows.items.numel(), 1, device=rows.items.device)
        weights = torch.ones(rows.n_users, device=rows.items.device)
        return Update(rows.users, broadcast.groups, weights, rows.segments, rows.items, ones)

    def private_of(self, broadcast: B, client_state: C) -> Tensor:
        """[B, d] the users' own vectors. Users who have not trained yet take the pre-trained vector that they
        received."""
        if broadcast.start is None:
            return client_state.private
        return torch.where(client_state.steps[:, None] > 0, client_state.private, broadcast.start)

    def star(self, broadcast: B, rows: Rows) -> Star:
        return self.network.star(broadcast, rows)

    def local_loss(self, batch: LocalBatch[B], parameters: Parameters) -> Tensor:
        """[B] each client's ranking loss, with its vectors propagated on its star graph."""
        rows, star, network, dense = batch.labels.rows, batch.star, self.network, parameters.dense
        assert star is not None
        attributes, negatives = self.item_attributes(batch.broadcast), batch.labels.negatives
        up0 = network.items0(attributes, parameters.positives, rows.items, dense, rows.segments)
        down0 = network.items0(attributes, parameters.negatives, negatives, dense, batch.labels.owners)
        up, down = star.items(up0, rows.items), star.items(down0, negatives)
        user = star.users(network.users0(rows, parameters.private, dense), up0, rows.segments)
        context = expand(user, rows.segments)
        if self.settings.client.leave_one_out:
            context = context - star.edge[:, None] * up0
        return ranking_loss(self.settings.client, batch.labels, self.finish, parameters, user, context, up, down)

    def loss_name(self) -> Loss | None:
        found: Loss = self.settings.client.loss
        mine, own = type(self), type(self.network)
        usual = mine.local_loss is GraphMethod.local_loss and mine.finish is FedMF.finish and own is Network
        return found if usual else None

    def item_attributes(self, broadcast: B) -> Tensor | None:
        """[m, F] the attributes that enter layer 0 of the items; ``None`` for none."""
        return None

    def layers(self, broadcast: B, rows: Rows, vectors: Tensor) -> Tensor:
        """[B, L, d] the users' layers 0 and 1 if neighbour sums are made of them, else their final vectors (L = 1)."""
        shared, attributes = None if broadcast.dense is None else broadcast.dense[None], self.item_attributes(broadcast)
        own = self.network.users0(rows, vectors, shared)
        if self.neighbours and attributes is None:  # layer 0 of an item is its row
            layers = [own]
            if self.network.n_layers > 1:
                layers.append(weighted_sums(broadcast.items, rows, edge_weights(rows, broadcast.degrees)))
            return torch.stack(layers, dim=1)
        table = self.network.items0(attributes, broadcast.items.index_select(0, rows.items), rows.items, shared)
        if self.neighbours:
            layers = [own]
            if self.network.n_layers > 1:
                below = edge_weights(rows, broadcast.degrees)[:, None] * table
                layers.append(segment_sum(below, rows.segments, rows.n_users))
        else:
            layers = [self.star(broadcast, rows).users(own, table, rows.segments)]
        return torch.stack(layers, dim=1)

    def hand_over(
        self, update: Update, broadcast: B, rows: Rows, labels: Labels, client_state: C, key: Key
    ) -> tuple[Update, C]:
        return self.handover.hand_over(update, broadcast, rows, labels, client_state)

    # --- recommending ---

    def inference_options(self) -> dict[str, Any]:
        network = self.network
        return super().inference_options() | {
            "encoder": network.encoder,
            "n_layers": network.n_layers,
            "neighbours": self.neighbours,
        }

    def final(self, broadcast: B, rows: Rows, client_state: C) -> tuple[Tensor, Tensor]:
        """Final vectors of the users [B, d] and of all items [m, d], as training scores them."""
        star = self.star(broadcast, rows)
        own = broadcast.items.index_select(0, rows.items)
        users = star.users(self.private_of(broadcast, client_state), own, rows.segments)
        return self.finish(users), self.finish(star.items(broadcast.items))

    def scores(self, broadcast: B, rows: Rows, client_state: C) -> Tensor:
        users, items = self.final(broadcast, rows, client_state)
        return users @ items.T

    def scoring(self, broadcast: B, rows: Rows, client_state: C, compared: bool = False) -> Scoring:
        return Scoring.product(*self.final(broadcast, rows, client_state))

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        return Embedding(*self.final(broadcast, rows, client_state))

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        return self.final(broadcast, rows, client_state)[0]
