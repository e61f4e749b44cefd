"""Scores of one user in numpy, without torch: what a node needs to answer at once.

The functions say for one user what :mod:`perfedrec.nn.propagation`, :mod:`perfedrec.methods.federated.personal` and
:func:`perfedrec.runtimes.new_users.finetuned` say for a block of users, with the same keyed draws. Sums are taken in
another order, so that scores agree to some 1e-5 of their size. Tests hold each method against the other side.

Symbols are those of :mod:`perfedrec.nn.propagation`. Names of arrays are those of the fields of the broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.inference import InferenceOptions
from perfedrec.core.words import WordKey, draw_outside, symmetric

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MODELS = ("local", "cluster", "global", "pretrained", "neighbourhood")
UNTRAINED = ("pretrained", "neighbourhood")
"""As in :mod:`perfedrec.methods.federated.personal`."""

LEAST = np.float32(1e-12)
"""The least weight of a model before it counts as 0."""


class UnsupportedError(Exception):
    """This user cannot be scored here: torch has to do it."""


@dataclass(frozen=True)
class Client:
    """The state of one client: its vector ``private`` [d] with Adam's moments and number of steps, the offsets ``rows``
    [r, d] of its own item rows, and the logits ``mix`` [models] of its weights."""

    private: Floats
    first: Floats
    second: Floats
    steps: int
    rows: Floats
    mix: Floats

    @staticmethod
    def start(options: InferenceOptions, n_own: int, user: int, seed: int) -> Client:
        """The state that ``user`` starts with; its draws follow from ``seed``."""
        zero = np.zeros(options.embedding_dim, dtype=np.float32)
        private = zero
        if options.encoder != "spectral":
            key = WordKey(seed).fold("memory").fold("vectors").words(np.array([user]))[0]
            private = _normal(key, options.embedding_dim) * np.float32(options.init_scale)
        rows = np.zeros((n_own, options.embedding_dim), dtype=np.float32)
        return Client(private, zero, zero, 0, rows, _logits(np.array(options.weights, dtype=np.float32)))


@dataclass(frozen=True)
class Star:
    """Propagation on the star graph of one user: ``e_u = own p_u + sum_i edge_i q_i + user_shift`` and ``e_i = scale_i
    q_i + shift_i``; ``scale`` [m, 1] and ``shift`` [m, d] are for all items."""

    own: float
    edge: Floats
    user_shift: Floats | float = 0.0
    scale: Floats | float = 1.0
    shift: Floats | None = None

    def user(self, vector: Floats, rows: Floats) -> Floats:
        return (np.float32(self.own) * vector + self.edge @ rows + self.user_shift).astype(np.float32)

    def scales(self, items: Ints | slice) -> Floats | float:
        if not isinstance(self.scale, np.ndarray):
            return self.scale
        scales: Floats = self.scale[items]
        return scales

    def items(self, rows: Floats, items: Ints | slice) -> Floats:
        scaled = self.scales(items) * rows
        return scaled if self.shift is None else scaled + self.shift[items]


ALL, ONE = slice(None), np.float32(1)


@dataclass(frozen=True)
class Mixed:
    """One of the models that are mixed, for one user: its scores are ``weight`` times the products of ``items`` [m, d]
    and ``user`` [d], or ``fixed`` ones. The items of the user have the parts ``pulled`` [r, d] in the vector."""

    items: Floats
    user: Floats
    pulled: Floats
    weight: np.float32 = ONE
    fixed: tuple[Floats, ...] = ()

    def scores(self) -> Floats:
        """[m] the scores of all items."""
        found: Floats = self.fixed[0] if self.fixed else self.items @ (self.weight * self.user)
        return found


class Model:
    """A served model: its ``shared`` arrays and its ``scalars``, by the names of the broadcast's fields. What it
    computes for all items is computed once, and serves all users."""

    def __init__(
        self, options: InferenceOptions, shared: Mapping[str, NDArray[Any]], scalars: Mapping[str, Any]
    ) -> None:
        self.options, self.shared, self.scalars = options, shared, scalars
        self.items: Floats = shared["items"]
        self._found: dict[tuple[str, int], Floats] = {}

    @property
    def n_items(self) -> int:
        return int(self.items.shape[0])

    @cached_property
    def degrees(self) -> Floats:
        degrees: Floats = self.shared["degrees"].astype(np.float32)
        return degrees.clip(min=1)

    def finish(self, vectors: Floats) -> Floats:
        """Vectors [..., d] in the form whose inner products are scores."""
        if not self.options.cosine:
            return vectors
        units: Floats = vectors / _lengths(vectors)
        return units

    def star(self, own: Ints, encoder: str) -> Star:
        """The propagation of a user with the items ``own``."""
        if encoder == "none":
            return Star(1.0, np.zeros(own.size, dtype=np.float32))
        edge = self.weights(own, 0.5, 0.5)
        if encoder == "spectral":
            return Star(1.0, edge, scale=np.sqrt(self.degrees)[:, None])
        layers, sums = self.options.n_layers, self.shared.get("neighbours")
        if not layers:
            return Star(1.0, np.zeros_like(edge))
        if sums is None:
            return Star(0.5, edge * np.float32(0.5))
        share = 1.0 / (layers + 1)
        return Star(share, edge * np.float32(share), edge @ sums[0][own], share, sums[1])

    def weights(self, own: Ints, user_exponent: float, item_exponent: float) -> Floats:
        """[r] the weights of the items of a user, divided by powers of degrees; LightGCN's with 1/2 and 1/2."""
        of_user, of_items = np.float32(max(own.size, 1)) ** user_exponent, self.degrees[own] ** item_exponent
        return (1 / (of_user * of_items)).astype(np.float32)

    def table(self, items: Ints | slice, group: int | None) -> Floats:
        """The rows of ``items`` in the model of a cluster, or in the global one (``None``)."""
        rows, offsets = self.items[items], self.shared.get("offsets")
        if group is None or offsets is None:
            return rows
        mine: Floats = offsets.reshape(-1, *self.items.shape)[group]
        return rows + mine[items]

    def final_items(self, star: Star, group: int | None) -> Floats:
        """[m, d] the final vectors of all items, in the model of a cluster or in the global one. They do not depend on
        the user."""
        key = ("items", -1 if group is None or "offsets" not in self.shared else group)
        if key not in self._found:
            self._found[key] = self.finish(star.items(self.table(ALL, group), ALL))
        return self._found[key]

    def vectors(self) -> Floats:
        """[m, d] vectors of all items whose cosines say which items are alike: those of the global model, or before
        training, those of the first table that recommends."""
        nobody, found = np.zeros(0, dtype=np.int64), None
        if not self.scalars.get("trained", True):
            found = next((self.shared[name] for name in ("pretrained", "low_rank") if name in self.shared), None)
        return self.final_items(self.star(nobody, self.options.encoder), None) if found is None else found

    def scaled(self, name: str, table: Floats, star: Star) -> Floats:
        """[m, r] the rows of a ``table`` as the user's star scales them, alike for all users; ``name`` stands for
        both."""
        key = (name, 0)
        if key not in self._found:
            self._found[key] = star.items(table, ALL)
        return self._found[key]

    def deviation(self, name: str, vector: Floats, items: Floats) -> np.float32:
        """The standard deviation of the scores of ``items`` [m, d] by a ``vector`` [d]. ``name`` stands for the
        items."""
        key = (name, -1)
        if key not in self._found:
            centred = items - items.mean(0)
            self._found[key] = centred.T @ centred / np.float32(items.shape[0])
        variance = float(vector @ self._found[key] @ vector)
        return np.float32(max(variance, 0.0) ** 0.5)


