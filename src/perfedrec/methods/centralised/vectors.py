"""Methods that learn a vector for each user and item. The training loop is here; a method adds encoder and loss.
:mod:`perfedrec.methods.centralised.networked` has the loop of methods that learn the weights of a network as well."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key, normal, uniform
from perfedrec.core.sampling import choose, draw_outside, member, paired
from perfedrec.core.scoring import Scoring
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows, block_rows
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.nn.losses import info_nce, softplus
from perfedrec.nn.segments import dot

PAIRS_AT_ONCE = 1 << 23


class VectorSettings(Settings):
    """Options of every method that learns vectors."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of user and item vectors")
    learning_rate: float = Field(0.001, gt=0, description="step of the optimiser")
    learning_rate_decay: float | None = Field(
        None, gt=0, le=1, description="factor of the step from one epoch to the next (off: the step stays as it is)"
    )
    batch_size: int = Field(2048, ge=2, description="interactions per step")
    l2: float = Field(1e-4, ge=0, description="weight of the L2 term on the layer-0 vectors of a batch")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the initial vectors")

    def step_of_epoch(self, taken: int, per_epoch: int) -> float:
        """The optimiser's step in an epoch that begins after ``taken`` steps, where each epoch has ``per_epoch``."""
        epochs = taken // max(per_epoch, 1)
        return self.learning_rate * (1.0 if self.learning_rate_decay is None else self.learning_rate_decay**epochs)


@dataclass(frozen=True)
class Vectors:
    """``users`` [n, d] and ``items`` [m, d], with Adam's moments ``first`` and ``second`` of both, [n + m, d], and its
    number of ``steps``."""

    users: Tensor
    items: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    steps: int = 0


@dataclass(frozen=True)
class Batch:
    """A batch of b interactions: ``users``, ``positives`` and ``negatives`` [b]; ``key`` for all other random
    numbers."""

    users: Tensor
    positives: Tensor
    negatives: Tensor
    key: Key


class ProductMethod(Method):
    """What all methods share whose scores are inner products of vectors of users and items."""

    Options: ClassVar[type[Settings]] = VectorSettings
    settings: VectorSettings
    trained = True

    def begin(self, users: Tensor, items: Tensor, data: Training, key: Key) -> None:
        """Called before each epoch, with the learned vectors [n, d] and [m, d]."""

    def init(self, data: Training, key: Key) -> Vectors:
        settings, device = self.settings, data.rows.items.device
        users, items = (
            normal(key.fold(side).spread(torch.arange(n, device=device)), settings.embedding_dim) * settings.init_scale
            for side, n in (("users", data.n_users), ("items", data.n_items))
        )
        zeros = torch.zeros(data.n_users + data.n_items, settings.embedding_dim, device=device)
        return Vectors(users, items, zeros, zeros.clone())

    def scores(self, state: Vectors, data: Training, users: Tensor) -> Tensor:
        return state.users[users] @ state.items.T

    def scoring(self, state: Vectors, data: Training, users: Tensor) -> Scoring:
        return Scoring.product(state.users[users], state.items)

    def embedding(self, state: Vectors, data: Training, users: Tensor) -> Embedding:
        return Embedding(state.users[users], state.items)

    def scores_of_new_users(self, state: Vectors, data: Training, rows: Rows) -> Tensor:
        """Scores by vectors that are fitted to the item vectors, which stay as they are: see :func:`folded_in`."""
        limits = rows.offsets.tolist()
        own = [rows.items[first:last] for first, last in pairwise(limits)]
        return torch.stack([folded_in(state.items, items) for items in own]) @ state.items.T

    def decay(self, users: Tensor, items: Tensor, batch: Batch) -> Tensor:
        """L2 term on the learned vectors of a batch, as a mean over its interactions."""
        taken = users.index_select(0, batch.users), items.index_select(0, torch.cat([batch.positives, batch.negatives]))
        squares = torch.stack([each.square().sum() for each in taken]).sum()
        return 0.5 * self.settings.l2 * squares / batch.users.numel()


class VectorMethod(ProductMethod):
    """Trains :meth:`loss` with Adam over batches of interactions, each with one negative. Scores are inner products of
    the vectors of :meth:`encode`."""

    def encode(self, users: Tensor, items: Tensor, data: Training) -> tuple[Tensor, Tensor]:
        """Final vectors [n, d] and [m, d], from the learned ones."""
        return users, items

    @abstractmethod
    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        """The loss of a batch, a scalar, from the learned vectors [n, d] and [m, d]."""

    def epoch(self, state: Vectors, data: Training, key: Key) -> tuple[Vectors, float]:
        self.begin(state.users, state.items, data, key.fold("epoch"))
        parts = [(batch.users.numel(), batch) for batch in batches(data, self.settings.batch_size, key)]
        done = descend(
            [state.users, state.items],
            state,
            self.settings.step_of_epoch(state.steps, len(parts)),
            parts,
            lambda learned, batch: self.loss(learned[0], learned[1], batch, data),
        )
        users, items = done.parameters
        return Vectors(users, items, done.first, done.second, done.steps), done.loss

    def serving(self, state: Vectors, data: Training) -> Vectors:
        return Vectors(*self.encode(state.users, state.items, data))


