"""The coordinator's side of a round, over any Flower grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Generic, cast

import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, check_aggregator, reduce
from perfedrec.core.algorithm import Algorithm, B, C, S, ServedAlgorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.robust import group_numbers
from perfedrec.core.types import Plan, Published, RoundReport, Rows, Spec
from perfedrec.runtimes.flower.codec import Instructions, Setup, UploadError, read_reply
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.exchange import Rejection, Traffic
from perfedrec.runtimes.flower.secagg import AbortedError
from perfedrec.runtimes.flower.secure_sum import secure_sum
from perfedrec.runtimes.flower.service import ServiceTask, for_coordinator
from perfedrec.runtimes.flower.service_client import ServiceClient
from perfedrec.runtimes.round import groups_key, round_key


@dataclass(frozen=True)
class Federation(Generic[S, B, C]):
    """What stays the same in all rounds of a run, whichever nodes take part.

    ``setup`` is what nodes have to agree to. ``seed`` is that of the selection of clients and of the server's steps. A
    round is closed after ``deadline`` seconds, or once the share ``enough`` of the clients that were asked has
    answered. ``service_client`` asks the neighbourhood service; without it the coordinator is the service as well.
    ``witness`` receives what was opened in each round: the state before it, who took part, and the sum. ``keeper``
    receives each part of a sum in the clear: the number of the round, the node, the identities [b] of its users who
    were asked, and the part, with users by their places.
    """

    algorithm: Algorithm[S, B, C]
    n_items: int
    seed: int
    setup: Setup | None = None
    deadline: float = 60.0
    enough: float = 1.0
    item_attributes: Tensor | None = None
    n_user_attributes: int = 0
    service_client: ServiceClient | None = None
    witness: Callable[[S, Plan, Aggregate], None] | None = None
    keeper: Callable[[int, int, Tensor, Aggregate], None] | None = None

    def first(self, n_users: int, degrees: Tensor) -> S:
        """The state before the first round, for a number of users, with the items' ``degrees`` [m]."""
        return self.algorithm.init(self.spec(n_users, degrees), Key(self.seed).fold("init"))

    def spec(self, n_users: int, degrees: Tensor) -> Spec:
        """The sizes of a model for a number of users, with the items' ``degrees`` [m]."""
        return Spec(n_users, self.n_items, degrees, self.n_user_attributes, self.item_attributes)

    @property
    def served_algorithm(self) -> ServedAlgorithm[S, B, C]:
        """The method, where it has a neighbourhood service."""
        return cast(ServedAlgorithm[S, B, C], self.algorithm)


@dataclass(frozen=True)
class Directory:
    """Which node hosts which users: the ``identities`` [n] of all users, ascending, and by node the places [h] of its
    users among them. Users whom no node hosts do not take part."""

    identities: Tensor
    hosts: Mapping[int, Tensor]


@dataclass(frozen=True)
class Seen:
    """What the coordinator saw of one sum of a round: that of a node or, where only sums over several are opened, of
    these ``nodes``. ``clients`` are in it; ``norm`` is its L2 norm, all tables together, and ``rows`` the number of its
    rows."""

    nodes: tuple[int, ...]
    round: int
    phase: str
    clients: int
    norm: float
    rows: int


def play_round(
    grid: Grid,
    federation: Federation[S, B, C],
    directory: Directory,
    state: S,
    rejected: list[Rejection] | None = None,
    seen: list[Seen] | None = None,
) -> tuple[S, RoundReport]:
    """Play the next round with the nodes of the ``directory``, and return the new state and a report.

    In the report, bytes are those of the arrays in the messages, the largest upload is that of a node, and there is no
    loss, because losses do not leave the nodes. With a neighbourhood service on a node of its own, ``state`` has
    neither tokens nor reports. Where clients contribute only to sums, the service has nothing to do and is not asked.

    Where sums are secure (:func:`~perfedrec.runtimes.flower.secure_sum.secure_sum`) nodes may drop out. If the sum of a
    training round is aborted, the round has no clients; in a phase before training
    :class:`~perfedrec.runtimes.flower.secagg.AbortedError` is raised, and the phase can be played again.

    A node may fail, or not answer before the deadline, or give an answer that cannot be part of the sum. With a list
    ``rejected`` such nodes are appended to it, their users count as dropped out, and the round continues without them.
    Without that list, and where sums are not secure, :class:`PerfedrecError` is raised, which names the node. After an
    error the given state is unchanged, but the nodes that played the round remember it. What was seen of single sums is
    appended to the list ``seen``; under secure aggregation these are the sums of groups, if there are groups.
    """
    played = Round(grid, federation, directory, state)
    try:
        return played.play(rejected)
    finally:
        if seen is not None:
            seen += played.seen


