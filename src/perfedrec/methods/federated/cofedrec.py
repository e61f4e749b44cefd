"""CoFedRec: co-clustering of users and items (He et al., WWW 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.core.settings import Settings
from perfedrec.core.types import NEWCOMER, Embedding, Rows, Spec
from perfedrec.methods.federated import cohort
from perfedrec.methods.federated.base import LocalBatch
from perfedrec.methods.federated.local import Parameters
from perfedrec.methods.federated.mixed import Mixed, MixedBroadcast, MixedState, check_reports
from perfedrec.methods.federated.pfedrec import PFedRec
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.methods.federated.state import ClientState
from perfedrec.nn.losses import supervised_contrast
from perfedrec.nn.segments import segment_sum


class CoClusterSettings(Settings):
    """Options of the co-clustering."""

    n_categories: int = Field(5, ge=2, description="number of categories of items, each with a table for its group")
    every: int = Field(1, ge=1, description="number of rounds from one grouping of users to the next")
    learning_rate: float = Field(0.1, ge=0, description="step of a group's table, as a share of the server's step")
    contrast: float = Field(0.01, ge=0, description="weight of the supervised contrastive term; 0: none")
    temperature: float = Field(0.2, gt=0, description="temperature of the supervised contrastive term")
    n_contrasted: int = Field(
        32, ge=2, description="largest number of a client's items in this term, whose cost grows with its square"
    )


class CoFedRecSettings(FederatedSettings):
    """Options of CoFedRec."""

    cocluster: CoClusterSettings = CoClusterSettings()

    @model_validator(mode="after")
    def _visible(self) -> CoFedRecSettings:
        check_reports("cofedrec", self.privacy)
        return self


@dataclass(frozen=True, kw_only=True)
class CoClusterState(MixedState):
    """Adds the items' ``categories`` [m] with their ``centroids`` [C, d], ``None`` before the first clustering, and
    each user's ``group`` [n]: the number of a category, or C before the user is in a group. A report has a vector for
    each category."""

    categories: Tensor | None = None
    centroids: Tensor | None = None
    group: Tensor


@dataclass(frozen=True, kw_only=True)
class CoClusterBroadcast(MixedBroadcast):
    """Adds the items' ``categories`` [m]."""

    categories: Tensor | None = None

    def download_bytes(self, together: bool = False) -> int:
        return super().download_bytes(together) + 4 * (0 if self.categories is None else self.categories.numel())