FOLD_IN_L2 = 0.01
"""Weight of the L2 term of :func:`folded_in`."""


def folded_in(items: Tensor, own: Tensor) -> Tensor:
    """[d] the vector ``p`` of a new user with the items ``own`` [r], for the item vectors ``items`` [m, d].

    It minimises BPR over all pairs of an own item i and another item j, ``mean softplus(p . q_j - p . q_i) + w |p|^2 /
    2``. The problem is convex, so that the result depends on nothing else.
    """
    other = torch.ones(items.shape[0], dtype=torch.bool, device=items.device)
    other[own] = False
    if not bool(other.any()):
        return items.new_zeros(items.shape[1])
    up, down, vector = items[own], items[other], items.new_zeros(items.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([vector], max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe")
    at_once = max(1, PAIRS_AT_ONCE // down.shape[0])

    def objective() -> Tensor:
        solver.zero_grad()
        total = 0.5 * FOLD_IN_L2 * vector.square().sum()
        torch.autograd.backward(total)
        for block in up.split(at_once):
            pairs = softplus((down @ vector)[None, :] - (block @ vector)[:, None])
            part = pairs.sum() / (up.shape[0] * down.shape[0])
            torch.autograd.backward(part)
            total = total + part
        return total.detach()

    solver.step(objective)
    return vector.detach()


def triples(data: Training, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All interactions: ``users`` [P], ``positives`` [P], and ``negatives`` [P] drawn outside the users' training
    items; and a random order of them, [P].

    A user who has more than half of all items gets some negatives more than once. A user who has all items is left out.
    """
    drawn, owners = draw_outside(
        data.rows, data.n_items, data.rows.counts, key.fold("negatives").spread(data.rows.users)
    )
    pairs, negatives = paired(data.rows, owners)
    order = choose(pairs.numel(), pairs.numel(), key.fold("order")).to(owners.device)
    return data.rows.segments[pairs], data.rows.items[pairs], drawn[negatives], order


def batches(data: Training, size: int, key: Key) -> list[Batch]:
    """The :func:`triples` in their order, ``size`` in a batch."""
    users, positives, negatives, order = triples(data, key)
    return [
        Batch(users[part], positives[part], negatives[part], key.fold("batch", number))
        for number, part in enumerate(order.split(size))
    ]


def shared_negatives(batch: Batch, data: Training, n: int) -> tuple[Tensor, Tensor]:
    """At most ``n`` distinct random items [N] for all users of a ``batch``, and which of them each of its b users does
    not have, bool [b, N]."""
    items = choose(data.n_items, n, batch.key.fold("shared negatives")).to(batch.users.device)
    places = torch.full((data.n_items,), -1, device=items.device)
    places[items] = torch.arange(items.numel(), device=items.device)
    rows, _ = block_rows(data.rows.offsets, data.rows.items, batch.users)
    place = places[rows.items]
    outside = torch.ones(batch.users.numel(), items.numel(), dtype=torch.bool, device=items.device)
    outside[rows.segments[place >= 0], place[place >= 0]] = False
    return items, outside


def taken_at_once(table: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    """The rows of a ``table`` [n, d] at several ``places`` [k], a tensor [k, d] for each. They are taken once, because
    each time costs a table of gradients."""
    taken: tuple[Tensor, ...] = table.index_select(0, torch.cat(places)).split([each.numel() for each in places])
    return taken


def candidates(batch: Batch, data: Training, n: int) -> Tensor:
    """[b, n] random items for each interaction of a ``batch`` that its user does not have, uniform and independent of
    each other, the first one that of the batch. In place of an item that the user has stands that one again."""
    drawn = uniform(
        batch.key.fold("candidates").spread(torch.arange(batch.users.numel(), device=batch.users.device)), n
    )
    items = (drawn.to(torch.float64) * data.n_items).to(torch.int64).clamp_(max=data.n_items - 1)
    items[:, 0] = batch.negatives
    owned = member(batch.users[:, None] * data.n_items + items, data.rows.segments * data.n_items + data.rows.items)
    return torch.where(owned, batch.negatives[:, None], items)


def bpr(users: Tensor, items: Tensor, batch: Batch) -> Tensor:
    """The mean BPR loss of a batch (Rendle et al., UAI 2009), from final vectors."""
    negatives, positives = taken_at_once(items, batch.negatives, batch.positives)
    return softplus(dot(users.index_select(0, batch.users), negatives - positives)).mean()


def contrast(views: list[tuple[Tensor, Tensor]], batch: Batch, temperature: float) -> Tensor:
    """InfoNCE between two views, each [n, d] and [m, d], for the distinct users plus for the distinct positive items of
    a batch."""
    chosen = batch.users.unique(), batch.positives.unique()
    first, second = (info_nce(views[0][k][nodes], views[1][k][nodes], temperature) for k, nodes in enumerate(chosen))
    return first + second
