"""Local steps: what clients do with their parameters in a round of training, as one pure function.

A :class:`LocalTask` holds everything that the steps need. :func:`steps` chooses between a compiled kernel and
:func:`autograd_steps`. Any function of type :data:`LocalSteps` can take its place (attribute ``local_steps``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.compiled import LIGHT, spread, usable
from perfedrec.core.errors import ConfigError
from perfedrec.core.lookup import Changed, Unread
from perfedrec.methods.federated.settings import ClientSettings, LocalSettings
from perfedrec.methods.federated.state import ClientState
from perfedrec.methods.federated.tables import Received
from perfedrec.nn.optim import adam
from perfedrec.nn.propagation import Star
from perfedrec.privacy.labels import Labels


@dataclass(frozen=True)
class Parameters:
    """The parameters of B clients that the local steps change.

    ``private`` [B, p] what each client keeps to itself; ``positives`` [P, d] and ``negatives`` [N, d] the item rows
    that it trains on; ``dense`` [B, D] each client's weights of the shared network, ``None`` without one.
    """

    private: Tensor
    positives: Tensor
    negatives: Tensor
    dense: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """The tensors that are not ``None``."""
        found = [self.private, self.positives, self.negatives]
        return found if self.dense is None else [*found, self.dense]

    def detached(self) -> Parameters:
        """The same values as leaves of a new graph."""
        made = [each.detach().requires_grad_() for each in self.leaves()]
        return Parameters(*made)


Loss = Literal["bpr", "softmax", "logistic"]
"""The names of the losses that come with the package."""

Objective = Callable[[Parameters], tuple[Tensor, Tensor]]
"""For parameters: [B] each client's loss, which is reported, and [B] what is minimised, the loss plus penalties that
are not reported."""


@dataclass(frozen=True)
class LocalTask:
    """The local training of a block of B clients in one round.

    ``labels`` are the items that they train on; ``received`` their rows, those of positives before those of negatives;
    ``private`` [B, p] and ``dense`` [B, D] the other parameters at the start; ``begun`` [P + N, d] are offsets that the
    clients add to their item rows before the first step, ``None`` for zeros. ``client_state`` holds Adam's moments.
    ``star`` is the propagation of the block, ``None`` for a method without one. ``client`` are the settings of local
    training: learning rates, the number of steps, the loss with its options.

    ``objective`` computes the loss and, where there is one (``penalised``), the penalty. ``loss`` names it for an
    implementation with gradients of its own, which must refuse what it does not know: "bpr" pairs a client's positives
    and negatives in their order (:func:`perfedrec.core.sampling.paired`), "softmax" shares its negatives among its
    positives (both in :func:`perfedrec.methods.federated.network.ranking_loss`), "logistic" is cross-entropy of a
    method's logits; ``None`` is a method's own.
    """

    labels: Labels
    received: Received
    private: Tensor
    dense: Tensor | None
    begun: Tensor | None
    client_state: ClientState
    objective: Objective
    loss: Loss | None
    penalised: bool
    star: Star | None
    client: ClientSettings | LocalSettings

    @cached_property
    def start(self) -> Parameters:
        """The parameters at the start. The item rows are fetched for it."""
        rows, n_positives = self.received.rows, self.labels.rows.items.numel()
        return Parameters(self.private, rows[:n_positives], rows[n_positives:], self.dense)


@dataclass(frozen=True)
class LocalResult:
    """The result of the local steps: the ``private`` parameters [B, p] with Adam's moments ``first`` and ``second`` [B,
    p] and ``steps`` [B]; offsets ``delta`` [P + N, d] of the item rows from the received ones; the shared network's
    weights ``dense`` [B, D]; and the ``loss`` [B] of the last step, summed over a client's positives."""

    private: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    delta: Tensor
    dense: Tensor | None
    loss: Tensor


LocalSteps = Callable[[LocalTask], LocalResult]


def autograd_steps(task: LocalTask) -> LocalResult:
    """E steps: Adam on the private parameters, gradient descent on the item rows, and gradient descent on the shared
    network's weights with the mean gradient over a client's positives.

    The clients' gradients are independent, because the sum of all clients' objectives separates.
    """
    received, n_positives, settings = task.start, task.start.positives.shape[0], task.client
    counts, clients = task.labels.rows.counts.clamp(min=1)[:, None], task.client_state
    private, dense, delta = received.private, received.dense, task.begun
    first, second, steps = clients.first, clients.second, clients.steps
    loss = torch.zeros(private.shape[0], device=private.device)
    for _ in range(settings.local_steps):
        now = replace(received, private=private, dense=dense)
        if delta is not None:
            now = replace(
                now,
                positives=received.positives + delta[:n_positives],
                negatives=received.negatives + delta[n_positives:],
            )
        parameters = now.detached()
        loss, objective = task.objective(parameters)
        # Where no client of the block has an item, rows have no part in the objective: their gradients are 0.
        gradients = torch.autograd.grad(objective.sum(), parameters.leaves(), materialize_grads=True)
        step, first, second, steps = adam(
            gradients[0], first, second, steps, settings.user_learning_rate, (0.9, 0.999), 1e-8
        )
        private, change = private + step, torch.cat(gradients[1:3])
        if delta is None:
            delta = change.mul_(-settings.learning_rate)
        elif delta is task.begun:  # which is not ours to change
            delta = torch.add(delta, change, alpha=-settings.learning_rate)
        else:
            delta.add_(change, alpha=-settings.learning_rate)
        if dense is not None:
            dense = torch.add(dense, gradients[3] / counts, alpha=-settings.dense_learning_rate)
    assert delta is not None
    return LocalResult(private, first, second, steps, delta, dense, loss.detach())


