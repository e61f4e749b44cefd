"""The personal model: a weighted mean of the scores of several models, with each user's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfedrec.core.keys import Key
from perfedrec.core.sampling import draw_outside, paired
from perfedrec.core.scoring import ALL, ITEMS_AT_ONCE, Lists, Product, Scoring
from perfedrec.core.types import Rows
from perfedrec.methods.federated.network import Finish, Network
from perfedrec.methods.federated.settings import NeighbourhoodSettings
from perfedrec.methods.federated.state import PerFedRecBroadcast
from perfedrec.nn import losses
from perfedrec.nn.propagation import Star, diffusion_star, spectral_star
from perfedrec.nn.segments import dot, expand

UNTRAINED = ("pretrained", "neighbourhood")
"""The models that recommend before the first round of training."""

MODELS = ("local", "cluster", "global", *UNTRAINED)
"""The models of the mix, in the order of the weights."""

AT_ONCE = 256
"""Users whose item rows are looked up together."""


@dataclass(frozen=True)
class Part:
    """One of the models that are mixed, for a block of users. What is large is computed when it is asked for.

    ``edge`` [R] and the function ``rows(here)``, layer 0, of the users' own items, or of a slice of them; ``finish``
    brings vectors to the form that is scored; ``items(which, groups)`` [T, d] the final vectors of the items ``which``
    [T] for members of the clusters ``groups`` [T]. ``_users`` and ``_scale`` are functions of :attr:`users` and
    :attr:`scale`.
    """

    edge: Tensor
    rows: Callable[[slice], Tensor]
    _users: Callable[[], Tensor]
    finish: Callable[[Tensor], Tensor]
    items: Callable[[Tensor, Tensor], Tensor]
    _scale: Callable[[Tensor], Tensor]

    @cached_property
    def users(self) -> Tensor:
        """[B, d] the users' vectors before ``finish``."""
        return self._users()

    @cached_property
    def scale(self) -> Tensor:
        """[B, 1] the factor of the scores."""
        return self._scale(self.users)


@dataclass(frozen=True)
class Reference:
    """The global model, as a :class:`Part`, to whose scores those of other models are scaled. ``every`` [m] are all
    items."""

    part: Part
    every: Tensor

    @cached_property
    def deviation(self) -> Tensor:
        """[B] the standard deviation of each user's scores."""
        part = self.part

        def items(here: slice) -> Tensor:
            return part.items(self.every[here], torch.zeros_like(self.every[here]))

        return deviation(part.finish(part.users), covariance(items, self.every.numel()))


