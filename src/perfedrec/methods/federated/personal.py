"""The personal model: a weighted mean of the scores of several models, with each user's own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import draw_outside, paired
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


@dataclass(frozen=True)
class Part:
    """One of the models that are mixed, for a block of users.

    ``edge`` [R] and layer-0 ``rows`` [R, d] of the users' own items; ``users`` [B, d] their vectors before ``finish``,
    the function that brings vectors to the form that is scored; ``items(which, groups)`` [T, d] the final vectors of
    the items ``which`` [T] for members of the clusters ``groups`` [T]; ``scale`` [B, 1] the factor of the scores.
    """

    edge: Tensor
    rows: Tensor
    users: Tensor
    finish: Callable[[Tensor], Tensor]
    items: Callable[[Tensor, Tensor], Tensor]
    scale: Tensor


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

        def part(own: Tensor, table: Callable[[Tensor, Tensor], Tensor]) -> Part:
            def items(which: Tensor, groups: Tensor) -> Tensor:
                layer0 = network.items0(broadcast.item_attributes, table(which, groups), which, dense)
                return finish(star.items(layer0, which))

            crossed = network.items0(broadcast.item_attributes, own, rows.items, dense)
            return Part(star.edge, crossed, star.users(first, crossed, rows.segments), finish, items, one)

        def global_rows(which: Tensor, groups: Tensor) -> Tensor:
            return broadcast.items.index_select(0, which)

        cluster = broadcast.table_rows(rows.items, broadcast.groups[rows.segments])
        self.parts = {
            "local": part(cluster + fine_tuned, broadcast.table_rows),
            "cluster": part(cluster, broadcast.table_rows),
            "global": part(global_rows(rows.items, rows.segments), global_rows),
        }
        if broadcast.pretrained is not None:
            self.parts["pretrained"] = self._scaled(broadcast.pretrained, spectral_star(rows, broadcast.degrees))
        if broadcast.low_rank is not None:
            self.parts["neighbourhood"] = self._near(broadcast.low_rank)
        self.mix, self._places = mix, [MODELS.index(name) for name in self.parts]
        self._found: dict[str, Tensor] = {}

    @cached_property
    def _target(self) -> Tensor:
        """[B] the standard deviation of the global model's scores, which other models are scaled to."""
        like = self.parts["global"]
        return spread(like.finish(like.users), like.items(self.every, torch.zeros_like(self.every)))

    def _scaled(self, table: Tensor, star: Star) -> Part:
        """A model that scores a user's items by the rows of a ``table`` [m, r] alone. Its scores are scaled to the
        standard deviation of the global model's scores."""
        rows = self.rows
        own = table.index_select(0, rows.items)
        users = star.users(table.new_zeros(rows.n_users, 1), own, rows.segments)
        scale = (self._target / spread(users, star.items(table)).clamp(min=1e-12))[:, None]

        def items(which: Tensor, groups: Tensor) -> Tensor:
            return star.items(table.index_select(0, which), which)

        return Part(star.edge, own, users, lambda vectors: vectors, items, scale)

    def _near(self, factor: Tensor) -> Part:
        """The neighbourhood model of low rank, from its ``factor`` [m, r]."""
        return self._scaled(factor, diffusion_star(self.rows, self.broadcast.degrees, self.diffusion.alpha, self.beta))

    def with_beta(self, beta: float) -> Mixture:
        """The same models, with another exponent in the neighbourhood model."""
        if beta == self.beta or self.broadcast.low_rank is None:
            return self
        other = copy(self)
        other.beta, other._found = beta, {}
        other.parts = self.parts | {"neighbourhood": other._near(self.broadcast.low_rank)}
        return other

    def _weights(self, mix: Tensor | None = None) -> dict[str, Tensor]:
        """[B, 1] the weight of each model, times the scale of its scores, by the logits ``mix`` [B, models], or by the
        users' own. Before the first round of training it is 0 for those that are untrained, and scores have the scale
        of the first one that is ready."""
        names, logits = list(self.parts), (self.mix if mix is None else mix)[:, self._places]
        scales = {name: part.scale for name, part in self.parts.items()}
        if not self.broadcast.trained and (ready := [name for name in names if name in UNTRAINED]):
            away = [place for place, name in enumerate(names) if name not in ready]
            logits = logits.index_fill(1, torch.tensor(away, device=logits.device), -torch.inf)
            scales = {name: scale / self.parts[ready[0]].scale for name, scale in scales.items()}
        shares = logits.softmax(1).split(1, dim=1)
        return {name: share * scales[name] for name, share in zip(names, shares, strict=True)}

    def _listed(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The lists' part [B, m] of the scores, and which users [B, 1] have a list; ``None`` without lists.

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
        own = nearness * (weight * self._target[:, None] / part.scale / deviation)
        scores = weight.new_zeros(self.rows.n_users, n_items)
        return scores.scatter_add_(1, items, own), (near >= 0).any(1, keepdim=True)

    def _weighted(self) -> tuple[dict[str, Tensor], Callable[[str, int], Tensor], Tensor | None]:
        """Each model's final user vectors [B, d] times its weight; a function that returns the final vectors [m, d] of
        all items in a model for the members of a cluster; and the lists' part [B, m] of the scores."""
        weights, listed = self._weights(), None
        users = {name: weights[name] * part.finish(part.users) for name, part in self.parts.items()}
        if "neighbourhood" in users and (found := self._listed(weights["neighbourhood"])) is not None:
            listed, has = found
            users["neighbourhood"] = users["neighbourhood"].masked_fill(has, 0.0)

        @cache
        def items(name: str, group: int) -> Tensor:
            return self.parts[name].items(self.every, torch.full_like(self.every, group))

        return users, items, listed

    def scores(self) -> Tensor:
        """[B, m] scores of all items."""
        users, items, listed = self._weighted()
        if listed is not None and not bool(users["neighbourhood"].any()):
            del users["neighbourhood"]  # all have lists
        users["cluster"] = users["cluster"] + users.pop("local")  # both score the same table
        if self.broadcast.offsets is None:
            users["global"] = users["global"] + users.pop("cluster")

        def tables(group: int) -> Tensor:
            return torch.cat([items(name, group if name == "cluster" else 0) for name in users], dim=1)

        scores = self._by_group(torch.cat(list(users.values()), dim=1), tables)
        return scores if listed is None else scores.add_(listed)

    def _by_group(self, vectors: Tensor, tables: Callable[[int], Tensor]) -> Tensor:
        """[B, m] the scores of all items by the users' ``vectors`` [B, d] and the ``tables(group)`` [m, d] of their
        groups."""
        groups = self.broadcast.groups.unique().tolist()
        if len(groups) == 1:
            return vectors @ tables(groups[0]).T
        scores = vectors.new_empty(self.rows.n_users, self.every.numel())
        for group in groups:
            members = (self.broadcast.groups == group).nonzero().squeeze(1)
            scores[members] = vectors[members] @ tables(group).T
        return scores

    def mixed(self, setting: Setting) -> Tensor:
        """[B, m] the scores of all items with a ``setting`` for all users. What each model says of the items is
        computed once for all settings."""
        mixture = self.with_beta(setting.beta)
        weights, scores = mixture._weights(logits_of(setting.weights).expand_as(self.mix)), None
        for name, weight in weights.items():
            if bool(weight.any()):
                own = (mixture if name == "neighbourhood" else self)._alone(name)
                scores = own * weight if scores is None else scores.addcmul_(own, weight)
        assert scores is not None
        return scores

    def _alone(self, name: str) -> Tensor:
        """[B, m] the scores of all items in one model."""
        if name not in self._found:
            self._found[name] = self._scored(name)
        return self._found[name]

    def _scored(self, name: str) -> Tensor:
        """:meth:`_alone`, computed."""
        part = self.parts[name]
        listed = self._listed(torch.ones_like(part.scale)) if name == "neighbourhood" else None
        if listed is not None and bool(listed[1].all()):
            return listed[0]
        users = part.finish(part.users)

        def items(group: int) -> Tensor:
            return part.items(self.every, torch.full_like(self.every, group))

        scores = self._by_group(users, items) if name in ("local", "cluster") else users @ items(0).T
        return scores if listed is None else torch.where(listed[1], listed[0], scores)

    def explain(self) -> dict[str, Tensor]:
        """The part [B, m] of each model in :meth:`scores`; the parts sum to the score."""
        users, items, listed = self._weighted()
        groups = self.broadcast.groups.tolist()
        parts = {
            name: torch.stack([items(name, group) @ vector for group, vector in zip(groups, own, strict=True)])
            for name, own in users.items()
        }
        if listed is not None:
            parts["neighbourhood"] += listed
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
            context = part.finish(expand(part.users, rows.segments) - part.edge[:, None] * part.rows)
            context = (context * expand(part.scale, rows.segments))[pairs]
            up = part.items(rows.items, groups[rows.segments])[pairs]
            margins.append(dot(context, up - part.items(negatives, groups[owners])))
        stacked, mix = torch.stack(margins, dim=1), self.mix.detach().requires_grad_()
        mixed = dot(stacked, expand(mix[:, self._places].softmax(1), owners))
        loss = losses.bpr(mixed, torch.zeros_like(mixed), owners, rows.n_users) / rows.counts.clamp(min=1)
        (gradient,) = torch.autograd.grad(loss.sum(), mix)
        return self.mix - gradient


def spread(users: Tensor, items: Tensor) -> Tensor:
    """[B] the standard deviation of each user's scores over all items, for final vectors [B, d] and [m, d]."""
    centred = items - items.mean(0)
    covariance = centred.T @ centred / items.shape[0]
    return dot(users @ covariance, users).clamp(min=0).sqrt()


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


def logits_of(weights: Tensor) -> Tensor:
    """The logits of weights, which are not negative."""
    return weights.clamp(min=1e-12).log()