class User:
    """One user of a served model: the items ``own`` [r], ascending, what the user ``received`` alone, by the names of
    the broadcast's fields with one row per user, and the ``client`` state."""

    def __init__(self, model: Model, own: Ints, received: Mapping[str, NDArray[Any]], client: Client) -> None:
        self.model, self.own, self.received, self.client = model, own, received, client
        self.star = model.star(own, model.options.encoder)

    def started(self) -> User:
        """The user as a new one, whose vector starts from the items' vectors where pre-training has a scale for it."""
        scale = self.model.scalars.get("user_init_scale")
        if scale is None or not self.model.options.mixed:
            return self
        weights = self.model.weights(self.own, *self.model.options.exponents)
        private = np.float32(scale) * (weights @ self.model.items[self.own])
        return User(self.model, self.own, self.received, replace(self.client, private=private))

    @property
    def private(self) -> Floats:
        """The vector from which a round starts. After spectral pre-training a new user, for whom the service has none,
        keeps its own; where the service has none for anybody, users make it from their items."""
        start = self.received.get("start")
        if self.client.steps > 0:
            return self.client.private
        if start is None:
            return (self.started() if self.model.options.starts_itself else self).client.private
        own = self.model.options.mixed and "user_init_scale" in self.model.scalars and not start[0].any()
        return self.client.private if own else start[0]

    @cached_property
    def group(self) -> int | None:
        """The cluster whose model recommends; ``None`` for a method without clusters."""
        return self._nearest() if self.model.options.chooses_cluster else self.trained_group

    @cached_property
    def trained_group(self) -> int | None:
        """The cluster whose model is trained here: the one that was received, or else the nearest one."""
        if not self.model.options.mixed:
            return None
        received = int(self.received["groups"][0])
        return self._nearest() if received < 0 else received

    def _nearest(self) -> int:
        """The cluster with the nearest centroid; the first one where there are no clusters."""
        centroids = self.model.shared.get("centroids")
        if centroids is None:
            return 0
        vector = self._layers()
        nearness = centroids @ (vector / _lengths(vector)) - 0.5 * np.square(centroids).sum(1)
        return int(nearness.argmax())

    def _layers(self) -> Floats:
        """[d] the mean of the user's layers 0 and 1 if neighbour sums are made of them, else the final vector."""
        rows, options = self.model.items[self.own], self.model.options
        if not options.neighbours:
            return self.star.user(self.private, rows)
        if options.n_layers < 2:
            return self.private
        below: Floats = self.model.star(self.own, "spectral").edge @ rows
        return (self.private + below) * np.float32(0.5)

    # --- scores ---

    def scores(self) -> tuple[Floats, dict[str, Floats]]:
        """[m] scores of all items, and the parts [m] that they are the sum of.

        Where the models that have a weight know nothing of the user, so that all scores are equal, all models are mixed
        in equal shares.
        """
        parts = {name: each.scores() for name, each in self.models.items()}
        return np.sum(list(parts.values()), axis=0, dtype=np.float32), parts

    def contributions(self, items: Ints) -> Floats:
        """[n, r] what each of the user's own items adds to the scores of ``items`` [n].

        A user's vector has a part from each of the user's items, and so have the scores. What comes from the vector
        that the user has trained, or from a list of the neighbourhood service, belongs to no item. All is 0 for a
        method whose user vectors do not depend on items, such as FedMF.
        """
        total = np.zeros((items.size, self.own.size), dtype=np.float32)
        for each in self.models.values():
            total += 0 if each.fixed else each.items[items] @ (each.weight * each.pulled).T
        return total

    @cached_property
    def models(self) -> dict[str, Mixed]:
        """The models that recommend, by name."""
        if not self.model.options.mixed:
            return {"global": self._by_vectors(self.model.items[self.own], None)}
        found = self._mixture()
        known = any((each.fixed[0] if each.fixed else each.weight * each.user).any() for each in found.values())
        return found if known else self._mixture(equal=True)

    def _by_vectors(self, rows: Floats, group: int | None) -> Mixed:
        """A model that scores by the user's vector, made with the ``rows`` [r, d] of the user's items."""
        user, pulled = self.star.user(self.private, rows), self.star.edge[:, None] * rows
        length = _lengths(user) if self.model.options.cosine else np.float32(1)
        return Mixed(self.model.final_items(self.star, group), self.model.finish(user), pulled / length)

    def _mixture(self, equal: bool = False) -> dict[str, Mixed]:
        model, own, group = self.model, self.own, self.group
        cluster = model.table(own, group)
        found = {
            "local": self._by_vectors(cluster + self.client.rows, group),
            "cluster": self._by_vectors(cluster, group),
            "global": self._by_vectors(model.items[own], None),
        }
        scales = dict.fromkeys(found, np.float32(1))
        target = model.deviation("global", found["global"].user, found["global"].items)
        for name, table, other in self._tables():
            items = model.scaled(f"{name} {self._beta}", table, other)
            found[name] = Mixed(items, other.edge @ table[own], other.edge[:, None] * table[own])
            spread = model.deviation(f"{name} {self._beta}", found[name].user, items)
            scales[name] = target / max(spread, np.float32(1e-12))
        weights = self._weights(scales, equal)
        if (listed := self._listed(weights.get("neighbourhood"), target, scales)) is not None:
            found["neighbourhood"] = replace(found["neighbourhood"], fixed=(listed,))
        return {name: replace(each, weight=weights[name]) for name, each in found.items()}

    @property
    def _beta(self) -> float:
        return float(self.model.scalars.get("beta", self.model.options.beta))

    def _tables(self) -> list[tuple[str, Floats, Star]]:
        """The models that score by the rows of a table alone, each with its propagation."""
        model, found = self.model, []
        if (pretrained := model.shared.get("pretrained")) is not None:
            found.append(("pretrained", pretrained, model.star(self.own, "spectral")))
        if (factor := model.shared.get("low_rank")) is not None:
            start, end = np.float32(0.5 - model.options.alpha), np.float32(0.5 - self._beta)
            star = Star(1.0, model.degrees[self.own] ** start, scale=model.degrees[:, None] ** end)
            found.append(("neighbourhood", factor, star))
        return found

    def _weights(self, scales: Mapping[str, np.float32], equal: bool) -> dict[str, np.float32]:
        """The weight of each model, or ``equal`` ones, times the scale of its scores."""
        names, mix = list(scales), self.model.shared.get("mix")
        logits = (self.client.mix if mix is None else _logits(mix))[[MODELS.index(name) for name in names]]
        if equal:
            logits = np.zeros_like(logits)
        if not self.model.scalars["trained"] and (ready := [name for name in names if name in UNTRAINED]):
            logits = np.where([name in ready for name in names], logits, -np.inf)
            first = scales[ready[0]]  # 0 where the global model scores all items alike, as for a user without items
            scales = {name: scale / first if first > 0 else np.float32(1) for name, scale in scales.items()}
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        shares[shares <= 2 * LEAST] = 0  # no weight at all
        return {name: np.float32(share * scales[name]) for name, share in zip(names, shares, strict=True)}

    def _listed(self, weight: np.float32 | None, target: np.float32, scales: Mapping[str, np.float32]) -> Floats | None:
        """[m] the scores by the user's list of the neighbourhood service; ``None`` without a list."""
        near, nearness = self.received.get("near"), self.received.get("nearness")
        if weight is None or near is None or nearness is None or not (near[0] >= 0).any():
            return None
        model, items = self.model, np.maximum(near[0], 0).astype(np.int64)
        nearness = nearness[0] * model.degrees[items] ** np.float32(model.options.beta - self._beta)
        mean, square = nearness.sum() / model.n_items, np.square(nearness).sum() / model.n_items
        factor = weight * target / scales["neighbourhood"] / np.sqrt(max(square - mean * mean, 1e-24))
        scores = np.zeros(model.n_items, dtype=np.float32)
        np.add.at(scores, items, (nearness * factor).astype(np.float32))
        return scores

    # --- local training ---

    def finetuned(self, user: int, seed: int) -> User:
        """The user after the rounds of local training that serve a new user or a new interaction best: see
        :func:`perfedrec.runtimes.new_users.finetuned`. ``user`` is the number by which its draws follow from
        ``seed``."""
        key, trained = WordKey(seed).fold("alone"), self
        for number in range(self.model.options.finetune_rounds):
            words = key.fold(number).fold("labels").fold("outside").words(np.array([user]))
            trained = trained._round(words[0])
        return trained

    def _round(self, word: np.uint64) -> User:
        """The user after the local steps of one round, with negatives drawn by ``word``."""
        model, options, own, star = self.model, self.model.options, self.own, self.star
        count = own.size if options.n_negatives is None else options.n_negatives
        negatives = draw_outside(own, model.n_items, count, word)
        if options.n_negatives is None and negatives.size < own.size:
            raise UnsupportedError  # a user who has more than half of all items
        private, first, second, steps = self.private, self.client.first, self.client.second, self.client.steps
        up = up0 = model.table(own, self.trained_group)
        down = model.table(negatives, self.trained_group)
        for _ in range(options.local_steps):
            gradient, up_gradient, down_gradient = _gradients(model, star, private, up, down, own, negatives)
            private, first, second, steps = _adam(options.user_learning_rate, private, gradient, first, second, steps)
            up = up - np.float32(options.learning_rate) * up_gradient
            down = down - np.float32(options.learning_rate) * down_gradient
        client = Client(private, first, second, steps, up - up0, self.client.mix)
        return User(model, own, self.received, client)


