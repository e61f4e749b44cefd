"""The personal model: a weighted mean of the scores of several models, with each user's own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.sampling import draw_outside, paired
from perfedrec.core.types import Rows
from perfedrec.methods.federated.network import Finish, Network
from perfedrec.methods.federated.state import PerFedRecBroadcast
from perfedrec.nn import losses
from perfedrec.nn.propagation import spectral_star
from perfedrec.nn.segments import dot, expand


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

    ``vectors`` [B, d] the users' own vectors; ``fine_tuned`` [R, d] the offsets of their own item rows; ``mix`` [B, 4]
    the logits of the weights of the local, cluster, global and pre-trained model. The local model uses the user's own
    rows for the user vector, and scores the items of the user's cluster.
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
    ) -> None:
        self.broadcast, self.rows, self.mix = broadcast, rows, mix
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
            self.parts["pretrained"] = self._pretrained(broadcast.pretrained)

    def _pretrained(self, table: Tensor) -> Part:
        """The model that pre-training ended with. Its scores are scaled to the standard deviation of the global model's
        scores."""
        rows, like, star = self.rows, self.parts["global"], spectral_star(self.rows, self.broadcast.degrees)
        own = table.index_select(0, rows.items)
        users = star.users(table.new_zeros(rows.n_users, 1), own, rows.segments)
        target = spread(like.finish(like.users), like.items(self.every, torch.zeros_like(self.every)))
        scale = (target / spread(users, star.items(table)).clamp(min=1e-12))[:, None]

        def items(which: Tensor, groups: Tensor) -> Tensor:
            return star.items(table.index_select(0, which), which)

        return Part(star.edge, own, users, lambda vectors: vectors, items, scale)

    def _weighted(self) -> tuple[dict[str, Tensor], Callable[[str, int], Tensor]]:
        """Each model's final user vectors [B, d] times its weight, and a function that returns the final vectors [m, d]
        of all items in a model for the members of a cluster."""
        if "pretrained" in self.parts and not self.broadcast.trained:  # the others are untrained
            weights = {name: torch.full_like(part.scale, name == "pretrained") for name, part in self.parts.items()}
        else:
            shares = self.mix[:, : len(self.parts)].softmax(1)
            weights = {
                name: shares[:, place, None] * part.scale for place, (name, part) in enumerate(self.parts.items())
            }
        users = {name: weights[name] * part.finish(part.users) for name, part in self.parts.items()}

        @cache
        def items(name: str, group: int) -> Tensor:
            return self.parts[name].items(self.every, torch.full_like(self.every, group))

        return users, items

    def scores(self) -> Tensor:
        """[B, m] scores of all items."""
        users, items = self._weighted()
        users["cluster"] = users["cluster"] + users.pop("local")  # both score the same table
        if self.broadcast.offsets is None:
            users["global"] = users["global"] + users.pop("cluster")
        vectors, groups = torch.cat(list(users.values()), dim=1), self.broadcast.groups.unique().tolist()

        def tables(group: int) -> Tensor:
            return torch.cat([items(name, group if name == "cluster" else 0) for name in users], dim=1)

        if len(groups) == 1:
            return vectors @ tables(groups[0]).T
        scores = vectors.new_empty(self.rows.n_users, self.every.numel())
        for group in groups:
            members = (self.broadcast.groups == group).nonzero().squeeze(1)
            scores[members] = vectors[members] @ tables(group).T
        return scores

    def explain(self) -> dict[str, Tensor]:
        """The part [B, m] of each model in :meth:`scores`; the parts sum to the score."""
        users, items = self._weighted()
        groups = self.broadcast.groups.tolist()
        return {
            name: torch.stack([items(name, group) @ vector for group, vector in zip(groups, own, strict=True)])
            for name, own in users.items()
        }

    def learned(self, key: Key) -> Tensor:
        """[B, 4] the logits after one gradient step on the BPR loss of the mixed scores, own items against random
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
        mixed = dot(stacked, expand(mix[:, : len(margins)].softmax(1), owners))
        loss = losses.bpr(mixed, torch.zeros_like(mixed), owners, rows.n_users) / rows.counts.clamp(min=1)
        (gradient,) = torch.autograd.grad(loss.sum(), mix)
        return self.mix - gradient


def spread(users: Tensor, items: Tensor) -> Tensor:
    """[B] the standard deviation of each user's scores over all items, for final vectors [B, d] and [m, d]."""
    centred = items - items.mean(0)
    covariance = centred.T @ centred / items.shape[0]
    return dot(users @ covariance, users).clamp(min=0).sqrt()