class CoFedRec(Mixed[CoClusterState, CoClusterBroadcast], PFedRec[CoClusterState, CoClusterBroadcast, ClientState]):
    """PFedRec with co-clustering. The server clusters the shared item vectors into categories. It draws a category and
    a user, sorts all users by their similarity to this user in the category, and cuts at the elbow of the sorted
    similarities. Those before it are a group with a table of its own; the others keep the table that they have. Clients
    add a supervised contrastive term to their loss: items of one category should be alike.

    We had the abstract and public code of others that follows the authors', not the full text.

    Departs from them: there is one group's table per category, stored as an offset from the shared table, instead of a
    whole table for each user; users who were in no group yet share one more. Users are compared by the mean of their
    table's rows in the category (fine-tuned where they have the item) instead of row by row, and by their last uploads,
    so that a group is known before its members train. The contrastive term is over the items that a client trains on,
    at most ``n_contrasted`` of them, instead of all items. Items are clustered by direction. Score function and item
    vectors take their steps together; the server's optimiser is an option.
    """

    Options = CoFedRecSettings
    settings: CoFedRecSettings
    broadcast_type = CoClusterBroadcast

    @property
    def n_reported(self) -> int:
        return self.settings.cocluster.n_categories

    def n_tables(self) -> int:
        return self.settings.cocluster.n_categories + 1

    def table_share(self, state: CoClusterState) -> float:
        return self.settings.cocluster.learning_rate

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> CoClusterState:
        common = self._init(spec, key)
        none = torch.full((spec.n_users,), self.settings.cocluster.n_categories, device=common.items.device)
        return CoClusterState(**vars(common), group=none)

    def mixing_weights(self, state: CoClusterState, users: Tensor) -> Tensor:
        own = state.group[users.clamp(min=0)].masked_fill(users == NEWCOMER, self.n_tables() - 1)
        return functional.one_hot(own, self.n_tables()).to(state.items.dtype)

    def broadcast(self, state: CoClusterState, users: Tensor) -> CoClusterBroadcast:
        return replace(super().broadcast(state, users), categories=state.categories)

    def server(self, state: CoClusterState, phase: str, aggregate: Aggregate, key: Key) -> CoClusterState:
        state, options = super().server(state, phase, aggregate, key), self.settings.cocluster
        if state.round % options.every or not aggregate.clients:
            return state
        if state.categories is not None:
            state = replace(state, group=regroup(state.reports, state.group, key.fold("group")))
        categories, centroids = cohort.cluster(
            state.items, options.n_categories, state.centroids, key.fold("categories")
        )
        return replace(state, categories=categories, centroids=centroids)

    # --- the clients ---

    def local_loss(self, batch: LocalBatch[CoClusterBroadcast], parameters: Parameters) -> Tensor:
        loss, options = super().local_loss(batch, parameters), self.settings.cocluster
        categories, labels = batch.broadcast.categories, batch.labels
        if categories is None or not options.contrast:
            return loss
        order, segments, share = spread(torch.cat([labels.rows.segments, labels.owners]), options.n_contrasted)
        kinds = categories[torch.cat([labels.rows.items, labels.negatives])[order]]
        rows = torch.cat([parameters.positives, parameters.negatives])[order]
        terms = supervised_contrast(rows, kinds, segments, labels.rows.n_users, options.temperature)
        return loss + options.contrast * segment_sum(terms / share, segments, labels.rows.n_users)

    def report(self, broadcast: CoClusterBroadcast, rows: Rows, client_state: ClientState, key: Key) -> Tensor:
        categories, number = broadcast.categories, self.n_reported
        if categories is None:
            return client_state.rows.new_zeros(rows.n_users, number, client_state.rows.shape[1])
        sizes = torch.bincount(categories, minlength=number).clamp(min=1)[:, None]
        tables = broadcast.items + broadcast.offsets.view(self.n_tables(), *broadcast.items.shape)
        received = tables.new_zeros(self.n_tables(), number, tables.shape[2]).index_add_(1, categories, tables)
        own = received.new_zeros(rows.n_users * number, tables.shape[2])
        own.index_add_(0, rows.segments * number + categories[rows.items], client_state.rows)
        return (received[broadcast.weights.argmax(1)] + own.view(rows.n_users, number, -1)) / sizes

    def embedding(self, broadcast: CoClusterBroadcast, rows: Rows, client_state: ClientState) -> Embedding:
        return Embedding(client_state.private[:, :-1], broadcast.items, broadcast.weights.argmax(1))


def spread(segments: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``most`` rows of each client ``segments`` [T], evenly spread over all of its rows: their places [T'],
    client by client, their clients [T'], and the share [T'] of its rows that a client has among them."""
    order, counts = segments.argsort(stable=True), torch.bincount(segments)
    owner = segments[order]
    number = torch.arange(owner.numel(), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    kept = (number * most) % counts[owner] < most  # true for exactly ``most`` of a longer client's rows
    kept |= counts[owner] <= most
    share = (most / counts[owner[kept]]).clamp(max=1.0)
    return order[kept], owner[kept], share


def regroup(reports: Tensor, group: Tensor, key: Key) -> Tensor:
    """[n] the groups of users after a draw of a category and of a user who has reported, by users' ``reports`` [n, C,
    d]. ``group`` [n] are the groups before."""
    category = int(choose(reports.shape[1], 1, key.fold("category")))
    known = reports[:, category].any(1).nonzero().squeeze(1)
    if not known.numel():
        return group
    unit = functional.normalize(reports[known, category].to(torch.float64), dim=1)  # cosines differ by little
    drawn = int(choose(known.numel(), 1, key.fold("user")))
    similar, order = (unit @ unit[drawn]).sort(descending=True, stable=True)
    return group.index_fill(0, known[order[: elbow(similar) + 1]], category)


def elbow(values: Tensor) -> int:
    """The place in ``values`` [n] of the one farthest from the straight line between the first and the last one."""
    steps = torch.linspace(0, 1, values.numel(), device=values.device, dtype=torch.float64)
    line = values[0] + steps * (values[-1] - values[0])
    return int((values - line).abs().argmax())