class Round(Generic[S, B, C]):
    """One round of a ``federation``, from a ``state``, with the nodes of a ``directory``; ``plan`` is by default the
    method's."""

    def __init__(
        self,
        grid: Grid,
        federation: Federation[S, B, C],
        directory: Directory,
        state: S,
        plan: Plan | None = None,
    ) -> None:
        self.federation, self.algorithm, self.state = federation, federation.algorithm, state
        self.identities, self.key = directory.identities, round_key(federation.seed, state.round)
        self.plan = self.algorithm.plan(state, self.key.fold("plan")) if plan is None else plan
        self.service_client = None if self.algorithm.protection.sums else federation.service_client
        members = {node: self.plan.cohort[torch.isin(self.plan.cohort, all_)] for node, all_ in directory.hosts.items()}
        self.asked = {node: users for node, users in members.items() if users.numel()}
        clients = {node: users.numel() for node, users in self.asked.items()}
        self.traffic = Traffic(grid, state.round, self.plan.phase, federation.deadline, clients)
        self.sealed = dict[int, ArrayRecord]()  # by node, what its answer has for the service
        self.seen = list[Seen]()

    def play(self, rejected: list[Rejection] | None = None) -> tuple[S, RoundReport]:
        """The whole round: see :func:`play_round`."""
        aggregate, aborted = self._aggregate()
        if self.federation.witness is not None and aggregate.clients:
            self.federation.witness(self.state, replace(self.plan, cohort=self._present(aggregate)), aggregate)
        if rejected is None and not self.algorithm.protection.secure:
            self._raise_first_rejection()
        if self.service_client is None:
            state = self.algorithm.server(self.state, self.plan.phase, aggregate, self.key.fold("server"))
        else:
            published, refused = self._consult(self.service_client, aggregate)
            self._note_refused(refused, rejected is None)
            state = self.federation.served_algorithm.coordinate(
                self.state, self.plan.phase, aggregate, published, self.key.fold("server")
            )
        if rejected is not None:
            rejected += self.traffic.rejections
        return state, self._report(aggregate, aborted)

    # --- the aggregate ---

    def collect(self, secure: bool = False) -> Aggregate:
        """The aggregate of what the nodes answer. It is a secure sum where the method or ``secure`` says so; otherwise
        the method's aggregator combines the answers, each of which is one part."""
        check_aggregator(self.algorithm.aggregator, self.algorithm.protection.secure)
        instructions = self._instructions()
        if self.algorithm.protection.secure:
            return self._secure_sum(instructions)
        if secure:
            return self._sum_of(instructions, self.plan.cohort.numel(), "")
        return self.algorithm.aggregator.combine(self.plan.phase, self._parts(instructions), self._empty())

    def _aggregate(self) -> tuple[Aggregate, str | None]:
        """The aggregate of the round, which is empty where too few clients answered; and the reason where a secure sum
        was aborted."""
        try:
            aggregate = self.collect()
        except AbortedError as error:
            if self.plan.phase != "train":
                raise
            return self._empty(), str(error)
        too_few = self.algorithm.protection.aborted(self.plan.phase, aggregate.clients, self.plan.cohort.numel())
        return self._empty() if too_few else aggregate, None

    def _instructions(self) -> dict[int, RecordDict]:
        """The message for each node."""
        made = Instructions(
            self.algorithm,
            self.state,
            self.plan.phase,
            self.plan.cohort.numel(),
            self.identities,
            self.federation.setup,
        )
        contents = {node: made.content(users) for node, users in self.asked.items()}
        if self.service_client is not None:
            contents = {node: self.service_client.add(node, content) for node, content in contents.items()}
        return contents

    def _secure_sum(self, instructions: Mapping[int, RecordDict]) -> Aggregate:
        """The secure sum over all nodes or, where the cohort is split into groups, what the method's aggregator makes
        of the sums of groups of nodes. The nodes of a group that is aborted are refused."""
        number = self.algorithm.protection.n_groups(self.plan.phase, self.plan.cohort.numel())
        if number == 1:
            return self._sum_of(instructions, self.plan.cohort.numel(), "")
        sums, reason = list[Aggregate](), "no group has an answer"
        for each, nodes in enumerate(self._groups(number)):
            asked = sum(self.asked[node].numel() for node in nodes)
            try:
                found = self._sum_of({node: instructions[node] for node in nodes}, asked, f" {each}")
                self.note(tuple(nodes), found)
                sums.append(found)
            except AbortedError as error:
                reason = str(error)
                for node in nodes:
                    self.traffic.refuse(node, reason, "aborted")
        if not sums:
            raise AbortedError("masked", reason)
        return self.algorithm.aggregator.combine(self.plan.phase, sums, self._empty())

    def _groups(self, number: int) -> list[list[int]]:
        """The nodes of each of a ``number`` of groups. A node with several users is in one group with all of them: its
        place is that of its first user in the simulator's draw."""
        nodes = sorted(self.asked, key=lambda node: int(self.asked[node].min()))
        firsts = torch.stack([self.asked[node].min() for node in nodes])
        sizes = torch.tensor([self.asked[node].numel() for node in nodes], device=firsts.device)
        key = groups_key(self.algorithm, self.plan.phase, self.federation.seed, self.key)
        numbers = group_numbers(sizes, key.spread(firsts), number).tolist()
        return [[node for node, own in zip(nodes, numbers, strict=True) if own == each] for each in range(number)]

    def _sum_of(self, instructions: Mapping[int, RecordDict], asked: int, group: str) -> Aggregate:
        """The secure sum over the nodes that ``instructions`` are for, with ``asked`` clients."""
        least = self.algorithm.protection.least_clients(self.plan.phase, asked)
        setup, traffic = self.federation.setup, self.traffic
        label = f"{'' if setup is None else setup.run} {self.state.round}{group}"
        clients = {node: traffic.clients[node] for node in instructions}
        return secure_sum(traffic.ask, traffic.refuse, instructions, clients, self._example(), least, label)

    def _parts(self, instructions: Mapping[int, RecordDict]) -> Iterator[Aggregate]:
        """The nodes' answers as they come, until enough clients have answered."""
        example, clients = self._example(), 0
        with closing(self.traffic.ask("train", instructions)) as answers:
            for node, content in answers:
                if (part := self._read(node, content, example)) is not None:
                    clients += part.clients
                    if self.federation.keeper is not None:
                        self.federation.keeper(self.state.round, node, self.identities[self.asked[node]], part)
                    yield part
                if clients >= ceil(self.federation.enough * self.plan.cohort.numel()):
                    return

    def _read(self, node: int, content: RecordDict, example: Aggregate) -> Aggregate | None:
        """The sum in an answer, with users by their places; ``None`` where it is refused."""
        sealed = None if self.service_client is None else content.array_records.get("private")
        if sealed is not None:
            del content["private"]
        try:
            part = read_reply(content, self.identities[self.asked[node]], example)
        except UploadError as error:
            self.traffic.refuse(node, str(error), error.reason)
            return None
        if sealed is not None:
            self.sealed[node] = sealed
        self.note((node,), part)
        return _by_place(self.algorithm.protection.hold_sum(self.plan.phase, part), self.identities)

    def note(self, nodes: tuple[int, ...], part: Aggregate) -> None:
        """Note what is seen of a sum over some ``nodes``: of one in the clear, of several where such a sum is
        opened; nodes whose answers were refused are not in it."""
        gone = {each.node for each in self.traffic.rejections}
        nodes = tuple(node for node in nodes if node not in gone)
        dense = 0.0 if part.dense is None else float(part.dense.square().sum())
        norm = (float(part.sums.square().sum()) + dense) ** 0.5 / FIXED_POINT
        self.seen.append(Seen(nodes, self.state.round, self.plan.phase, part.clients, norm, part.keys.numel()))

    def _present(self, aggregate: Aggregate) -> Tensor:
        """The users who are in the sum: those of all nodes that were not rejected."""
        gone = {each.node for each in self.traffic.rejections}
        users = torch.cat([users for node, users in self.asked.items() if node not in gone] or [self.plan.cohort[:0]])
        return users if users.numel() == aggregate.clients else self.plan.cohort

    def _empty(self) -> Aggregate:
        return Aggregate.empty(
            self.federation.n_items, self.algorithm.n_groups(self.state), device=self.identities.device
        )

    def _example(self) -> Aggregate:
        """What an invented user with one item would hand over: it has the fields, types and shapes of every answer."""
        user = torch.zeros(1, dtype=torch.int64, device=self.identities.device)
        n_attributes, n_items = self.federation.n_user_attributes, self.federation.n_items
        attributes = torch.zeros(1, n_attributes, device=user.device) if n_attributes else None
        rows = Rows(user, torch.arange(2, device=user.device), user, user, attributes)
        client_state = self.algorithm.init_clients(rows, Key(0))
        broadcast: Any = self.algorithm.broadcast(self.state, user)
        if getattr(broadcast, "tokens", user) is None:  # the coordinator may not know them
            broadcast = replace(broadcast, tokens=torch.arange(n_items, device=user.device))
        update, _ = self.algorithm.client(self.plan.phase, broadcast, rows, client_state, Key(0))
        # Noise is left out: it changes no shape, and is slow to draw.
        total = reduce(update, n_items, self.algorithm.n_groups(self.state))
        total = self.algorithm.compress(broadcast, self.plan.phase, total)
        return total if self.service_client is None else for_coordinator(total)

    # --- the service ---

    def _consult(self, client: ServiceClient, aggregate: Aggregate) -> tuple[Published, dict[int, str]]:
        """The service's part of the round: what it published, and the nodes that it refused."""
        asked = {node: self.asked[node].sort().values for node in self.sealed}
        task = ServiceTask(
            phase=self.plan.phase,
            round=self.state.round,
            clients=aggregate.clients,
            key=self.key.fold("server"),
            n_users=self.identities.numel(),
            n_items=self.federation.n_items,
            sealed=self.sealed,
            users={node: (self.identities[places], places) for node, places in asked.items()},
            centroids=self.federation.served_algorithm.centroids(self.state),
        )
        try:
            answer = client.consult(self.traffic.ask, task, self.state.items, self.federation.setup)
        except PerfedrecError as error:
            kind = AwayError if isinstance(error, AwayError) else PerfedrecError
            why = self.traffic.withdraw(client.service)
            raise kind(f"{self._name()}: {error}{why and f': {why}'}") from error
        self.traffic.withdraw(client.service)  # it was asked again, and has answered
        return answer

    def _note_refused(self, refused: Mapping[int, str], strict: bool) -> None:
        """Note the nodes whose parts the service refused; ``strict``: raise an error for the first."""
        for node, why in refused.items():
            if strict:
                raise PerfedrecError(f"{self._name()}, reply of node {node} to the service: {why}")
            reason, _, detail = why.partition(": ")
            self.traffic.refuse(node, detail, reason)

    # --- the report ---

    def _report(self, aggregate: Aggregate, aborted: str | None) -> RoundReport:
        return RoundReport(
            round=self.state.round,
            phase=self.plan.phase,
            cohort=self.plan.cohort.numel(),
            clients=aggregate.clients,
            loss=None,
            bytes_up=sum(self.traffic.up.values()),
            bytes_up_max=max(self.traffic.up.values(), default=0),
            bytes_down=self.traffic.down,
            aborted=aborted,
        )

    def _raise_first_rejection(self) -> None:
        for each in self.traffic.rejections:
            raise PerfedrecError(f"{self._name()}, reply of node {each.node}: {each.detail}")

    def _name(self) -> str:
        return f"round {self.state.round} ({self.plan.phase})"


def _by_place(total: Aggregate, identities: Tensor) -> Aggregate:
    """An aggregate with users by their places among ``identities`` [n]."""
    reporting, edges = total.report_users, total.edges
    if edges is not None:
        edges = torch.stack([edges[:, 0], torch.searchsorted(identities, edges[:, 1].contiguous()), edges[:, 2]], dim=1)
    if reporting is not None:
        reporting = torch.searchsorted(identities, reporting)
    return replace(total, report_users=reporting, edges=edges)