class Mixture:
    """The models of a block of B users and their weights.

    ``vectors`` [B, d] the users' own vectors; ``fine_tuned`` [R, d] the offsets of their own item rows; ``mix`` [B, 4
    or 5] the logits of the weights of :data:`MODELS`; ``diffusion`` the exponents of the neighbourhood model. The local
    model uses the user's own rows for the user vector, and scores the items of the user's cluster. The neighbourhood
    model is one of low rank; users who have received a list are scored by the list instead.
    """

    def __init__(
        self,
        network: Network,
        finish: Finish,
        broadcast: PerFedRecBroadcast,
        rows: Rows,
        vectors: Tensor,
        fine_tuned: Tensor,
        mix: Tensor,
        diffusion: NeighbourhoodSettings,
    ) -> None:
        self.diffusion, self.beta = diffusion, diffusion.beta if broadcast.beta is None else broadcast.beta
        self.broadcast, self.rows = broadcast, rows
        self.every = torch.arange(broadcast.items.shape[0], device=broadcast.items.device)
        star, one = network.star(broadcast, rows), vectors.new_ones(rows.n_users, 1)
        dense = None if broadcast.dense is None else broadcast.dense[None]
        first = network.users0(rows, vectors, dense)

        def part(own: Callable[[slice], Tensor], table: Callable[[Tensor, Tensor], Tensor]) -> Part:
            def items(which: Tensor, groups: Tensor) -> Tensor:
                layer0 = network.items0(broadcast.item_attributes, table(which, groups), which, dense)
                return finish(star.items(layer0, which))

            def crossed(here: slice) -> Tensor:
                return network.items0(broadcast.item_attributes, own(here), rows.items[here], dense)

            def users() -> Tensor:
                return in_blocks(star, first, rows, crossed)

            return Part(star.edge, crossed, users, finish, items, lambda users: one)

        def global_rows(which: Tensor, groups: Tensor) -> Tensor:
            return broadcast.items.index_select(0, which)

        def cluster(here: slice) -> Tensor:
            return broadcast.tables.rows(rows.items[here], broadcast.groups[rows.segments[here]])

        self.parts = {
            "local": part(lambda here: cluster(here).add_(fine_tuned[here]), broadcast.tables.rows),
            "cluster": part(cluster, broadcast.tables.rows),
            "global": part(lambda here: global_rows(rows.items[here], rows.segments), global_rows),
        }
        self.reference = Reference(self.parts["global"], self.every)
        if broadcast.pretrained is not None:
            spectral = spectral_star(rows, broadcast.degrees)
            self.parts["pretrained"] = scaled(broadcast.pretrained, spectral, rows, self.reference)
        if broadcast.low_rank is not None:
            self.parts["neighbourhood"] = self._near(broadcast.low_rank)
        self.mix, self._places = mix, [MODELS.index(name) for name in self.parts]

    def _near(self, factor: Tensor) -> Part:
        """The neighbourhood model of low rank, from its ``factor`` [m, r]."""
        star = diffusion_star(self.rows, self.broadcast.degrees, self.diffusion.alpha, self.beta)
        return scaled(factor, star, self.rows, self.reference, exponent=self.beta)

    def with_beta(self, beta: float) -> Mixture:
        """The same models, with another exponent in the neighbourhood model."""
        if beta == self.beta or self.broadcast.low_rank is None:
            return self
        other = copy(self)
        other.beta, other.parts, near = beta, dict(self.parts), self.broadcast.near
        if near is None or not bool((near >= 0).any(1).all()):  # with a list the model of low rank has no weight
            other.parts["neighbourhood"] = other._near(self.broadcast.low_rank)
        return other

    def _shares(self, mix: Tensor | None = None) -> dict[str, Tensor]:
        """[B, 1] the share of each model, by the logits ``mix`` [B, models], or by the users' own. Before the first
        round of training it is 0 for those that are untrained. Shares of models with weight 0 are 0."""
        names, logits = list(self.parts), (self.mix if mix is None else mix)[:, self._places]
        if ready := self._ready:
            away = [place for place, name in enumerate(names) if name not in ready]
            logits = logits.index_fill(1, torch.tensor(away, device=logits.device), -torch.inf)
        shares = logits.softmax(1)
        shares = shares.masked_fill(shares <= 2 * LEAST, 0.0)
        return dict(zip(names, shares.split(1, dim=1), strict=True))

    @property
    def _ready(self) -> list[str]:
        """The models that recommend alone before the first round of training; none after it."""
        return [] if self.broadcast.trained else [name for name in self.parts if name in UNTRAINED]

    @property
    def _scales(self) -> dict[str, Tensor]:
        """[B, 1] the scale of each model's scores: that of the global model's or, before the first round of training,
        that of the first one that is ready; 1 where that is not known."""
        scales = {name: part.scale for name, part in self.parts.items()}
        if not self._ready:
            return scales
        first = scales[self._ready[0]]  # 0 where the global model scores all items alike, as for a user without items
        return {name: (scale / first).masked_fill(first == 0, 1.0) for name, scale in scales.items()}

    def _weights(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B, 1] the weight of each model: its share, times the scale of its scores."""
        scales = self._scales
        return {name: share * scales[name] for name, share in shares.items()}

    def _listed(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The users' lists: items [B, L], -1 for unused places; their part [B, L] of the scores; and which users [B, 1]
        have a list. ``None`` without lists.

        Items that are not listed have score 0. The scores have the standard deviation of those by the model of low
        rank, whose ``weight`` [B, 1] is given.
        """
        near, nearness, part = self.broadcast.near, self.broadcast.nearness, self.parts["neighbourhood"]
        if near is None or nearness is None:
            return None
        n_items, items = self.every.numel(), near.clamp(min=0).to(torch.int64)
        degrees = self.broadcast.degrees.clamp(min=1).to(nearness.dtype)
        nearness = nearness * degrees[items] ** (self.diffusion.beta - self.beta)  # the service has divided by its own
        mean, square = (each.sum(1, keepdim=True) / n_items for each in (nearness, nearness.square()))
        deviation = (square - mean.square()).clamp(min=1e-24).sqrt()
        own = nearness * (weight * self.reference.deviation[:, None] / part.scale / deviation)
        return near.to(torch.int64), own, (near >= 0).any(1, keepdim=True)

    def _table(self, name: str) -> str:
        """Which model has the item vectors that a model scores: local models score those of the cluster, which are
        those of the global model where there are no clusters."""
        if name not in ("local", "cluster"):
            return name
        return "global" if self.broadcast.offsets is None else "cluster"

    def _items(self, name: str, group: int, which: slice = ALL) -> Tensor:
        """[t, d] the final vectors of all items in a model, or of a slice of them, for the members of a cluster."""
        items = self.every[which]
        return self.parts[name].items(items, torch.full_like(items, group))

    def _product(self, weights: Mapping[str, Tensor]) -> Product:
        """Several models as one product: the users' vectors times their ``weights`` [B, 1]. Models that score the same
        item vectors are added up first."""
        users: dict[str, Tensor] = {}
        for name, weight in weights.items():
            own, table = weight * self.parts[name].finish(self.parts[name].users), self._table(name)
            users[table] = users[table] + own if table in users else own

        def table_of(group: int, which: slice) -> Tensor:
            return torch.cat([self._items(name, group, which) for name in users], dim=1)

        return Product(torch.cat(list(users.values()), dim=1), table_of)

    def scoring(self, settings: Sequence[Setting] = (), turn: str = "") -> Scoring:
        """The scores of all items by each of the ``settings``, or by the users' own weights.

        Several settings differ in the weight of the model ``turn``, the others staying in proportion to each other, or
        in the exponent of the neighbourhood model. So all others are one product, whatever the number of settings.
        """
        mixtures = [self.with_beta(each.beta) for each in settings] or [self]
        mixes = [logits_of(each.weights).expand_as(self.mix) for each in settings] or [self.mix]
        shares = [mixture._shares(mix) for mixture, mix in zip(mixtures, mixes, strict=True)]
        weights = [mixture._weights(each) for mixture, each in zip(mixtures, shares, strict=True)]
        lists, near = _lists(mixtures, weights)
        used = [name for name in self.parts if any(bool(each[name].any()) for each in shares)]
        far = [name for name in used if name != "neighbourhood"]
        products: list[tuple[Product, list[Tensor]]] = []  # each with its weights by all settings
        if len(settings) < 2:
            together = {name: weights[0][name] for name in far}
            if near is not None and bool(near[0].any()):
                together["neighbourhood"] = near[0]
            if together:
                products.append((mixtures[0]._product(together), [torch.ones_like(self.mix[:, :1])]))
        else:
            if others := [name for name in far if name != turn]:  # as shares of what they are where they weigh most
                most = max(shares, key=lambda each: float(sum(each[name].sum() for name in others)))
                lead = max(others, key=lambda name: float(most[name].sum()))
                product = self._product(self._weights({name: most[name] for name in others}))
                products.append((product, [each[lead] / most[lead] for each in shares]))
            one = torch.ones_like(self.mix[:, :1])
            if turn in far:
                products.append((self._product({turn: one}), [each[turn] for each in weights]))
            if near is not None and any(bool(each.any()) for each in near):  # users without lists
                for mixture in {each.beta: each for each in mixtures}.values():
                    own = [w * (mixture.beta == each.beta) for w, each in zip(near, mixtures, strict=True)]
                    products.append((mixture._product({"neighbourhood": one}), own))
        if not products:  # lists alone
            none, nothing = self.mix.new_zeros(self.rows.n_users, 1), self.mix.new_zeros(self.every.numel(), 1)
            products.append((Product(none, lambda group, which: nothing[which]), [none] * len(mixtures)))
        columns = [torch.cat(own, dim=1) for _, own in products]
        return Scoring(
            self.rows.n_users,
            self.every.numel(),
            tuple(product for product, _ in products),
            None if len(mixtures) == 1 else torch.stack(columns, dim=2),
            lists,
            None if self.broadcast.offsets is None else self.broadcast.groups,
        )

    def explain(self) -> dict[str, Tensor]:
        """The part [B, m] of each model in the scores by the users' own weights; the parts sum to the score."""
        weights, groups = self._weights(self._shares()), self.broadcast.groups.tolist()
        listed = self._listed(weights["neighbourhood"]) if "neighbourhood" in weights else None
        if listed is not None:
            weights["neighbourhood"] = weights["neighbourhood"].masked_fill(listed[2], 0.0)
        items, parts = cache(self._items), {}
        for name, part in self.parts.items():
            own = weights[name] * part.finish(part.users)
            parts[name] = torch.stack([items(name, group) @ each for group, each in zip(groups, own, strict=True)])
        if listed is not None:
            where, values, _ = listed
            parts["neighbourhood"].scatter_add_(1, where.clamp(min=0), values.masked_fill(where < 0, 0.0))
        return parts

    def learned(self, key: Key) -> Tensor:
        """[B, models] the logits after one gradient step on the BPR loss of the mixed scores, own items against random
        others.

        An own item is left out of the user vector that it is scored against; otherwise the local model would look
        better than it is.
        """
        rows, groups = self.rows, self.broadcast.groups
        drawn, owners = draw_outside(rows, self.every.numel(), rows.counts, key.spread(rows.users))
        pairs, used = paired(rows, owners)
        negatives, owners = drawn[used], owners[used]
        margins = []
        for part in self.parts.values():
            context = part.finish(expand(part.users, rows.segments) - part.edge[:, None] * part.rows(ALL))
            context = (context * expand(part.scale, rows.segments))[pairs]
            up = part.items(rows.items, groups[rows.segments])[pairs]
            margins.append(dot(context, up - part.items(negatives, groups[owners])))
        stacked, mix = torch.stack(margins, dim=1), self.mix.detach().requires_grad_()
        mixed = dot(stacked, expand(mix[:, self._places].softmax(1), owners))
        loss = losses.bpr(mixed, torch.zeros_like(mixed), owners, rows.n_users) / rows.counts.clamp(min=1)
        (gradient,) = torch.autograd.grad(loss.sum(), mix)
        return self.mix - gradient


