"""The server's side of a round, over any Flower grid."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.algorithm import Algorithm, ServedAlgorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Plan, RoundReport, Rows, Spec
from perfedrec.runtimes.flower.codec import BroadcastLayout, Instructions, Setup, UploadError, array_bytes, read_reply
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.secagg import STAGES, AbortedError
from perfedrec.runtimes.flower.secure_sum import secure_sum
from perfedrec.runtimes.flower.service import ServiceClient, for_coordinator
from perfedrec.runtimes.round import round_key

FAILED = 2
"""Flower's code of a client that raised an error; the reasons that our nodes give begin with their kind."""

POLL = 0.05
"""Least seconds between two looks for replies (Flower's own loop waits 3); our SuperLink holds them for longer."""

AGAIN = 0.5
"""Seconds between two looks for nodes that died with a message."""

LATER = frozenset(f"train.{stage}" for stage in STAGES[1:])
"""Messages that a node cannot answer after a restart."""


@dataclass(frozen=True)
class Rejection:
    """A node that a round went on without: ``reason`` is a kind, such as "not finite" or "late"."""

    node: int
    round: int
    phase: str
    reason: str
    detail: str
    users: int


def play_round(
    grid: Grid,
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    spec: Spec,
    nodes: Mapping[int, Tensor],
    layout: BroadcastLayout,
    seed: int,
    timeout: float | None = None,
    service_client: ServiceClient | None = None,
    *,
    setup: Setup | None = None,
    identities: Tensor | None = None,
    enough: float = 1.0,
    rejected: list[Rejection] | None = None,
) -> tuple[Any, RoundReport]:
    """Play the next round on the ``nodes``, which host the users [h] given for each, and return the new state.

    Users of the cohort whom no node hosts do not take part. ``seed`` serves selection and the server's step. Nodes know
    their users by ``identities`` [n], which are ascending. In the report, bytes are those of the arrays in the
    messages, the largest upload is a node's, and there is no loss, because losses do not leave the nodes.

    With a ``mediator`` the neighbourhood service is a node of its own, and ``state`` has neither tokens nor reports;
    where clients contribute to sums alone there is nothing for a service to do.

    Where sums are secure (:func:`~perfedrec.runtimes.flower.secure_sum.secure_sum`) nodes may drop out. A round of
    training whose sum is given up is one without clients; a phase before it then raises
    :class:`~perfedrec.runtimes.flower.secagg.AbortedError`, and can be played again.

    A node may fail, not answer within ``timeout`` seconds, or answer what cannot be part of the sum. With a list
    ``rejected`` it is noted there, its users count as dropped out, and the round goes on, as it does without the rest
    once a share ``enough`` of the clients asked has answered. Without that list, where sums are not secure,
    :class:`PerfedrecError` is raised, which names the node. After an error the state given is unchanged, while the
    nodes that played the round remember it.
    """
    key, service_client = round_key(seed, state.round), None if algorithm.protection.sums else service_client
    plan = algorithm.plan(state, key.fold("plan"))
    traffic, reason, private = Traffic(grid, state.round, plan.phase, timeout), None, dict[int, ArrayRecord]()
    try:
        total = gather(
            traffic, algorithm, state, plan, spec, nodes, layout, setup, identities, enough, service_client, private
        )
    except AbortedError as error:
        if plan.phase != "train":
            raise
        total, reason = _nothing(algorithm, state, spec), str(error)

    if rejected is None and traffic.rejections and not algorithm.protection.secure:
        first = traffic.rejections[0]
        raise PerfedrecError(f"round {state.round} ({plan.phase}), reply of node {first.node}: {first.detail}")
    if algorithm.protection.aborted(plan.phase, total.clients, plan.cohort.numel()):
        total = _nothing(algorithm, state, spec)
    own_key = key.fold("server")
    if service_client is None:
        after = algorithm.server(state, plan.phase, total, own_key)
    else:
        served = cast(ServedAlgorithm[Any, Any, Any], algorithm)
        task = {"phase": plan.phase, "round": state.round, "clients": total.clients, "key": str(own_key.value)}
        task |= {"n_users": spec.n_users, "n_items": spec.n_items}
        places = {node: users[torch.isin(users, plan.cohort)] for node, users in nodes.items() if node in private}
        names = {node: (each if identities is None else identities[each], each) for node, each in places.items()}
        try:
            published, refused = service_client.consult(
                traffic.ask, task, private, names, served.centroids(state), state.items, setup
            )
        except PerfedrecError as error:
            kind_of_error = AwayError if isinstance(error, AwayError) else PerfedrecError
            why = traffic.excuse(service_client.service)
            raise kind_of_error(f"round {state.round} ({plan.phase}): {error}{why and f': {why}'}") from error
        traffic.excuse(service_client.service)
        for node, why in refused.items():
            if rejected is None:
                which = f"round {state.round} ({plan.phase}), reply of node {node} to the service"
                raise PerfedrecError(f"{which}: {why}")
            kind, _, detail = why.partition(": ")
            traffic.refuse(node, detail, kind)
        after = served.coordinate(state, plan.phase, total, published, own_key)
    if rejected is not None:
        rejected += traffic.rejections
    report = RoundReport(
        round=state.round,
        phase=plan.phase,
        cohort=plan.cohort.numel(),
        clients=total.clients,
        loss=None,
        bytes_up=sum(traffic.up.values()),
        bytes_up_max=max(traffic.up.values(), default=0),
        bytes_down=traffic.down,
        aborted=reason,
    )
    return after, report