def by_table(user: User) -> dict[int, tuple[Floats, Floats]]:
    """The tables [m, d] by which a user's items are scored, each with the vector [d] whose products with its rows are
    its part in the scores; by the identity of the table. The vector is 0 where a list of the neighbourhood service
    takes the place of the table."""
    found: dict[int, tuple[Floats, Floats]] = {}
    for each in user.models.values():
        vector = np.zeros_like(each.user) if each.fixed else each.weight * each.user
        place = id(each.items)
        found[place] = each.items, found[place][1] + vector if place in found else vector
    return found


def scores_of(users: Sequence[User]) -> Floats:
    """[B, m] the scores of several users of one model: those of :meth:`User.scores`, with one product for each
    table."""
    scores = np.zeros((len(users), users[0].model.n_items), dtype=np.float32)
    tables: dict[int, tuple[Floats, list[int], list[Floats]]] = {}
    for row, user in enumerate(users):
        for each in user.models.values():
            scores[row] += each.fixed[0] if each.fixed else 0
        for place, (items, vector) in by_table(user).items():
            _, rows, vectors = tables.setdefault(place, (items, [], []))
            rows.append(row)
            vectors.append(vector)
    for items, rows, vectors in tables.values():
        scores[rows] += np.stack(vectors) @ items.T
    return scores


