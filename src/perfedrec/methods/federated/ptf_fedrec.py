"""PTF-FedRec: clients and server exchange scores instead of parameters (Yuan et al., ICDE 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.algorithm import TRAIN
from perfedrec.core.keys import Key, bits, fold_in, normal, uniform
from perfedrec.core.sampling import ranks
from perfedrec.core.settings import Settings
from perfedrec.core.types import Plan, Rows, Spec, Update
from perfedrec.methods.federated.base import Federated, LocalBatch
from perfedrec.methods.federated.local import Loss, Parameters
from perfedrec.methods.federated.settings import LocalSettings, SelectionSettings, TableSettings
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.nn.losses import softplus
from perfedrec.nn.optim import adam
from perfedrec.nn.propagation import Adjacency, Bipartite, lightgcn
from perfedrec.nn.segments import dot, segment_sum
from perfedrec.privacy.labels import Labels
from perfedrec.privacy.settings import PrivacySettings


class HiddenSettings(Settings):
    """Options of the server's hidden model."""

    learning_rate: float = Field(0.01, gt=0, description="step of Adam")
    steps: int = Field(2, ge=1, description="steps of a round, each on all scores that were received in it")
    n_layers: int = Field(2, ge=0, description="K, number of LightGCN's propagation layers")
    weighting: Literal["uniform"] = Field("uniform", description="always uniform, because scores are not averaged")


class ExchangeSettings(Settings):
    """Options of the scores that clients and server send to each other."""

    least_share: float = Field(
        0.1, gt=0, le=1, description="least share of its items that a client sends scores of (drawn anew in each round)"
    )
    swapped: float = Field(
        0.1, ge=0, le=1, description="share of the sent items, those with the highest scores, that swap with negatives"
    )
    n_received: int = Field(30, ge=0, description="scores that a client receives: half for frequent items, half high")