def steps(task: LocalTask) -> LocalResult:
    """:func:`autograd_steps`, by a kernel where there is one for the ``task``.

    The kernel knows BPR and the sampled softmax on inner products, without a shared network and without penalties.
    """
    clients, star, client, tables = task.client_state, task.star, task.client, task.received.tables
    if not isinstance(client, ClientSettings) or client.similarity != "inner" or client.leave_one_out:
        return autograd_steps(task)
    if task.loss not in ("bpr", "softmax") or task.penalised or task.dense is not None:
        return autograd_steps(task)
    numbers = [task.private, tables.items, tables.offsets, clients.first, clients.second, task.begun]
    if star is not None:
        scale = star.scale if isinstance(star.scale, Tensor) else None
        numbers += [star.edge, star.user_shift, star.shift, scale]
    floats = all(each is None or each.dtype == torch.float32 for each in numbers)
    floats = floats and task.private.shape[1] == tables.items.shape[1]
    return _compiled_steps(task, client) if floats and usable(*numbers) else autograd_steps(task)


def _compiled_steps(task: LocalTask, client: ClientSettings) -> LocalResult:
    """See :func:`perfedrec.methods.federated.kernels.local_steps`."""
    from perfedrec.methods.federated import kernels

    clients, labels, star, received = task.client_state, task.labels, task.star, task.received
    rows, tables, none = labels.rows, received.tables, task.private[:0]
    private, first, second = task.private.clone(), clients.first.clone(), clients.second.clone()
    n_rows, width = received.items.numel(), tables.items.shape[1]
    delta, loss, limits = torch.empty(n_rows, width), torch.empty(rows.n_users), torch.zeros_like(rows.offsets)
    torch.cumsum(torch.bincount(labels.owners, minlength=rows.n_users), 0, out=limits[1:])
    star = Star(1.0, none[:, 0]) if star is None else star
    scale, scales = (1.0, star.scale) if isinstance(star.scale, Tensor) else (star.scale, none)
    offsets, begun, user_shift, shift = (
        none if each is None else each for each in (tables.offsets, task.begun, star.user_shift, star.shift)
    )
    rates = (client.learning_rate, client.user_learning_rate, client.l2, client.temperature)
    groups = limits[:0] if received.groups is None else received.groups
    whole = (rows.offsets, limits, received.items, received.places, groups)
    work = partial(
        kernels.local_steps,
        tuple(each.numpy() for each in whole),
        (tables.items.numpy(), offsets.numpy(), begun.numpy()),
        (star.own, scale, star.edge.numpy(), scales.reshape(-1).numpy(), user_shift.numpy(), shift.numpy()),
        (kernels.LOSSES[client.loss], client.local_steps, rates),
        (tuple(each.numpy() for each in (private, first, second, delta)), clients.steps.numpy(), loss.numpy()),
    )
    spread(work, rows.n_users, n_rows)
    return LocalResult(private, first, second, clients.steps + client.local_steps, delta, None, loss)


def own_rows(kept: Any, positions: Tensor, before: Tensor | Unread) -> Any:
    """[R, d] the clients' own rows. Those at ``positions`` [P] (-1 for decoys) are the first rows of ``kept`` [T, d],
    and the others, which are masked, are as ``before`` [R, d]. Where these were not read, only what changed. Raises
    :class:`ConfigError` where ``kept``, which a method's ``keeps`` returned, has another form."""
    like = before.table if isinstance(before, Unread) else before
    alike = isinstance(kept, Tensor) and kept.dtype == like.dtype and kept.shape[1:] == like.shape[1:]
    if not alike or kept.shape[0] < positions.numel():
        wanted = f"{str(like.dtype).removeprefix('torch.')} [{positions.numel()}, {like.shape[1]}], or more rows"
        raise ConfigError(f"keeps returned {_form(kept)}; expected {wanted}")
    if isinstance(before, Unread):
        return Changed(kept[: positions.numel()], positions)
    if before.dtype == torch.float32 and usable(kept, before, positions):
        from perfedrec.methods.federated import kernels

        rows, sources = torch.empty_like(before), np.empty(before.shape[0], np.int64)
        kernels.invert(positions.numpy(), sources)
        arrays = kept.numpy(), sources, before.numpy(), rows.numpy()
        spread(partial(kernels.keep_rows, *arrays), before.shape[0], before.shape[0] // LIGHT)
        return rows
    own = (positions >= 0).nonzero().squeeze(1)
    return before.index_copy(0, positions[own], kept.index_select(0, own))


def checked(result: object, task: LocalTask, steps: str) -> LocalResult:
    """The result of local steps, if it has the types and shapes that the ``task`` asks for.

    Raises :class:`ConfigError`, which names the ``steps`` that returned it.
    """
    if not isinstance(result, LocalResult):
        raise ConfigError(f"{steps} returned {type(result).__name__}; expected a LocalResult")
    clients, table = task.client_state, task.received.tables.items
    wanted = {
        "private": task.private,
        "first": clients.first,
        "second": clients.second,
        "steps": clients.steps,
        "delta": table.new_empty(1, table.shape[1]).expand(task.received.items.numel(), -1),
        "dense": task.dense,
        "loss": clients.loss,
    }
    for name in (field.name for field in fields(LocalResult)):
        found, like = getattr(result, name), wanted[name]
        if found is not like and not _alike(found, like):
            raise ConfigError(f"{steps} returned {name} as {_form(found)}; expected {_form(like)}")
    return result


def _alike(found: object, like: object) -> bool:
    """Whether two tensors have the same type and shape. This is quick; :func:`_form` says what they have."""
    if not isinstance(found, Tensor) or not isinstance(like, Tensor):
        return False
    return found.dtype == like.dtype and found.shape == like.shape


def _form(value: object) -> str:
    """Type and shape of a tensor, as text."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
