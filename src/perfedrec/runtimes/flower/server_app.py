"""The server's side of a round, over any Flower grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Aggregate, Algorithm, RoundReport, Rows, Spec, reduce
from perfedrec.runtimes.flower.codec import Instructions, ViewLayout, array_bytes, read_reply
from perfedrec.runtimes.round import round_key


def play_round(
    grid: Grid,
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    spec: Spec,
    nodes: Mapping[int, Tensor],
    layout: ViewLayout,
    seed: int,
    timeout: float | None = None,
) -> tuple[Any, RoundReport]:
    """Play the next round on the ``nodes``, which host the users [h] given for each, and return the new state.

    Users of the cohort whom no node hosts do not take part. ``seed`` serves selection and the server's step. In the
    report, bytes are those of the arrays in the messages, the largest upload is a node's, and there is no loss,
    because losses do not leave the nodes. Raises :class:`PerfedrecError`, which names the node, when a node fails,
    does not answer within ``timeout`` seconds, or answers something that cannot be part of the sum; the state given
    is then unchanged, while the nodes that played the round remember it.
    """
    key = round_key(seed, state.round)
    plan = algorithm.plan(state, key.fold("plan"))
    instructions = Instructions(algorithm, state, plan.phase, plan.cohort.numel(), layout)
    asked = {node: plan.cohort[torch.isin(plan.cohort, users)] for node, users in nodes.items()}
    asked = {node: users for node, users in asked.items() if users.numel()}
    messages = [
        Message(instructions.content(users), dst_node_id=node, message_type="train", group_id=str(state.round))
        for node, users in asked.items()
    ]
    down = sum(array_bytes(message.content) for message in messages)

    like = _example(algorithm, state, plan.phase, spec)
    total = Aggregate.empty(spec.n_items, instructions.n_groups, device=plan.cohort.device)
    up: dict[int, int] = {}
    for answer in grid.send_and_receive(messages, timeout=timeout):
        node = answer.metadata.src_node_id
        try:
            if node not in asked or node in up:
                raise PerfedrecError("expected one reply from each node that was asked")
            if answer.has_error():
                raise PerfedrecError(f"it failed with code {answer.error.code}: {answer.error.reason}")
            total = total + read_reply(answer.content, asked[node], like)
        except PerfedrecError as error:
            raise PerfedrecError(f"round {state.round} ({plan.phase}), reply of node {node}: {error}") from error
        up[node] = array_bytes(answer.content)
    if silent := sorted(asked.keys() - up.keys()):
        raise PerfedrecError(f"round {state.round} ({plan.phase}): no reply from nodes {silent}")
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=plan.cohort.numel(),
        clients=total.clients,
        loss=None,
        bytes_up=sum(up.values()),
        bytes_up_max=max(up.values(), default=0),
        bytes_down=down,
    )
    return algorithm.server(state, plan.phase, total, key.fold("server")), report


def _example(algorithm: Algorithm[Any, Any, Any], state: Any, phase: str, spec: Spec) -> Aggregate:
    """What a made-up user with one item would send: it has the fields, types and shapes of every reply."""
    user = torch.zeros(1, dtype=torch.int64, device=spec.item_degrees.device)
    attributes = torch.zeros(1, spec.n_user_attributes, device=user.device) if spec.n_user_attributes else None
    rows = Rows(user, torch.arange(2, device=user.device), user, user, attributes)
    memory = algorithm.init_memory(rows, Key(0))
    contribution, _ = algorithm.client(phase, algorithm.view(state, user), rows, memory, Key(0))
    total = reduce(contribution, spec.n_items, algorithm.n_groups(state))
    return algorithm.release(phase, total, 1, Key(0))