def _gradients(
    model: Model, star: Star, private: Floats, up0: Floats, down0: Floats, own: Ints, negatives: Ints
) -> tuple[Floats, Floats, Floats]:
    """The gradients of a client's ranking loss (:func:`perfedrec.methods.federated.network.ranking_loss`) by its vector
    [d], by the rows of its items [r, d], and by those of its negatives [N, d]."""
    options = model.options
    user = star.user(private, up0)
    context = np.broadcast_to(user, up0.shape)
    if options.leave_one_out:
        context = context - star.edge[:, None] * up0
    up, down = star.items(up0, own), star.items(down0, negatives)
    ups, downs, contexts, users = (model.finish(each) for each in (up, down, context, user))
    positive = (contexts * ups).sum(1)
    if options.n_negatives is None:
        slope = _sigmoid((contexts * downs).sum(1) - positive)[:, None]
        by_context, by_up, by_down = slope * (downs - ups), -slope * contexts, slope * contexts
        by_user = np.zeros_like(user)
    else:
        logits = downs @ users / np.float32(options.temperature)
        largest = logits.max(initial=-np.inf)
        shares = np.exp(logits - largest)
        shared = largest + np.log(shares.sum()) if logits.size else -np.inf
        slope = _sigmoid(shared - positive / np.float32(options.temperature)) / np.float32(options.temperature)
        pull = slope.sum() * shares / max(shares.sum(), np.float32(1e-30))
        by_context, by_up = -slope[:, None] * ups, -slope[:, None] * contexts
        by_down, by_user = pull[:, None] * users, pull @ downs
    if options.cosine:
        by_context, by_up = _unfinished(context, contexts, by_context), _unfinished(up, ups, by_up)
        by_down, by_user = _unfinished(down, downs, by_down), _unfinished(user, users, by_user)
    total = by_context.sum(0) + by_user
    by_up = star.scales(own) * by_up + star.edge[:, None] * total
    if options.leave_one_out:
        by_up = by_up - star.edge[:, None] * by_context
    by_down = star.scales(negatives) * by_down
    by_private = np.float32(star.own) * total
    if options.l2:
        weight = np.float32(options.l2)
        by_private, by_up, by_down = by_private + weight * private, by_up + weight * up0, by_down + weight * down0
    return by_private, by_up, by_down