class PTFSettings(Settings):
    """Options of PTF-FedRec."""

    model: TableSettings = TableSettings()
    client: LocalSettings = LocalSettings()
    exchange: ExchangeSettings = ExchangeSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: HiddenSettings = HiddenSettings()
    selection: SelectionSettings = SelectionSettings()

    @model_validator(mode="after")
    def _one_by_one(self) -> PTFSettings:
        if self.privacy.sums:
            raise ValueError(
                "ptf_fedrec trains its server on the scores of single users; expected privacy.aggregation = sparse"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class PTFState(ServerState):
    """Adds the hidden model: ``users`` [n, d] (``items`` are its item vectors), Adam's moments ``first`` and ``second``
    [n + m, d] and number of ``steps``, and the propagated vectors ``final`` [n + m, d].

    ``uploads`` [E], ascending ``user * m + item``, and ``scores`` [E] are what each user sent last; ``counts`` [m] how
    often an item was sent; ``cohort`` [c] the users of the next round, ascending. A served state has no ``uploads``.
    """

    users: Tensor
    first: Tensor
    second: Tensor
    steps: int
    final: Tensor
    uploads: Tensor | None
    scores: Tensor
    counts: Tensor
    cohort: Tensor


@dataclass(frozen=True, kw_only=True)
class PTFBroadcast(Broadcast):
    """``items`` is empty [m, 0]: the model is hidden. In a round each user receives ``sent`` items [B, a], -1 for none,
    with their ``scores`` [B, a]; to recommend it receives the ``scores`` [B, m] of all items."""

    sent: Tensor | None = field(default=None, metadata={"per": "user"})
    scores: Tensor = field(metadata={"per": "user"})

    def download_bytes(self, together: bool = False) -> int:
        numbers = self.scores.shape[1] + (0 if self.sent is None else self.sent.shape[1])
        return 4 * numbers * (self.scores.shape[0] if together else 1)


class PTFFedRec(Federated[PTFState, PTFBroadcast, ClientState]):
    """No parameter is sent. A client has a model of its own, ``p_u . z_i``. After local training it sends the scores of
    a random part of its items and of as many negatives, of which the highest are swapped. The server trains a hidden
    model on all clients' scores, and sends each client its own scores of some items that the client did not send: half
    those that were sent most often ("confident"), half those with the highest scores ("hard"). A client trains on them
    as on soft labels (sections 3.2 and 3.3). What is recommended is the hidden model's choice.

    Who sees what: the server sees scores of single users, and has vectors of them. Other clients and outsiders see
    nothing; a client sees only its own scores. The swaps deceive who guesses items from high scores, without a
    guarantee. Sums and noise in sums do not fit this and are refused; profile ``paper`` adds noise to each score.

    Departs from the paper: a client's model is an inner product instead of a neural network; its item vectors start
    from those that all clients draw from the same key, and only those of its own items are trained and kept; the hidden
    model is LightGCN on the users' last scores above 1/2, and takes steps on all scores of a round at once; one
    negative per label instead of one to four. New users all receive the scores of the mean user vector.
    """

    Options = PTFSettings
    settings: PTFSettings
    broadcast_type = PTFBroadcast

    @property
    def finetune_rounds(self) -> int:
        return 0

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> PTFState:
        model, device = self.settings.model, spec.item_degrees.device
        users, items = (
            normal(key.fold(side).spread(torch.arange(n, device=device)), model.embedding_dim) * model.init_scale
            for side, n in (("users", spec.n_users), ("items", spec.n_items))
        )
        final, none = torch.cat([users, items]), torch.zeros(0, dtype=torch.int64, device=device)
        state = PTFState(
            round=0,
            n_users=spec.n_users,
            items=items,
            users=users,
            first=torch.zeros_like(final),
            second=torch.zeros_like(final),
            steps=0,
            final=final,
            uploads=none,
            scores=final.new_zeros(0),
            counts=torch.zeros(spec.n_items, dtype=torch.int64, device=device),
            cohort=none,
        )
        return self.with_cohort(state, key)

    def with_cohort(self, state: PTFState, key: Key) -> PTFState:
        """The state with the cohort of the next round. A client's group is its place in it, so that sums by group and
        item are the scores of single users."""
        return replace(state, cohort=self.select(state, key.fold("cohort")).sort().values)

    def plan(self, state: PTFState, key: Key) -> Plan:
        return Plan(TRAIN.name, state.cohort)

    def n_groups(self, state: PTFState) -> int:
        return max(state.cohort.numel(), 1)

    def groups(self, state: PTFState, users: Tensor) -> Tensor:
        return torch.searchsorted(state.cohort, users).clamp(max=self.n_groups(state) - 1)

    def broadcast(self, state: PTFState, users: Tensor) -> PTFBroadcast:
        n, known = state.n_users, users >= 0
        vectors = state.final[users.clamp(min=0)]
        vectors[~known] = state.final[:n].mean(0)
        logits, sent = vectors @ state.final[n:].T, None
        if state.uploads is not None:
            sent = self.sent(state, users, logits)
            logits = logits.gather(1, sent.clamp(min=0))
        items, groups = state.items[:, :0].contiguous(), self.groups(state, users)
        return PTFBroadcast(items=items, groups=groups, sent=sent, scores=logits.sigmoid())

    def sent(self, state: PTFState, users: Tensor, scores: Tensor) -> Tensor:
        """[B, a] the items whose scores (of ``scores`` [B, m]) the server sends to ``users`` [B], none before it has
        learnt anything; -1 where a user has sent all items."""
        assert state.uploads is not None
        n_items, wanted = scores.shape[1], self.settings.exchange.n_received if state.steps else 0
        half = min(wanted // 2, n_items)
        starts, ends = (torch.searchsorted(state.uploads, (users + add) * n_items) for add in (0, 1))
        counts = ends - starts
        owner = torch.repeat_interleave(counts)
        places = torch.arange(owner.numel(), device=users.device) + (starts - (counts.cumsum(0) - counts))[owner]
        left = scores.index_put((owner, state.uploads[places] % n_items), scores.new_tensor(-torch.inf))
        # The items that anybody can get as frequent ones; of items with equal counts the first one comes first.
        most = int(counts.max()) if counts.numel() else 0
        common = state.counts.argsort(descending=True, stable=True)[: half + most]
        open_ = left[:, common] > -torch.inf
        place = open_.cumsum(1)
        taken = (open_ & (place <= half)).nonzero()
        frequent = torch.full((users.numel(), half), -1, dtype=torch.int64, device=users.device)
        frequent[taken[:, 0], place[taken[:, 0], taken[:, 1]] - 1] = common[taken[:, 1]]
        left[taken[:, 0], common[taken[:, 1]]] = -torch.inf
        value, hard = left.topk(min(wanted - wanted // 2, n_items), dim=1)
        return torch.cat([frequent, hard.where(value > -torch.inf, -1)], dim=1)

    def server(self, state: PTFState, phase: str, aggregate: Aggregate, key: Key) -> PTFState:
        if aggregate.keys.numel():
            state = self.learn(self.received(state, aggregate), aggregate)
        return self.with_cohort(replace(state, round=state.round + 1), key)

    def pairs(self, state: PTFState, aggregate: Aggregate) -> tuple[Tensor, Tensor, Tensor]:
        """[T] each: users, items and scores of what was received in a round."""
        users = state.cohort[torch.div(aggregate.keys, aggregate.n_items, rounding_mode="floor")]
        return users, aggregate.keys % aggregate.n_items, (from_fixed(aggregate.sums)[:, 0] + 0.5).clamp(0, 1)

    def received(self, state: PTFState, aggregate: Aggregate) -> PTFState:
        """The state in which the scores of a round replace the earlier ones of the same users."""
        assert state.uploads is not None
        users, items, scores = self.pairs(state, aggregate)
        kept = ~torch.isin(torch.div(state.uploads, aggregate.n_items, rounding_mode="floor"), users)
        uploads, order = torch.cat([state.uploads[kept], users * aggregate.n_items + items]).sort()
        scores = torch.cat([state.scores[kept], scores])[order]
        counts = state.counts + torch.bincount(items, minlength=aggregate.n_items)
        return replace(state, uploads=uploads, scores=scores, counts=counts)

    def graph(self, state: PTFState) -> Bipartite:
        """The graph of the scores above 1/2, which are its weights, normalised as in LightGCN."""
        assert state.uploads is not None
        n_items, high = state.items.shape[0], state.scores > 0.5
        users, items = torch.div(state.uploads[high], n_items, rounding_mode="floor"), state.uploads[high] % n_items
        weights, shape = state.scores[high], (state.n_users, n_items)
        of_users, of_items = (
            weights.new_zeros(size).index_add_(0, nodes, weights)[nodes]
            for size, nodes in zip(shape, (users, items), strict=True)
        )
        weights = weights * (of_users * of_items).rsqrt()
        return Bipartite(Adjacency.of(users, items, weights, shape), Adjacency.of(items, users, weights, shape[::-1]))

    def learn(self, state: PTFState, aggregate: Aggregate) -> PTFState:
        """Adam's steps of the hidden model on the scores of a round, by cross-entropy with soft labels."""
        users, items, scores = self.pairs(state, aggregate)
        options, graph, sizes = self.settings.server, self.graph(state), (state.n_users, aggregate.n_items)
        table, first, second = torch.cat([state.users, state.items]), state.first, state.second
        steps = torch.full_like(table[:, 0], state.steps, dtype=torch.int64)
        for _ in range(options.steps):
            leaf = table.clone().requires_grad_()
            final_users, final_items = lightgcn(graph, leaf[: sizes[0]], leaf[sizes[0] :], options.n_layers)
            logits = dot(final_users[users], final_items[items])
            (gradient,) = torch.autograd.grad(functional.binary_cross_entropy_with_logits(logits, scores), leaf)
            change, first, second, steps = adam(
                gradient, first, second, steps, options.learning_rate, (0.9, 0.999), 1e-8
            )
            table = table + change
        of_users, of_items = (each.clone() for each in table.split(sizes))
        final = torch.cat(lightgcn(graph, of_users, of_items, options.n_layers))
        state = replace(state, users=of_users, items=of_items, first=first, second=second, final=final)
        return replace(state, steps=state.steps + options.steps)

    def serving(self, state: PTFState) -> PTFState:
        empty = {name: getattr(state, name)[:0] for name in ("users", "first", "second", "scores", "counts", "cohort")}
        return replace(state, uploads=None, **empty)

    # --- the clients ---

    def table_rows(self, broadcast: PTFBroadcast, items: Tensor, segments: Tensor) -> Tensor:
        """[T, d] the first vectors of ``items`` [T] in the clients' own models, the same on all clients."""
        model = self.settings.model
        table = first_vectors(broadcast.items.shape[0], model.embedding_dim).to(items.device)
        return table.index_select(0, items) * model.init_scale

    def begins(self, client_state: ClientState, positions: Tensor, received: Tensor) -> Tensor:
        own = (positions >= 0).nonzero().squeeze(1)
        return torch.zeros_like(received).index_copy(0, own, client_state.rows[positions[own]])

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(private[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return (private @ items.T).sigmoid()

    def scores(self, broadcast: PTFBroadcast, rows: Rows, client_state: ClientState) -> Tensor:
        """[B, m] the scores that the server sent."""
        return broadcast.scores.clone()

    def user_vectors(self, broadcast: PTFBroadcast, rows: Rows, client_state: ClientState) -> Tensor | None:
        """[B, 1] ones: uploads are scores, so that an attacker needs no vector to see which are high."""
        return torch.ones_like(client_state.private[:, :1])

    def local_loss(self, batch: LocalBatch[PTFBroadcast], parameters: Parameters) -> Tensor:
        """The loss of the client's labels, plus cross-entropy with the scores that the server sent as soft labels."""
        loss, sent = super().local_loss(batch, parameters), batch.broadcast.sent
        assert sent is not None
        rows, n_items = batch.labels.rows, batch.broadcast.items.shape[0]
        owners = torch.arange(sent.shape[0], device=sent.device)[:, None].expand_as(sent)
        usable = (sent >= 0) & ~torch.isin(owners * n_items + sent, rows.segments * n_items + rows.items)
        owners, items, scores = owners[usable], sent[usable], batch.broadcast.scores[usable]
        logits = self.logits(parameters.private, self.table_rows(batch.broadcast, items, owners), owners, None)
        return loss + segment_sum(softplus(logits) - scores * logits, owners, rows.n_users)

    def loss_name(self) -> Loss | None:
        return None

    def hand_over(
        self,
        update: Update,
        broadcast: PTFBroadcast,
        rows: Rows,
        labels: Labels,
        client_state: ClientState,
        key: Key,
    ) -> tuple[Update, ClientState]:
        """Scores minus 1/2 in place of changes, so that a bound of 1/2 on each number changes none of them. A client
        that has already taken part in the maximum number of rounds sends nothing."""
        items, segments, changes = update.items, update.segments, update.deltas
        assert items is not None and segments is not None and changes is not None
        own = (labels.positions >= 0).nonzero().squeeze(1)
        offsets = changes.index_copy(0, own, client_state.rows[labels.positions[own]])
        vectors = self.table_rows(broadcast, items, segments) + offsets
        scores = self.logits(client_state.private, vectors, segments, None).sigmoid()
        positive = torch.arange(items.numel(), device=items.device) < labels.positions.numel()
        chosen = self.chosen(rows, segments, items, positive, key)
        cap = self.settings.selection.max_participations
        if cap is not None:
            chosen = chosen[(client_state.participations <= cap)[segments[chosen]]]
        segments, positive = segments[chosen], positive[chosen]
        scores = swapped(scores[chosen], segments, positive, self.settings.exchange.swapped, rows.n_users)
        return replace(update, segments=segments, items=items[chosen], deltas=scores[:, None] - 0.5), client_state

    def chosen(self, rows: Rows, segments: Tensor, items: Tensor, positive: Tensor, key: Key) -> Tensor:
        """The rows whose scores are sent: of each client a random share of the positive ones, at least one, and as many
        negative ones."""
        least, n = self.settings.exchange.least_share, rows.n_users
        share = least + (1 - least) * uniform(key.fold("share").spread(rows.users), 1).squeeze(1)
        wanted = (torch.bincount(segments[positive], minlength=n) * share).floor().clamp(min=1)
        draws = bits(fold_in(key.fold("sent").spread(rows.users)[segments], items), 1).squeeze(1)
        order, place = placed(draws, 2 * segments + positive, 2 * n)
        return order[place < wanted[segments[order]]].sort().values


@lru_cache(maxsize=1)
def first_vectors(n_items: int, dim: int) -> Tensor:
    """[m, d] standard normal numbers, the same everywhere. They are kept, because every local step needs some."""
    return normal(Key(0).fold("ptf_fedrec").spread(torch.arange(n_items)), dim)


def placed(values: Tensor, groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The order [T] of rows by group, and by ascending value within a group; and the place [T] of each row of this
    order in its group."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    return order, ranks(groups[order], n)


def swapped(scores: Tensor, segments: Tensor, positive: Tensor, share: float, n: int) -> Tensor:
    """``scores`` [T] in which, for each of ``n`` clients, the highest of the positive rows and the highest of the
    negative rows have changed places: the ``share`` of the positive rows, and at least one, where share is above 0."""
    have = [torch.bincount(segments[rows], minlength=n) for rows in (positive, ~positive)]
    most = torch.minimum(*have)
    count = torch.minimum((have[0] * share).floor().clamp(min=1), most) if share else torch.zeros_like(most)
    order, place = placed(-scores, 2 * segments + positive, 2 * n)
    top = order[place < count[segments[order]]]
    up, down = top[positive[top]], top[~positive[top]]
    return scores.index_copy(0, up, scores[down]).index_copy(0, down, scores[up])
