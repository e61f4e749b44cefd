"""Federated methods with one shared item table: the whole protocol, to which a method adds its own score.

A method of this kind is a subclass that says what a client keeps (:meth:`Federated.init_private`), what network all
share (:meth:`Federated.init_dense`), and how a pair is scored (:meth:`Federated.logits` and
:meth:`Federated.all_scores`). Protection, selection, secure sums, accounting and server steps are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum, from_fixed
from perfedrec.core.algorithm import Phase
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key, bits, fold_in, normal
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Plan, Rows, Spec, Update
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.cohort import Average, Moments, means, over_tables, sparse_step
from perfedrec.methods.federated.settings import SelectionSettings, ServerSettings
from perfedrec.nn.losses import softplus
from perfedrec.nn.optim import adam
from perfedrec.nn.segments import segment_sum
from perfedrec.privacy import uploads
from perfedrec.privacy.labels import label
from perfedrec.privacy.ledger import Release
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.privacy.uploads import protect


class Shim(Protection):
    def upload(self, phase: str, update: Update, key: Key) -> Update:
        return update


class TableSettings(Settings):
    """The shared table."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of item vectors")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the first vectors")


class LocalSettings(Settings):
    """The clients' local training."""

    learning_rate: float = Field(10.0, gt=0, description="step of the item rows (SGD on the sum over labels)")
    user_learning_rate: float = Field(0.02, ge=0, description="step of what the client keeps (Adam, its state stays)")
    dense_learning_rate: float = Field(
        0.1, ge=0, description="step of a shared network (SGD on the mean over a client's labels)"
    )
    local_steps: int = Field(2, ge=1, description="E, local steps a round")


class FederatedSettings(Settings):
    """Options of every method of this kind."""

    model: TableSettings = TableSettings()
    client: LocalSettings = LocalSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    selection: SelectionSettings = SelectionSettings()

    @model_validator(mode="after")
    def _uncounted(self) -> Self:
        if self.privacy.sums and self.server.weighting != "uniform":
            raise ValueError("secure sums hide how many interactions a client has; expected server.weighting = uniform")
        return self


@dataclass(frozen=True)
class Shared:
    """The server's state: ``round``, the table ``items`` [m, d], its running ``average``, the shared network's weights
    ``dense`` [D], and the ``offsets`` [K m, d] of further tables from the shared one, with their optimisers' moments;
    further fields belong to methods that need them."""

    round: int
    n_users: int
    items: Tensor
    items_moments: Moments | None = None
    dense: Tensor | None = None
    dense_moments: Moments | None = None
    average: Average | None = None
    offsets: Tensor | None = None
    offsets_moments: Moments | None = None


