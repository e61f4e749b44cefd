"""The server's side of a round, over any Flower grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Aggregate, Algorithm, RoundReport, Rows, Served, Spec, reduce
from perfedrec.runtimes.flower.codec import Instructions, ViewLayout, array_bytes, read_reply
from perfedrec.runtimes.flower.secagg import GivenUpError
from perfedrec.runtimes.flower.secure_sum import secure_sum
from perfedrec.runtimes.flower.service import Mediator, for_coordinator
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
    mediator: Mediator | None = None,
) -> tuple[Any, RoundReport]:
    """Play the next round on the ``nodes``, which host the users [h] given for each, and return the new state.

    Users of the cohort whom no node hosts do not take part. ``seed`` serves selection and the server's step. In the
    report, bytes are those of the arrays in the messages, the largest upload is a node's, and there is no loss,
    because losses do not leave the nodes.

    With a ``mediator`` the neighbourhood service is a node of its own, and ``state`` has neither tokens nor reports;
    where clients contribute to sums alone there is nothing for a service to do.

    Where sums are secure (:func:`~perfedrec.runtimes.flower.secure_sum.secure_sum`) nodes may drop out. A round of
    training whose sum is given up is one without clients; a phase before it then raises
    :class:`~perfedrec.runtimes.flower.secagg.GivenUpError`, and can be played again.

    Otherwise raises :class:`PerfedrecError`, which names the node, when a node fails, does not answer within
    ``timeout`` seconds, or answers something that cannot be part of the sum. After an error the state given is
    unchanged, while the nodes that played the round remember it.
    """
    key, mediator = round_key(seed, state.round), None if algorithm.dense_uploads else mediator
    plan = algorithm.plan(state, key.fold("plan"))
    instructions = Instructions(algorithm, state, plan.phase, plan.cohort.numel(), layout)
    asked = {node: plan.cohort[torch.isin(plan.cohort, users)] for node, users in nodes.items()}
    asked = {node: users for node, users in asked.items() if users.numel()}
    traffic = Traffic(grid, str(state.round), timeout)
    contents = {node: instructions.content(users) for node, users in asked.items()}
    like = _example(algorithm, state, plan.phase, spec)
    private = dict[int, ArrayRecord]()
    if mediator is not None:
        contents = {node: mediator.add(node, content) for node, content in contents.items()}
        like = for_coordinator(like)
    total, reason = Aggregate.empty(spec.n_items, instructions.n_groups, device=plan.cohort.device), None
    if algorithm.secure_sums:
        clients = {node: users.numel() for node, users in asked.items()}
        too_few = partial(algorithm.given_up, plan.phase, asked=plan.cohort.numel())
        try:
            total = secure_sum(traffic.ask, traffic.refuse, contents, clients, like, too_few)
        except GivenUpError as error:
            if plan.phase != "train":
                raise
            reason = str(error)
    else:
        for node, content in traffic.ask("train", contents):
            sealed = None if mediator is None else content.array_records.get("private")
            if sealed is not None:
                del content["private"]
            try:
                total = total + read_reply(content, asked[node], like)
                if sealed is not None:
                    private[node] = sealed
            except PerfedrecError as error:
                traffic.refuse(node, str(error))
        for node, why in traffic.refused.items():
            raise PerfedrecError(f"round {state.round} ({plan.phase}), reply of node {node}: {why}")
        if silent := sorted(asked.keys() - traffic.up.keys()):
            raise PerfedrecError(f"round {state.round} ({plan.phase}): no reply from nodes {silent}")
    own_key = key.fold("server")
    if mediator is None:
        after = algorithm.server(state, plan.phase, total, own_key)
    else:
        task = {"phase": plan.phase, "round": state.round, "clients": total.clients, "key": str(own_key.value)}
        task |= {"n_users": spec.n_users, "n_items": spec.n_items}
        places = {node: (users, users) for node, users in asked.items()}
        published, refused = mediator.consult(traffic.ask, task, private, places, state.centroids, state.items)
        for node, why in refused.items():
            raise PerfedrecError(f"round {state.round} ({plan.phase}), reply of node {node} to the service: {why}")
        after = cast(Served[Any, Any, Any], algorithm).coordinate(state, plan.phase, total, published, own_key)
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=plan.cohort.numel(),
        clients=total.clients,
        loss=None,
        bytes_up=sum(traffic.up.values()),
        bytes_up_max=max(traffic.up.values(), default=0),
        bytes_down=traffic.down,
        given_up=reason,
    )
    return after, report


def exchange(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterable[Message]:
    """Send messages and give the answers that come within ``timeout`` seconds."""
    return grid.send_and_receive(messages, timeout=timeout)


class Traffic:
    """The messages of one round: bytes of the arrays in them, ``up`` by node and ``down`` in all, and the nodes whose
    answers were ``refused``, with the reason."""

    def __init__(self, grid: Grid, group: str, timeout: float | None) -> None:
        self.grid, self.group, self.timeout = grid, group, timeout
        self.up, self.down, self.refused = dict[int, int](), 0, dict[int, str]()

    def ask(self, message_type: str, contents: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict]]:
        """Send ``contents`` to nodes, and give what each of them answers, as it comes."""
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, group_id=self.group)
            for node, content in contents.items()
        ]
        self.down += sum(array_bytes(content) for content in contents.values())
        answered = set[int]()
        for answer in exchange(self.grid, messages, self.timeout):
            node = answer.metadata.src_node_id
            if node not in contents or node in answered:
                self.refuse(node, "expected one reply from each node that was asked")
            elif answer.has_error():
                self.refuse(node, f"it failed with code {answer.error.code}: {answer.error.reason}")
            else:
                self.up[node] = self.up.get(node, 0) + array_bytes(answer.content)
                yield node, answer.content
            answered.add(node)

    def refuse(self, node: int, why: str) -> None:
        """Take note of a node whose answer cannot be used."""
        self.refused.setdefault(node, why)


def _example(algorithm: Algorithm[Any, Any, Any], state: Any, phase: str, spec: Spec) -> Aggregate:
    """What a made-up user with one item would send: it has the fields, types and shapes of every reply."""
    user = torch.zeros(1, dtype=torch.int64, device=spec.item_degrees.device)
    attributes = torch.zeros(1, spec.n_user_attributes, device=user.device) if spec.n_user_attributes else None
    rows = Rows(user, torch.arange(2, device=user.device), user, user, attributes)
    memory = algorithm.init_memory(rows, Key(0))
    view = algorithm.view(state, user)
    if getattr(view, "tokens", user) is None:  # which the coordinator may not know
        view = replace(view, tokens=torch.arange(spec.n_items, device=user.device))
    contribution, _ = algorithm.client(phase, view, rows, memory, Key(0))
    total = reduce(contribution, spec.n_items, algorithm.n_groups(state))
    return algorithm.release(phase, total, 1, Key(0))