def _adam(
    rate: float, private: Floats, gradient: Floats, first: Floats, second: Floats, steps: int
) -> tuple[Floats, Floats, Floats, int]:
    """One Adam step, as :func:`perfedrec.nn.optim.adam` takes it for clients."""
    low, high, steps = np.float32(0.9), np.float32(0.999), steps + 1
    first = gradient + low * (first - gradient)
    second = np.square(gradient) + high * (second - np.square(gradient))
    root = np.sqrt(second / np.float32(1 - 0.999**steps)) + np.float32(1e-8)
    return private - np.float32(rate) * (first / np.float32(1 - 0.9**steps) / root), first, second, steps


def _normal(key: np.uint64, n: int) -> Floats:
    """``n`` standard normal numbers for a key: those of :func:`perfedrec.core.keys.normal`."""
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf((1 + each) / 2) for each in symmetric(key, n).tolist()], dtype=np.float32)


def _logits(weights: NDArray[Any]) -> Floats:
    logits: Floats = np.log(np.maximum(weights, LEAST))
    return logits


def _lengths(vectors: Floats) -> Floats:
    lengths: Floats = np.maximum(np.sqrt(np.square(vectors).sum(-1, keepdims=True)), np.float32(1e-12))
    return lengths


def _unfinished(vectors: Floats, units: Floats, gradient: Floats) -> Floats:
    """The gradient by vectors from that by their ``units``, the vectors of length 1."""
    inner: Floats = (gradient * units).sum(-1, keepdims=True)
    along: Floats = inner * units
    result: Floats = (gradient - along) / _lengths(vectors)
    return result


def _sigmoid(x: Floats) -> Floats:
    values: Floats = np.reciprocal(np.exp(np.minimum(-x, np.float32(88))) + np.float32(1))  # larger ones overflow
    return values
