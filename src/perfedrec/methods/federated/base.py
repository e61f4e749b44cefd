"""The engine of all federated methods with one shared item table.

A method is a subclass. It defines what a client keeps (:meth:`Federated.init_private`), which network is shared
(:meth:`Federated.init_dense`), and how a pair of user and item is scored (:meth:`Federated.logits` and
:meth:`Federated.all_scores`). The engine does selection, local training, the server's step, accounting and serving.
Protection is in :class:`perfedrec.privacy.protection.Protection`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import isfunction, signature
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Aggregator, Sum, check_aggregator, from_fixed
from perfedrec.core.algorithm import TRAIN, OneSetting, Phase
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key, bits, normal
from perfedrec.core.memory import zeros
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Plan, Rows, Spec, Update
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.defence import DefenceSettings, aggregator_of, hold_tables, remarks_on, sizes_of
from perfedrec.methods.federated.local import LocalSteps, LocalTask, Loss, Parameters, checked, own_rows, steps
from perfedrec.methods.federated.phases import DEGREES, SPECTRAL
from perfedrec.methods.federated.row_steps import applied, empty_bank
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import Broadcast, ClientState, OptimizerState, ServerState
from perfedrec.methods.federated.subspace import Subspace, with_degrees
from perfedrec.methods.federated.tables import Apart, Average, Moments, Received, Tables, step, step_dense
from perfedrec.nn.losses import softplus
from perfedrec.nn.propagation import Star
from perfedrec.nn.segments import segment_sum
from perfedrec.privacy.labels import Labels, by_client
from perfedrec.privacy.ledger import Release
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings

S = TypeVar("S", bound=ServerState)
B = TypeVar("B", bound=Broadcast)
C = TypeVar("C", bound=ClientState)


@dataclass(frozen=True)
class LocalBatch(Generic[B]):
    """What a block of clients trains on: the ``broadcast`` that they received, their ``labels``, and the ``star`` graph
    on which vectors are propagated (``None`` for a method without propagation)."""

    broadcast: B
    labels: Labels
    star: Star | None


class Federated(OneSetting[S, B, C], Generic[S, B, C]):
    """Federated training of private parameters, item rows and a shared network, with server state S, broadcast B and
    client state C. Its public functions fulfil :class:`perfedrec.core.algorithm.Algorithm`.

    Raises :class:`ConfigError` for options that contradict each other, and for a phase that privacy cannot account for.
    """

    Options: ClassVar[type[Settings]] = FederatedSettings
    """The class of the method's options."""

    broadcast_type: ClassVar[type[Broadcast]] = Broadcast
    aggregator: Aggregator = Sum()
    """The rule by which the parts of a round become one aggregate; a property where it depends on the settings."""

    local_steps: LocalSteps = staticmethod(steps)
    """The function that trains on a client. Another function of the same type can replace it."""

    chooses_table: ClassVar[bool] = False
    """Whether clients themselves choose the table that they contribute to, so that nobody else has to know it."""

    def __init_subclass__(cls, **more: Any) -> None:
        """A function that takes a task alone needs no ``staticmethod`` to become a method's local steps."""
        super().__init_subclass__(**more)
        steps = cls.__dict__.get("local_steps")
        if isfunction(steps) and len(signature(steps).parameters) == 1:
            cls.local_steps = staticmethod(steps)

    def __init__(self, settings: Settings | None = None) -> None:
        chosen: Any = settings or self.Options()
        self.settings = chosen
        self.defence: DefenceSettings = getattr(chosen, "defence", DefenceSettings())
        phases, row_clip, groups = (*self.phases, *self.questions), self.defence.row_clip, self.defence.groups
        self.protection = Protection(chosen.privacy, phases, row_clip, groups, sizes_of(self.defence))
        if self.defence.made is not None or self.defence.group_size:
            self.aggregator = aggregator_of(self.defence, self.protection, self.phases, self.aggregator)
        if self.subspace is not None and SPECTRAL not in self.phases:
            raise ConfigError(
                f"{type(self).__name__}.phases lacks the passes that find the basis of secure sums; expected it to "
                "begin with super().phases, or privacy.rank = 0, with which a sum shows the items of many clients"
            )
        if self.protection.sums and self.n_tables() and not self.chooses_table:
            raise ConfigError("the server must know which table a client contributes to; expected sparse aggregation")
        check_aggregator(self.aggregator, self.protection.secure)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def remarks(self, n_users: int) -> list[str]:
        asked = min(n_users, self.settings.selection.n_clients_per_round)
        return remarks_on(self.defence, self.protection, asked, self.needs_service, n_users)

    # --- what a method defines ---

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases before training, one round each. All users take part in each of them."""
        return () if self.subspace is None else self.subspace.phases

    @cached_property
    def subspace(self) -> Subspace | None:
        """The basis in which sums are taken; ``None`` where they are taken by item."""
        return Subspace(self.settings.privacy) if self.settings.privacy.low_rank else None

    @property
    def questions(self) -> tuple[Phase, ...]:
        """Phases that a coordinator may play before the first round."""
        return ()

    def n_private(self) -> int:
        """p, the number of private parameters that a client keeps."""
        return int(self.settings.model.embedding_dim)

    def init_private(self, keys: Tensor) -> Tensor:
        """[B, p] the first private parameters of each client, drawn with its own key of ``keys`` [B]."""
        return normal(keys, self.n_private()) * float(self.settings.model.init_scale)

    def init_dense(self, key: Key) -> Tensor | None:
        """[D] the first weights of the shared network; ``None`` for a method without one."""
        return None

    def n_tables(self) -> int:
        """K, the number of tables beside the shared one, stored as offsets from it; 0 for none. A client's changes go
        to the shared table and to the table that :meth:`contributes_to` returns."""
        return 0

    def table_share(self, state: S) -> float:
        """Step size of these tables, as a share of the server's step; 0 for no step."""
        return 0.0

    def table_rows(self, broadcast: B, items: Tensor, segments: Tensor) -> Tensor:
        """[T, d] the rows of ``items`` [T] from which the clients ``segments`` [T] start."""
        return Received(broadcast.tables, broadcast.groups, items, segments, items).rows

    def star(self, broadcast: B, rows: Rows) -> Star | None:
        """The propagation on the clients' star graphs; ``None`` for a method without propagation."""
        return None

    def begins(self, client_state: C, positions: Tensor, received: Tensor) -> Tensor | None:
        """[T, d] offsets that clients add to the rows ``received`` [T, d] before the first step; ``None`` for zeros.
        ``positions`` [P] are the positions of the first P rows among a client's own rows, -1 for decoys."""
        return None

    def keeps(self, begun: Tensor, delta: Tensor) -> Tensor:
        """[T, d] the offsets of its rows that a client keeps, from the offsets before local training (``begun`` [T, d]
        or a scalar 0) and after it (``delta`` [T, d])."""
        return delta

    @abstractmethod
    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        """[T] scores of pairs: of the clients ``segments`` [T], with ``private`` [B, p] and ``dense`` [B, D], and the
        item rows ``rows`` [T, d]."""

    @abstractmethod
    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        """[B, m] scores of all ``items`` [m, d] for clients with ``private`` [B, p] and the shared ``dense`` [D]."""

    def local_loss(self, batch: LocalBatch[B], parameters: Parameters) -> Tensor:
        """[B] each client's loss. By default it is the binary cross-entropy of :meth:`logits`, summed over the client's
        labels and its negatives."""
        labels = batch.labels
        segments, order = by_client(labels)
        rows = torch.cat([parameters.positives, parameters.negatives])
        signs = torch.cat([-torch.ones_like(labels.rows.items), torch.ones_like(labels.negatives)]).to(rows.dtype)
        scores = self.logits(parameters.private, rows, segments, parameters.dense)
        self._check_shape("logits", scores, [rows.shape[0]])
        return segment_sum(softplus(signs * scores)[order], segments[order], labels.rows.n_users)

    def loss_name(self) -> Loss | None:
        """The name of :meth:`local_loss`, for local steps with gradients of their own; ``None`` for a method's own."""
        return "logistic" if type(self).local_loss is Federated.local_loss else None

    def penalty(
        self, received: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: C
    ) -> Tensor | None:
        """[B] what is added to each client's objective for its item rows, but not to the reported loss; ``None`` for
        nothing.

        The client ``received`` the rows [T, d], started with the offsets ``begun`` ([T, d] or a scalar 0) and now has
        the offsets ``delta`` [T, d].
        """
        return None

    def n_negatives(self) -> int | None:
        """The number of negatives that a client draws; ``None`` for one per label."""
        return None

    def contributes_to(self, broadcast: B, rows: Rows, client_state: C) -> Tensor:
        """[B] the number of the table (of :meth:`n_tables`) in which each client's changes are summed."""
        return broadcast.groups

    def report(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> Tensor | None:
        """[B, L, d] vectors that clients send, for methods that relate users to each other."""
        return None

    # --- public properties ---

    @property
    def sums(self) -> bool:
        """Whether clients contribute only to sums."""
        return bool(self.settings.privacy.sums)

    @property
    def reports_vectors(self) -> bool:
        return type(self).report is not Federated.report

    @property
    def needs_degrees(self) -> bool:
        return False

    @property
    def needs_service(self) -> bool:
        return False

    @property
    def finetune_rounds(self) -> int:
        return 10

    def without_privacy(self) -> Self:
        return type(self)(self.settings.model_copy(update={"privacy": PrivacySettings()}))

    def releases(self, rounds: int, n_users: int) -> list[Release]:
        """Everything that a run with ``rounds`` rounds of training releases, for the ledger."""
        selection = self.settings.selection
        cap = rounds if selection.max_participations is None else min(rounds, selection.max_participations)
        rate = min(1.0, selection.n_clients_per_round / n_users)
        guarantee = self.protection.guarantee(TRAIN.name)
        training = Release(TRAIN.release, rounds, guarantee, cap, selection.sampling, rate)
        return [*self.protection.releases(self.phases), training]

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> S:
        return cast(S, self._init(spec, key))

    def _init(self, spec: Spec, key: Key) -> ServerState:
        """The fields of the first server state that every method has."""
        model, every = self.settings.model, torch.arange(spec.n_items, device=spec.item_degrees.device)
        items = normal(key.fold("items").spread(every), model.embedding_dim) * model.init_scale
        dense, n_tables = self._init_dense(spec, key.fold("dense")), self.n_tables()
        dense = None if dense is None else dense.to(items.device)
        offsets = zeros(n_tables * spec.n_items, model.embedding_dim, like=items) if n_tables else None
        tables = (items, offsets, dense) if self.settings.server.optimizer != "fedavg" else (None, None, None)
        return ServerState(
            round=0,
            n_users=spec.n_users,
            items=items,
            dense=dense,
            offsets=offsets,
            optimizer=OptimizerState(*(None if each is None else Moments.zeros(each) for each in tables)),
            average=Average.start(items) if self.settings.server.averaging else None,
            bank=empty_bank(items, n_tables, self.defence.sparse),
            **({} if self.subspace is None else self.subspace.start(spec, key)),
        )

    def _init_dense(self, spec: Spec, key: Key) -> Tensor | None:
        return self.init_dense(key)

    def phase(self, state: S) -> str:
        """The name of the next round's phase."""
        return (self.phases[state.round] if state.round < len(self.phases) else TRAIN).name

    def trained(self, state: S) -> int:
        """The number of training rounds played; negative while phases before training are still to be played."""
        return state.round - len(self.phases)

    def n_models(self, state: S) -> int:
        """The number of tables in which changes of item rows are summed."""
        return max(self.n_tables(), 1)

    def n_groups(self, state: S) -> int:
        return self.n_models(state)

    def n_rows(self, state: S) -> int:
        return state.items.shape[0] if self.subspace is None else self.subspace.n_rows(state, self.phase(state))

    def groups(self, state: S, users: Tensor) -> Tensor:
        return torch.zeros_like(users)

    def plan(self, state: S, key: Key) -> Plan:
        phase = self.phase(state)
        if phase != TRAIN.name:
            return Plan(phase, torch.arange(state.n_users, device=state.items.device))
        return Plan(phase, self.select(state, key))

    def select(self, state: S, key: Key) -> Tensor:
        """The cohort [c] of a training round."""
        return cohort.select(state.n_users, self.settings.selection, key, state.items.device)

    def broadcast(self, state: S, users: Tensor) -> B:
        more = {} if self.subspace is None else self.subspace.sent(state, self.phase(state))
        groups = self.groups(state, users)
        return cast(B, Broadcast(items=state.items, dense=state.dense, groups=groups, degrees=state.degrees, **more))

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        aggregate = self.lift(state, phase, aggregate)
        if aggregate.clients and phase == TRAIN.name:
            self.server_step(state, aggregate)
        elif aggregate.clients and phase == DEGREES.name:
            state = replace(state, degrees=with_degrees(state, aggregate, self.protection.multiplier(phase) > 0))
        elif aggregate.clients and phase == SPECTRAL.name and self.subspace is not None:
            state = self.subspace.absorb(state, aggregate)
        return replace(state, round=state.round + 1)

    def lift(self, state: S, phase: str, aggregate: Aggregate) -> Aggregate:
        return aggregate if self.subspace is None else self.subspace.lift(state, phase, aggregate)

    def group_weights(self, state: S, aggregate: Aggregate) -> Tensor:
        """[G] the divisor of each group's sums: the weights of its clients or, where these are not released, the
        expected number of clients."""
        if not self.sums:
            return from_fixed(aggregate.weights)
        return state.items.new_tensor([min(self.settings.selection.n_clients_per_round, state.n_users)])

    def server_step(self, state: S, aggregate: Aggregate) -> None:
        """The step of the item table, the further tables and the shared network, in place (adaptive federated
        optimisation, Reddi et al., ICLR 2021, algorithm 2). Only rows that clients touched are read or written."""
        server, weights = self.settings.server, self.group_weights(state, aggregate)
        share, moments, apart = self.table_share(state), state.optimizer, None
        aggregate = applied(state.bank, aggregate, weights, self.defence)
        if state.offsets is not None and share:
            apart = Apart(state.offsets, moments.offsets, weights, share)
        step(server, state.items, moments.items, state.average, aggregate, weights.sum(), state.round, apart)
        hold_tables(state.items, state.offsets, self.defence.row_length)
        step_dense(server, state.dense, moments.dense, aggregate.dense, weights.sum())

    def serving(self, state: S) -> S:
        items, average = state.items, state.average
        if average is not None:
            items = average.as_of(items, state.round, self.settings.server.averaging)
        return replace(
            state, items=items, average=None, optimizer=OptimizerState(), basis=None, probe=None, factor=None, bank=None
        )

    # --- the clients ---

    def init_clients(self, rows: Rows, key: Key) -> C:
        return cast(C, self._init_clients(rows, key))

    def _init_clients(self, rows: Rows, key: Key) -> ClientState:
        """The fields of the first client state that every method has."""
        private, n, device = self.init_private(key.fold("vectors").spread(rows.users)), rows.n_users, rows.users.device
        return ClientState(
            private=private,
            first=torch.zeros_like(private),
            second=torch.zeros_like(private),
            steps=torch.zeros(n, dtype=torch.int64, device=device),
            loss=torch.zeros(n, device=device),
            secret=bits(key.fold("secret").spread(rows.users), 1).squeeze(1),
            participations=torch.zeros(n, dtype=torch.int64, device=device),
            rows=zeros(rows.items.numel(), self.settings.model.embedding_dim, like=private),
        )

    def client(self, phase: str, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        if self.subspace is not None and phase in (DEGREES.name, SPECTRAL.name):
            return self.subspace.client(phase, broadcast, rows), client_state
        if phase != TRAIN.name:
            raise ConfigError(
                f"{type(self).__name__} has no work for clients in phase {phase}; expected its client() to handle it"
            )
        return self.train(broadcast, rows, client_state, key)

    def train(self, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """E local steps on each client's private parameters, its item rows and its copy of the shared network. The
        client sends the changes of the item rows and of the network."""
        n_items = broadcast.items.shape[0]
        labels = self.protection.label(rows, n_items, self.n_negatives(), key.fold("labels"), client_state.secret)
        items = torch.cat([labels.rows.items, labels.negatives])
        segments = torch.cat([labels.rows.segments, labels.owners])
        received = self._receives(broadcast, items, segments)
        begins = type(self).begins is not Federated.begins
        begun = self.begins(client_state, labels.positions, received.rows) if begins else None
        batch = LocalBatch(broadcast, labels, self.star(broadcast, labels.rows))
        task = self._task(batch, received, begun, client_state)
        result = checked(self.local_steps(task), task, f"{type(self).__name__}.local_steps")
        kept = self.keeps(result.delta.new_zeros(()) if begun is None else begun, result.delta)
        client_state = replace(
            client_state,
            private=result.private,
            first=result.first,
            second=result.second,
            steps=result.steps,
            loss=result.loss / labels.rows.counts.clamp(min=1),
            participations=client_state.participations + 1,
            rows=own_rows(kept, labels.positions, client_state.rows),
        )
        update = Update(
            users=rows.users,
            groups=self.contributes_to(broadcast, rows, client_state),
            weights=cohort.weights(rows, self.settings.server),
            segments=segments,
            items=items,
            deltas=result.delta if begun is None else result.delta - begun,
            dense=None if result.dense is None or broadcast.dense is None else result.dense - broadcast.dense,
        )
        return self.hand_over(self._capped(update, client_state), broadcast, rows, labels, client_state, key)

    def _task(self, batch: LocalBatch[B], received: Received, begun: Tensor | None, client_state: C) -> LocalTask:
        """The local training of a block of clients, for :attr:`local_steps`."""
        shared = batch.broadcast.dense
        dense = None if shared is None else shared.repeat(batch.labels.rows.n_users, 1)
        private = self.private_of(batch.broadcast, client_state)
        penalised = type(self).penalty is not Federated.penalty

        def objective(parameters: Parameters) -> tuple[Tensor, Tensor]:
            loss = self.local_loss(batch, parameters)
            if not penalised:
                return loss, loss
            rows = received.rows
            delta = torch.cat([parameters.positives, parameters.negatives]) - rows
            first = rows.new_zeros(()) if begun is None else begun
            extra = self.penalty(rows, first, delta, received.segments, client_state)
            return loss, loss if extra is None else loss + extra

        return LocalTask(
            labels=batch.labels,
            received=received,
            private=private,
            dense=dense,
            begun=begun,
            client_state=client_state,
            objective=objective,
            loss=self.loss_name(),
            penalised=penalised,
            star=batch.star,
            client=self.settings.client,
        )

    def _receives(self, broadcast: B, items: Tensor, segments: Tensor) -> Received:
        """The rows of ``items`` [T] from which the clients ``segments`` [T] start."""
        if type(self).table_rows is Federated.table_rows:
            return Received(broadcast.tables, broadcast.groups, items, segments, items)
        places = torch.arange(items.numel(), device=items.device)
        tables = Tables(self.table_rows(broadcast, items, segments))
        return Received(tables, broadcast.groups, items, segments, places)

    def private_of(self, broadcast: B, client_state: C) -> Tensor:
        """[B, p] the private parameters from which clients start a round."""
        return client_state.private

    def _capped(self, update: Update, client_state: C) -> Update:
        """The update with zeros for clients that have already taken part in the maximum number of rounds."""
        cap = self.settings.selection.max_participations
        if cap is None or update.deltas is None or update.segments is None:
            return update
        active = (client_state.participations <= cap).to(update.deltas.dtype)[:, None]
        dense = None if update.dense is None else update.dense * active
        return replace(update, deltas=update.deltas * active[update.segments], dense=dense)

    def hand_over(
        self, update: Update, broadcast: B, rows: Rows, labels: Labels, client_state: C, key: Key
    ) -> tuple[Update, C]:
        """The update that clients send after local training, with their reports added, and their client states."""
        return replace(update, reports=self.report(broadcast, rows, client_state, key)), client_state

    def compress(self, broadcast: B, phase: str, aggregate: Aggregate) -> Aggregate:
        return aggregate if self.subspace is None else self.subspace.compress(broadcast, phase, aggregate)

    def init_new_user(self, broadcast: B, rows: Rows, client_state: C) -> C:
        return client_state

    # --- recommending ---

    def scores(self, broadcast: B, rows: Rows, client_state: C) -> Tensor:
        """[B, m] scores of all items."""
        scores = self.all_scores(client_state.private, broadcast.items, broadcast.dense)
        self._check_shape("all_scores", scores, [rows.n_users, broadcast.items.shape[0]])
        return scores

    def _check_shape(self, hook: str, found: Tensor, wanted: list[int]) -> None:
        """Raises :class:`ConfigError` where a hook of the method returned another shape than it should."""
        if list(found.shape) != wanted:
            raise ConfigError(f"{type(self).__name__}.{hook} returned shape {list(found.shape)}; expected {wanted}")

    def explain(self, broadcast: B, rows: Rows, client_state: C) -> dict[str, Tensor]:
        """The scores, as a single part."""
        return {"global": self.scores(broadcast, rows, client_state)}

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        return None

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        return None
