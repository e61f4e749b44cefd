"""One client at a time, in plain Python loops over a dense copy of the item table: the reference for ``client``.

It uses nothing of the package except the attribute network, which has its own reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.nn.crossing import Crossing


@dataclass
class Client:
    """What one client has and receives."""

    table: Tensor  # [m, d] its own copy of its cluster's model
    degrees: Tensor  # [m]
    sums: Tensor | None  # [2, m, d] neighbour sums
    vector: Tensor  # [d]
    own: list[int]
    negatives: list[int]
    dense: Tensor | None = None
    attributes: Tensor | None = None
    item_attributes: Tensor | None = None


def final_vectors(
    settings: PerFedRecSettings, me: Client, vector: Tensor, table: Tensor, dense: Tensor | None, without: int | None
) -> tuple[Tensor, list[Tensor]]:
    """The user's final vector, with its own item ``without`` left out of the sum, and the final vectors of all
    items."""
    model, items0 = settings.model, [table[item] for item in range(table.shape[0])]
    if dense is not None:
        dim = model.embedding_dim
        if me.attributes is not None:
            net = Crossing(me.attributes.numel(), dim)
            vector = net(dense[None, : net.size], vector[None, None], me.attributes[None, None])[0, 0]
        if me.item_attributes is not None:
            net = Crossing(me.item_attributes.shape[1], dim)
            items0 = [
                net(dense[None, -net.size :], row[None, None], given[None, None])[0, 0]
                for row, given in zip(items0, me.item_attributes, strict=True)
            ]
    weights = {item: (len(me.own) * max(float(me.degrees[item]), 1)) ** -0.5 for item in me.own}
    if model.encoder == "spectral":
        user = vector
        for item in me.own:
            if item != without:
                user = user + weights[item] * items0[item]
        return user, [row * max(float(d), 1) ** 0.5 for row, d in zip(items0, me.degrees, strict=True)]
    if me.sums is None:
        user = vector / 2
        for item in me.own:
            if item != without:
                user = user + weights[item] * items0[item] / 2
        return user, items0
    layers = model.n_layers + 1
    user = vector / layers
    for item in me.own:
        if item != without:
            user = user + weights[item] * items0[item] / layers
        user = user + weights[item] * me.sums[0, item]
    return user, [row / layers + shift for row, shift in zip(items0, me.sums[1], strict=True)]


def score(settings: PerFedRecSettings, user: Tensor, item: Tensor) -> Tensor:
    product = (user * item).sum()
    if settings.client.similarity == "cosine":
        return product / (user.square().sum().sqrt() * item.square().sum().sqrt())
    return product


def loss(settings: PerFedRecSettings, me: Client, vector: Tensor, table: Tensor, dense: Tensor | None) -> Tensor:
    """The sum over the client's positives, plus L2 on the rows of the batch."""
    client, total = settings.client, torch.zeros((), dtype=table.dtype)
    whole, items = final_vectors(settings, me, vector, table, dense, None)
    against = [score(settings, whole, items[item]) for item in me.negatives]
    for place, item in enumerate(me.own):
        user = final_vectors(settings, me, vector, table, dense, item)[0] if client.leave_one_out else whole
        positive = score(settings, user, items[item])
        if client.loss == "bpr":
            if me.negatives:
                margin = positive - score(settings, user, items[me.negatives[place % len(me.negatives)]])
                total = total - torch.log(1 / (1 + torch.exp(-margin)))
        else:
            t = client.temperature
            others = sum((torch.exp(each / t) for each in against), torch.zeros((), dtype=table.dtype))
            total = total - torch.log(torch.exp(positive / t) / (torch.exp(positive / t) + others))
    if client.l2:
        squares = vector.square().sum()
        for item in [*me.own, *me.negatives]:
            squares = squares + table[item].square().sum()
        total = total + client.l2 / 2 * squares
    return total


def train(settings: PerFedRecSettings, me: Client) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """E local steps in double precision: the changed table, the new vector, the changed dense weights, the loss."""
    client = settings.client
    vector, table = torch.nn.Parameter(me.vector.double()), torch.nn.Parameter(me.table.double())
    dense = None if me.dense is None else torch.nn.Parameter(me.dense.double())
    groups = [{"params": [table], "lr": client.learning_rate}]
    if dense is not None:
        groups.append({"params": [dense], "lr": client.dense_learning_rate / len(me.own)})
    private = torch.optim.Adam([vector], lr=client.user_learning_rate)
    public = torch.optim.SGD(groups)
    for _ in range(client.local_steps):
        value = loss(settings, me, vector, table, dense)
        private.zero_grad()
        public.zero_grad()
        value.backward()
        private.step()
        public.step()
    return table.detach(), vector.detach(), None if dense is None else dense.detach(), float(value.detach())