_covariances = WeakTensorKeyDictionary()
"""The covariances of final item vectors by table, which never changes, and by exponent. A block of users would take
longer to compute them than its own vectors."""


def scaled(table: Tensor, star: Star, rows: Rows, reference: Reference, exponent: float | None = None) -> Part:
    """A model that scores the items of users with ``rows`` by the rows of a ``table`` [m, r] alone. Its scores are
    scaled to the standard deviation of those of the ``reference``. A table with an ``exponent``, by which its items are
    scaled, never changes."""
    every = reference.every

    def own(here: slice) -> Tensor:
        return table.index_select(0, rows.items[here])

    def users() -> Tensor:
        return in_blocks(star, table.new_zeros(rows.n_users, 1), rows, own)

    def scale(users: Tensor) -> Tensor:
        def final(here: slice) -> Tensor:
            return star.items(table[here], every[here])

        known = {} if exponent is None else _covariances.setdefault(table, {})
        if exponent not in known:
            known[exponent] = covariance(final, table.shape[0])
        return (reference.deviation / deviation(users, known[exponent]).clamp(min=1e-12))[:, None]

    def items(which: Tensor, groups: Tensor) -> Tensor:
        return star.items(table.index_select(0, which), which)

    return Part(star.edge, own, users, lambda vectors: vectors, items, scale)