@dataclass(frozen=True)
class Download:
    """What clients receive: the table [m, d] and the shared network's weights [D]."""

    items: Tensor
    dense: Tensor | None = None

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives, or all users of a node ``together``: as much."""
        return 4 * (self.items.numel() + (0 if self.dense is None else self.dense.numel()))


@dataclass(frozen=True)
class Kept:
    """What never leaves a client: its ``private`` parameters [B, p] with Adam's moments and ``steps`` [B], the offsets
    ``rows`` [R, d] of its own item rows as it left them, the last ``loss`` [B], a ``secret`` word [B] that sticky
    decoys follow from, and in how many rounds it was ``taken`` [B]."""

    private: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    loss: Tensor
    secret: Tensor
    taken: Tensor
    rows: Tensor = field(metadata={"per": "row"})


class Federated(ABC):
    """Local training of private parameters, item rows and a shared network on binary cross-entropy, one negative for
    each label; averages of the protected changes are the server's steps."""

    Options: ClassVar[type[FederatedSettings]] = FederatedSettings
    broadcast_type: ClassVar[type[Any]] = Download

    def __init__(self, settings: FederatedSettings | None = None) -> None:
        self.settings: Any = settings or self.Options()
        if self.sums and self.n_tables():
            raise ConfigError("several tables need to know who contributes to which; expected sparse aggregation")

    # --- what a method says ---

    def n_private(self) -> int:
        """p, how many parameters a client keeps."""
        return int(self.settings.model.embedding_dim)

    def init_private(self, keys: Tensor) -> Tensor:
        """[B, p] a client's first private parameters, by its own of the ``keys`` [B]."""
        scale: float = self.settings.model.init_scale
        return normal(keys, self.n_private()) * scale

    def init_dense(self, key: Key) -> Tensor | None:
        """[D] first weights of the shared network, ``None`` where there is none."""
        return None

    def n_tables(self) -> int:
        """K, tables beside the shared one, as offsets from it; a client's changes go to that of its
        :meth:`contributes_to`, and to the shared one. 0: there are none."""
        return 0

    def table_share(self, state: Any) -> float:
        """Step of those tables, as a share of the server's step; 0: none is taken."""
        return 0.0

    @abstractmethod
    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        """[T] scores of pairs: of the clients ``segments`` [T], which have ``private`` [B, p] and ``dense`` [B, D],
        with item ``rows`` [T, d]."""

    @abstractmethod
    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        """[B, m] scores of all ``items`` [m, d], with the shared ``dense`` [D]."""

    def penalty(
        self, base: Tensor, begun: Tensor, delta: Tensor, segments: Tensor, client_state: Kept
    ) -> Tensor | None:
        """[B] what is added to a client's loss for its item rows, which it received as ``base`` [T, d]: they began with
        the offsets ``begun`` [T, d], and have ``delta`` [T, d] now."""
        return None

    def table_rows(self, broadcast: Any, items: Tensor, segments: Tensor) -> Tensor:
        """[T, d] the rows of ``items`` [T] that the clients ``segments`` [T] start from."""
        rows: Tensor = broadcast.items.index_select(0, items)
        return rows

    def begins(self, client_state: Kept, positions: Tensor, delta: Tensor) -> Tensor:
        """[T, d] offsets that local training starts with; ``positions`` [P] of the first rows among a client's own, -1
        for those of others."""
        return delta

    def keeps(self, begun: Tensor, delta: Tensor) -> Tensor:
        """[T, d] what a client keeps of its rows, from the offsets before and after local training."""
        return delta

    # --- the server's side ---

    aggregator = Sum()
    needs_service = False

    @property
    def protection(self) -> Protection:
        return Shim(self.settings.privacy, self.phases)

    @property
    def sums(self) -> bool:
        return bool(self.settings.privacy.sums)

    def embedding(self, broadcast: Any, rows: Rows, client_state: Any) -> Embedding | None:
        return None

    def user_vectors(self, broadcast: Any, rows: Rows, client_state: Any) -> Tensor | None:
        return None

    @property
    def reports_vectors(self) -> bool:
        """Whether clients hand over protected vectors of their own: where a method says how."""
        return type(self).report is not Federated.report

    @property
    def phases(self) -> list[Phase]:
        return []

    @property
    def needs_degrees(self) -> bool:
        return False

    def init(self, spec: Spec, key: Key) -> Any:
        model, adaptive = self.settings.model, self.settings.server.optimizer != "fedavg"
        every = torch.arange(spec.n_items, device=spec.item_degrees.device)
        items = normal(key.fold("items").spread(every), model.embedding_dim) * model.init_scale
        dense, n_tables = self.init_dense(key.fold("dense")), self.n_tables()
        offsets = items.new_zeros(n_tables * spec.n_items, model.embedding_dim) if n_tables else None
        return Shared(
            round=0,
            n_users=spec.n_users,
            items=items,
            items_moments=Moments.zeros(items) if adaptive else None,
            dense=None if dense is None else dense.to(items.device),
            dense_moments=Moments.zeros(dense.to(items.device)) if adaptive and dense is not None else None,
            average=Average.start(items) if self.settings.server.averaging else None,
            offsets=offsets,
            offsets_moments=Moments.zeros(offsets) if adaptive and offsets is not None else None,
        )

    def releases(self, rounds: int, n_users: int) -> list[Release]:
        """Everything that a run of so many rounds lets out of the clients, for the ledger."""
        return [cohort.training_release(self.settings.privacy, self.settings.selection, rounds, n_users)]

    def n_groups(self, state: Any) -> int:
        return max(self.n_tables(), 1)

    def groups(self, state: Any, users: Tensor) -> Tensor:
        return torch.zeros_like(users)

    def plan(self, state: Any, key: Key) -> Plan:
        return Plan("train", cohort.select(state.n_users, self.settings.selection, key, state.items.device))

    def broadcast(self, state: Any, users: Tensor) -> Any:
        return Download(state.items, state.dense)

    def release(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        return uploads.released(aggregate, self.settings.privacy, phase, asked, key)

    def aborted(self, phase: str, clients: int, asked: int) -> bool:
        return uploads.aborted(clients, self.settings.privacy, phase, asked)

    def server(self, state: Any, phase: str, aggregate: Aggregate, key: Key) -> Any:
        if aggregate.clients:
            settings, weight = self.settings, from_fixed(aggregate.weights).sum()
            if self.sums:  # what is expected: counts are not released
                weight = torch.tensor(float(min(settings.selection.n_clients_per_round, state.n_users)))
            touched, change, share = aggregate.keys, from_fixed(aggregate.sums), self.table_share(state)
            if state.offsets is not None:
                mean = means(aggregate, from_fixed(aggregate.weights))
                if share:
                    sparse_step(settings.server, state.offsets, state.offsets_moments, touched, mean, share)
                touched, change = over_tables(touched, change, aggregate.n_items)
            if state.average is not None:
                state.average.advance(state.items, touched, state.round, settings.server.averaging)
            sparse_step(settings.server, state.items, state.items_moments, touched, change / weight)
            if state.average is not None:
                state.average.advance(state.items, touched, state.round + 1, settings.server.averaging)
            if aggregate.dense is not None and state.dense is not None:
                every = torch.arange(state.dense.numel(), device=state.dense.device)
                mean = from_fixed(aggregate.dense) / weight
                sparse_step(settings.server, state.dense, state.dense_moments, every, mean)
        return replace(state, round=state.round + 1)

    # --- the client's side ---

    def init_clients(self, rows: Rows, key: Key) -> Kept:
        private, n = self.init_private(key.fold("vectors").spread(rows.users)), rows.n_users
        device, whole = rows.users.device, {"dtype": torch.int64, "device": rows.users.device}
        return Kept(
            private=private,
            first=torch.zeros_like(private),
            second=torch.zeros_like(private),
            steps=torch.zeros(n, **whole),  # type: ignore[call-overload]
            loss=torch.zeros(n, device=device),
            secret=bits(key.fold("secret").spread(rows.users), 1).squeeze(1),
            taken=torch.zeros(n, **whole),  # type: ignore[call-overload]
            rows=torch.zeros(rows.items.numel(), self.settings.model.embedding_dim, device=device),
        )

    def client(self, phase: str, broadcast: Any, rows: Rows, client_state: Kept, key: Key) -> tuple[Update, Kept]:
        client, privacy, cap = self.settings.client, self.settings.privacy, self.settings.selection.max_participations
        labels = label(rows, broadcast.items.shape[0], privacy, None, key.fold("labels"), client_state.secret)
        labelled, n_labelled = labels.rows, labels.rows.items.numel()
        items, segments = torch.cat([labelled.items, labels.negatives]), torch.cat([labelled.segments, labels.owners])
        base = self.table_rows(broadcast, items, segments)
        delta = begun = self.begins(client_state, labels.positions, torch.zeros_like(base))
        dense = None if broadcast.dense is None else broadcast.dense.repeat(rows.n_users, 1)
        signs = torch.cat([base.new_full((n_labelled,), -1.0), base.new_ones(items.numel() - n_labelled)])
        loss = base.new_zeros(rows.n_users)
        for _ in range(client.local_steps):
            leaves = [
                each.detach().requires_grad_()
                for each in (client_state.private, base + delta, dense)
                if each is not None
            ]
            scores = self.logits(leaves[0], leaves[1], segments, leaves[2] if dense is not None else None)
            order = segments.argsort(stable=True)
            loss = segment_sum(softplus(signs * scores)[order], segments[order], rows.n_users)
            extra = self.penalty(base, begun, leaves[1] - base, segments, client_state)
            gradients = torch.autograd.grad((loss if extra is None else loss + extra).sum(), leaves)
            step, first, second, steps = adam(
                gradients[0],
                client_state.first,
                client_state.second,
                client_state.steps,
                client.user_learning_rate,
                (0.9, 0.999),
                1e-8,
            )
            client_state = replace(
                client_state, private=client_state.private + step, first=first, second=second, steps=steps
            )
            delta = delta - client.learning_rate * gradients[1]
            if dense is not None:
                dense = dense - client.dense_learning_rate * gradients[2] / labelled.counts.clamp(min=1)[:, None]
        real = (labels.positions >= 0).nonzero().squeeze(1)
        client_state = replace(
            client_state,
            loss=loss.detach() / labelled.counts.clamp(min=1),
            rows=client_state.rows.index_copy(0, labels.positions[real], self.keeps(begun, delta)[real]),
            taken=client_state.taken + 1,
        )
        change = None if dense is None or broadcast.dense is None else dense - broadcast.dense
        delta = delta - begun
        if cap is not None:  # a client that has had its share of rounds hands over zeros
            active = (client_state.taken <= cap).to(delta.dtype)[:, None]
            delta, change = delta * active[segments], None if change is None else change * active
        noise, dense_noise = key.fold("noise").spread(rows.users), key.fold("dense noise").spread(rows.users)
        update = Update(
            users=rows.users,
            groups=self.contributes_to(broadcast, rows, client_state),
            weights=cohort.weights(rows, self.settings.server),
            segments=segments,
            items=items,
            deltas=protect(delta, privacy, fold_in(noise[segments], items)),
            dense=None if change is None else protect(change, privacy, dense_noise),
            reports=self.report(broadcast, rows, client_state, key),
        )
        return uploads.bounded(update, privacy, "train"), client_state

    def contributes_to(self, broadcast: Any, rows: Rows, client_state: Kept) -> Tensor:
        """[B] which of :meth:`n_tables` each client's changes are summed in."""
        return torch.zeros_like(rows.users)

    def report(self, broadcast: Any, rows: Rows, client_state: Kept, key: Key) -> Tensor | None:
        """[B, K, d] protected vectors that clients report, for methods that relate users to each other."""
        return None

    @property
    def finetune_rounds(self) -> int:
        return 10

    def init_new_user(self, broadcast: Any, rows: Rows, client_state: Kept) -> Kept:
        return client_state

    def without_privacy(self) -> Self:
        return type(self)(self.settings.model_copy(update={"privacy": PrivacySettings()}))

    # --- scoring ---

    def serving(self, state: Any) -> Any:
        items, average = state.items, state.average
        if average is not None:
            items = average.as_of(items, state.round, self.settings.server.averaging)
        return replace(state, items=items, average=None, items_moments=None, dense_moments=None, offsets_moments=None)

    def scores(self, broadcast: Any, rows: Rows, client_state: Kept) -> Tensor:
        """[B, m] scores of all items."""
        return self.all_scores(client_state.private, broadcast.items, broadcast.dense)

    def explain(self, broadcast: Any, rows: Rows, client_state: Kept) -> dict[str, Tensor]:
        """The scores, as one part."""
        return {"global": self.scores(broadcast, rows, client_state)}