def gather(
    traffic: Traffic,
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    plan: Plan,
    spec: Spec,
    nodes: Mapping[int, Tensor],
    layout: BroadcastLayout,
    setup: Setup | None = None,
    identities: Tensor | None = None,
    enough: float = 1.0,
    service_client: ServiceClient | None = None,
    private: dict[int, ArrayRecord] | None = None,
    secure: bool = False,
) -> Aggregate:
    """The sum of what the nodes answer to a plan: see :func:`play_round`. What nodes have sealed for the service of a
    ``mediator`` is put into ``private``. It is taken by secure aggregation where the method says so, or ``secure``."""
    instructions = Instructions(algorithm, state, plan.phase, plan.cohort.numel(), layout, setup, identities)
    asked = {node: plan.cohort[torch.isin(plan.cohort, users)] for node, users in nodes.items()}
    asked = {node: users for node, users in asked.items() if users.numel()}
    contents = {node: instructions.content(users) for node, users in asked.items()}
    traffic.clients = {node: users.numel() for node, users in asked.items()}
    like = _example(algorithm, state, plan.phase, spec)
    if service_client is not None:
        contents = {node: service_client.add(node, content) for node, content in contents.items()}
        like = for_coordinator(like)
    if algorithm.protection.secure or secure:
        too_few = partial(algorithm.protection.aborted, plan.phase, asked=plan.cohort.numel())
        label = f"{'' if setup is None else setup.run} {state.round}"
        return secure_sum(traffic.ask, traffic.refuse, contents, traffic.clients, like, too_few, label)
    total = _nothing(algorithm, state, spec)
    for node, content in traffic.ask("train", contents):
        users = asked[node] if identities is None else identities[asked[node]]
        sealed = None if service_client is None else content.array_records.get("private")
        if sealed is not None:
            del content["private"]
        try:
            total = total + _placed(read_reply(content, users, like), identities)
            if sealed is not None and private is not None:
                private[node] = sealed
        except UploadError as error:
            traffic.refuse(node, str(error), error.reason)
        if total.clients >= ceil(enough * plan.cohort.numel()):
            break
    return total