def in_blocks(star: Star, first: Tensor, rows: Rows, own: Callable[[slice], Tensor]) -> Tensor:
    """[B, d] users' vectors by a ``star``, from their layer 0 ``first`` [B, d] and that of their ``own`` items, for
    :data:`AT_ONCE` users after another, so that few rows are in memory together."""
    found = []
    for start in range(0, max(rows.n_users, 1), AT_ONCE):
        stop = min(start + AT_ONCE, rows.n_users)
        here = slice(int(rows.offsets[start]), int(rows.offsets[stop]))
        shift = None if star.user_shift is None else star.user_shift[start:stop]
        part = replace(star, edge=star.edge[here], user_shift=shift)
        found.append(part.users(first[start:stop], own(here), rows.segments[here] - start))
    return torch.cat(found) if len(found) > 1 else found[0]


def covariance(items: Callable[[slice], Tensor], n_items: int) -> Tensor:
    """[d, d] the covariance of the final vectors [m, d] of ``n_items``; ``items`` has those of a slice of them."""
    tiles = [slice(first, first + ITEMS_AT_ONCE) for first in range(0, n_items, ITEMS_AT_ONCE)]
    mean = torch.stack([items(tile).sum(0) for tile in tiles]).sum(0) / n_items
    total = mean.new_zeros(mean.numel(), mean.numel())
    for tile in tiles:
        centred = items(tile) - mean
        total += centred.T @ centred
    return total.div_(n_items)


