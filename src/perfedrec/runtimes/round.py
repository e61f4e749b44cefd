"""One round, written once: plan, clients' work block by block, exact sum, server step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.core.types import Aggregate, Algorithm, RoundReport, Update, reduce
from perfedrec.runtimes.population import Population, Users


def round_key(seed: int, number: int) -> Key:
    """The key of everything random in a round."""
    return Key(seed).fold("round", number)


def surviving(cohort: Tensor, dropout_rate: float, key: Key) -> Tensor:
    """The users of a cohort that do not drop out: each one stays with probability ``1 - dropout_rate``."""
    if not dropout_rate:
        return cohort
    return cohort[uniform(key.fold("drop-out").spread(cohort), 1).squeeze(1) >= dropout_rate]


def contribute(
    algorithm: Algorithm[Any, Any, Any], phase: str, broadcast: Any, population: Users, users: Tensor, key: Key
) -> tuple[Update, Any]:
    """The work of ``users`` [B] where their data are: what they hand over, and their new memories, which are stored.

    ``key`` is the key of the round.
    """
    rows, positions = population.rows(users)
    client_state = population.recall(users, positions)
    update, client_state = algorithm.client(phase, broadcast, rows, client_state, key.fold("client"))
    population.remember(users, positions, client_state)
    return update, client_state


def play_round(
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    population: Population,
    seed: int,
    dropout_rate: float = 0.0,
    block_size: int = 1024,
    nodes: Tensor | None = None,
) -> tuple[Any, RoundReport]:
    """Play the next round and return the new state with a report. Memories of those who took part are updated.

    Bytes are those of users on their own or, with ``nodes`` [n], of the nodes that users are on, which send sums:
    nothing else changes.
    """
    key = round_key(seed, state.round)
    plan = algorithm.plan(state, key.fold("plan"))
    users, asked = surviving(plan.cohort, dropout_rate, key), plan.cohort.numel()
    reason = None
    if algorithm.aborted(plan.phase, users.numel(), asked):
        users, reason = users[:0], f"{users.numel()} clients are too few for a sum"
    n_items, groups = population.n_items, algorithm.n_groups(state)
    total: Aggregate | None = None
    up = up_max = down = 0
    losses = []
    for members in _together(users, nodes):
        here: Aggregate | None = None
        for block in members.split(block_size):
            broadcast = algorithm.broadcast(state, block)
            update, client_state = contribute(algorithm, plan.phase, broadcast, population, block, key)
            number = 8 if algorithm.secure_sums else 4
            sent = update.upload_bytes(groups * n_items if algorithm.dense_uploads else None, number)
            if nodes is None:
                up, up_max = up + int(sent.sum()), max(up_max, int(sent.max()))
                down += broadcast.download_bytes() * block.numel()
            if update.deltas is not None and hasattr(client_state, "loss"):
                losses.append(client_state.loss)
            part = reduce(update, n_items, groups)
            here = part if here is None else here + part
        assert here is not None
        total = here if total is None else total + here
        if nodes is not None:
            own = key.fold("release").fold("node", int(members.min()))
            leaving = here if algorithm.secure_sums else algorithm.release(plan.phase, here, asked, own)
            size = leaving.upload_bytes(masked=algorithm.secure_sums)
            up, up_max = up + size, max(up_max, size)
            down += algorithm.broadcast(state, members).download_bytes(together=True)
    if total is None:
        total = Aggregate.empty(n_items, groups, device=plan.cohort.device)
    total = algorithm.release(plan.phase, total, asked, key.fold("release"))
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=plan.cohort.numel(),
        clients=total.clients,
        loss=float(torch.cat(losses).double().mean()) if losses and plan.phase == "train" else None,
        bytes_up=up,
        bytes_up_max=up_max,
        bytes_down=down,
        aborted=reason,
    )
    return algorithm.server(state, plan.phase, total, key.fold("server")), report


def _together(users: Tensor, nodes: Tensor | None) -> list[Tensor]:
    """The users of each node that has any; without ``nodes`` [n] all of them."""
    if nodes is None or not users.numel():
        return [users] if users.numel() else []
    on = nodes[users]
    order = on.argsort(stable=True)
    return list(users[order].split(on[order].unique_consecutive(return_counts=True)[1].tolist()))