def exchange(grid: Grid, messages: Iterable[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
    """Send ``messages`` and give the replies as they come, each with the node that was asked, for ``timeout`` seconds
    (``None``: until all are there).

    A node that died with a message is asked again when it is back, which is safe: it answers a round once, and says the
    same again. Only the later stages of secure aggregation need what died with it. What a SuperLink forgot that died is
    asked again at once.
    """
    lost, again = dict[int, tuple[Message, Message]](), 0.0
    waiting = _send(grid, messages)
    end = None if timeout is None else time.monotonic() + timeout
    while waiting or lost:
        looked = time.monotonic()
        replies = list(grid.pull_messages(waiting)) if waiting else []
        for reply in replies:
            if (asked := waiting.pop(reply.metadata.reply_to_message_id, None)) is None:
                continue
            node = asked.metadata.dst_node_id
            if timeout is not None and _died(reply, asked):
                lost[node] = asked, reply
            else:
                yield node, reply
        now = time.monotonic()
        if end is not None and now >= end:
            away = ErrorCode.NODE_UNAVAILABLE  # other messages were given up because their time is over
            yield from ((node, reply) for node, (_, reply) in lost.items() if reply.error.code == away)
            return
        if lost and now > again:
            back, again = lost.keys() & set(grid.get_node_ids()), now + AGAIN
            waiting |= _send(grid, [_copy(lost.pop(node)[0], end, now) for node in sorted(back)])
        if not replies:
            time.sleep(max(looked + POLL - time.monotonic(), 0.0))


def _send(grid: Grid, messages: Iterable[Message]) -> dict[str, Message]:
    """Send ``messages``, and give those that were taken, by their names."""
    messages = list(messages)
    names = grid.push_messages(messages) if messages else []
    return {name: each for name, each in zip(names, messages, strict=True) if name}


def _died(reply: Message, asked: Message) -> bool:
    """Whether what was ``asked`` got lost, and may be asked again: with a node, or with the SuperLink."""
    return (gone(reply) and asked.metadata.message_type not in LATER) or forgotten(reply)


def gone(reply: Message) -> bool:
    """Whether a node that was asked has left, or is taken for dead."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def forgotten(reply: Message) -> bool:
    """Whether a SuperLink says that it does not know, or no longer, what was asked."""
    return reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def _copy(message: Message, end: float | None, now: float) -> Message:
    about, ttl = message.metadata, None if end is None else end - now + 1.0
    kind, group = about.message_type, about.group_id
    return Message(message.content, dst_node_id=about.dst_node_id, message_type=kind, group_id=group, ttl=ttl)


class Traffic:
    """The messages of one round: bytes of the arrays in them, ``up`` by node and ``down`` in all, and the nodes whose
    answers did not come or were refused, as ``rejections``. ``clients``: how many users of each node are asked."""

    def __init__(self, grid: Grid, number: int, phase: str, timeout: float | None) -> None:
        self.grid, self.number, self.phase, self.timeout = grid, number, phase, timeout
        self.up, self.down, self.clients = dict[int, int](), 0, dict[int, int]()
        self._refused = dict[int, Rejection]()

    @property
    def rejections(self) -> list[Rejection]:
        return list(self._refused.values())

    def ask(self, message_type: str, contents: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict]]:
        """Send ``contents`` to nodes, and give what each of them answers, as it comes."""
        ttl = None if self.timeout is None else self.timeout + 1.0  # a node that is late need not work on this
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, group_id=str(self.number), ttl=ttl)
            for node, content in contents.items()
        ]
        self.down += sum(array_bytes(content) for content in contents.values())
        silent = set(contents)
        try:
            for node, answer in exchange(self.grid, messages, self.timeout):
                silent.discard(node)
                if answer.has_error():
                    self.refuse(node, *_failure(answer))
                elif answer.metadata.src_node_id != node:
                    self.refuse(node, f"it comes from node {answer.metadata.src_node_id}", "unasked")
                else:
                    self.up[node] = self.up.get(node, 0) + array_bytes(answer.content)
                    yield node, answer.content
        finally:
            for node in sorted(silent):
                self.refuse(node, "no reply before the round was closed", "late")

    def excuse(self, node: int) -> str:
        """Strike what was noted of a node, and return why it was."""
        noted = self._refused.pop(node, None)
        return "" if noted is None else noted.detail

    def refuse(self, node: int, why: str, reason: str = "refused") -> None:
        """Take note of a node whose answer cannot be used; ``reason`` is the kind of ``why``."""
        users = self.clients.get(node, 0)
        self._refused.setdefault(node, Rejection(node, self.number, self.phase, reason, why, users))


def _failure(answer: Message) -> tuple[str, str]:
    """What an error says, and its kind."""
    code, text = answer.error.code, answer.error.reason or ""
    kind, _, detail = text.partition(": ")
    return f"it failed with code {code}: {text}", kind if code == FAILED and detail else f"code {code}"


def _nothing(algorithm: Algorithm[Any, Any, Any], state: Any, spec: Spec) -> Aggregate:
    return Aggregate.empty(spec.n_items, algorithm.n_groups(state), device=spec.item_degrees.device)


def _placed(total: Aggregate, identities: Tensor | None) -> Aggregate:
    """An aggregate in which users are called by their places among ``identities`` [n]."""
    if identities is None:
        return total
    reporting, edges = total.report_users, total.edges
    if edges is not None:
        edges = torch.stack([edges[:, 0], torch.searchsorted(identities, edges[:, 1].contiguous()), edges[:, 2]], dim=1)
    if reporting is not None:
        reporting = torch.searchsorted(identities, reporting)
    return replace(total, report_users=reporting, edges=edges)


def _example(algorithm: Algorithm[Any, Any, Any], state: Any, phase: str, spec: Spec) -> Aggregate:
    """What a made-up user with one item would send: it has the fields, types and shapes of every reply."""
    user = torch.zeros(1, dtype=torch.int64, device=spec.item_degrees.device)
    attributes = torch.zeros(1, spec.n_user_attributes, device=user.device) if spec.n_user_attributes else None
    rows = Rows(user, torch.arange(2, device=user.device), user, user, attributes)
    client_state = algorithm.init_clients(rows, Key(0))
    broadcast = algorithm.broadcast(state, user)
    if getattr(broadcast, "tokens", user) is None:  # which the coordinator may not know
        broadcast = replace(broadcast, tokens=torch.arange(spec.n_items, device=user.device))
    update, _ = algorithm.client(phase, broadcast, rows, client_state, Key(0))
    return reduce(update, spec.n_items, algorithm.n_groups(state))  # noise is drawn on nodes, and slowly