def deviation(users: Tensor, covariances: Tensor) -> Tensor:
    """[B] the standard deviation of each user's scores over all items, for final vectors [B, d] and the
    :func:`covariance` of the items."""
    return dot(users @ covariances, users).clamp(min=0).sqrt()


def _lists(
    mixtures: Sequence[Mixture], weights: Sequence[Mapping[str, Tensor]]
) -> tuple[Lists | None, list[Tensor] | None]:
    """The users' lists by the ``weights`` of several settings, and the weight [B, 1] by each setting of the
    neighbourhood model of low rank, which is for users without a list. ``None`` where there is no such thing."""
    if "neighbourhood" not in weights[0]:
        return None, None
    near = [each["neighbourhood"] for each in weights]
    first = mixtures[0]._listed(near[0])
    if first is None:
        return None, near
    items, own, has = first
    values = own.new_empty(*own.shape, len(mixtures))
    values[:, :, 0] = own
    for number in range(1, len(mixtures)):  # all settings have the same items
        other = mixtures[number]._listed(near[number])
        assert other is not None
        values[:, :, number] = other[1]
    return Lists(items, values), [weight.masked_fill(has, 0.0) for weight in near]


# --- weights that users' held-out items choose ---

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The shares of one model that are compared, the others staying in proportion to each other."""

BETAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The exponents of the neighbourhood model that are compared."""

N_SETTINGS = 1 + len(SHARES)
"""The number of settings that are compared in a turn, the present one among them."""


@dataclass(frozen=True)
class Setting:
    """What held-out items choose for all users: the ``weights`` [models], and the exponent ``beta`` of the
    neighbourhood model."""

    weights: Tensor
    beta: float


def turns(names: Sequence[str]) -> list[str]:
    """What is compared in one turn after another, for models of these ``names``: the share of each of them, from the
    last of :data:`MODELS` to the first, and "beta". Nothing where nothing can be chosen."""
    found = [name for name in reversed(MODELS) if name in names] if len(names) > 1 else []
    return [*found[:1], "beta", *found[1:]] if "neighbourhood" in names else found


def step(setting: Setting, names: Sequence[str], turn: int, number: int) -> Setting:
    """Setting ``number`` of those that are compared in a ``turn``. Number 0 is the present ``setting``, its weights as
    shares that add up to 1; each other one gives one model one of the :data:`SHARES`, or the neighbourhood model one of
    the :data:`BETAS`. The ``names`` are those of the models that can be compared."""
    order, now = turns(names), setting.weights / setting.weights.sum()
    if not number or not order:
        return Setting(now, setting.beta)
    what = order[turn % len(order)]
    if what == "beta":
        return Setting(now, BETAS[number - 1])
    place, share, others = MODELS.index(what), SHARES[number - 1], now.clone()
    others[place] = 0.0
    if not bool(others.sum() > 0):  # it is alone: the others start from equal shares
        others = torch.tensor([float(name in names and name != what) for name in MODELS[: now.numel()]]).to(now)
    others *= (1 - share) / others.sum()
    others[place] = share
    return Setting(others, setting.beta)


def shares_of(weights: Tensor, names: Sequence[str], clustered: bool) -> dict[str, float]:
    """The shares in the scores of the models ``names``, which are those that are there, by ``weights`` [models].

    Before users are ``clustered`` the cluster's model is the global one: then its share is a part of that.
    """
    own = {name: float(weights[MODELS.index(name)]) for name in names}
    total = sum(own.values())
    found = {name: weight / total if total else 1 / len(own) for name, weight in own.items()}
    if not clustered and "cluster" in found:
        found["global"] = found.get("global", 0.0) + found.pop("cluster")
    return found


LEAST = 1e-12
"""The weight in place of 0, which has no logit."""


def logits_of(weights: Tensor) -> Tensor:
    """The logits of weights, which are not negative."""
    return weights.clamp(min=LEAST).log()
