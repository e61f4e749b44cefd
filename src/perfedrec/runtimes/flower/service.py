"""The neighbourhood service as a node of its own in a deployment, and what nodes seal for it and read from it.

Users' protected vectors and edges leave a node sealed for the service. The coordinator passes them on
(:class:`~perfedrec.runtimes.flower.service_client.ServiceClient`), and passes back what the service publishes:
neighbour sums, a pre-trained table and the neighbourhood model by token, sealed for the nodes, which alone know what a
token stands for; pre-trained user vectors and the lists of the neighbourhood model, sealed for their users' node; and
in the clear the clustering, by which the coordinator keeps tables and selects cohorts, and the first length of user
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import Algorithm, B, ServedAlgorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Published, items_of
from perfedrec.runtimes.flower.codec import SERVING, Setup, Task, UploadError, check_alike, check_reports, pack, unpack
from perfedrec.runtimes.flower.sealing import Bundle, public_of, seal, unseal

SERVE, ORDER_TABLE = "train.serve", "train.name"
"""Types of messages: to the service, its part of a round; to a node, a table by token that it brings into the order of
items."""

BY_TOKEN = {"neighbours": 1, "low_rank": 0}
"""Tables that the service seals for all nodes, with the axis of their tokens."""

BY_USER = ("start", "near")
"""What the service seals for the node of a user."""

PRIVATE = ("report_users", "reports", "edges")
"""The fields of an aggregate that are for the service."""


def needs_service(algorithm: Algorithm[Any, Any, Any]) -> bool:
    """Whether a neighbourhood service has work to do: clients hand over vectors of their users, and the coordinator of
    the method does not need these."""
    return algorithm.needs_service


# --- a node ---


def for_coordinator(total: Aggregate) -> Aggregate:
    """An aggregate without what is for the service."""
    return replace(total, report_users=None, reports=None, edges=None)


def add_sealed(content: RecordDict, total: Aggregate, number: int, bundle: Bundle) -> RecordDict:
    """An answer to round ``number``: the ``content`` for the coordinator, and what is for the service in ``total``,
    sealed."""
    private = {name: value for name in PRIVATE if (value := getattr(total, name)) is not None}
    if private:
        private["key"] = torch.frombuffer(bytearray(public_of(bundle.own)), dtype=torch.uint8)
        content["private"] = seal(private, bundle.service, _purpose(number))
    return content


def add_private(task: Task[B], content: RecordDict, bundle: Bundle, n_items: int) -> Task[B]:
    """The task with what only a node knows or can read: tokens, neighbour sums, the neighbourhood model, and its users'
    pre-trained vectors and lists.

    Tokens are left out in the model that nodes recommend with.
    """
    tokens = bundle.tokens(n_items).to(task.users.device)
    known: dict[str, Tensor] = {} if task.phase == SERVING else {"tokens": tokens}
    for name, axis in BY_TOKEN.items():
        if name in content.array_records:
            table = unseal(content.array_records[name], bundle.common, name)[name]
            known[name] = table.to(tokens.device).index_select(axis, tokens)
    for name in BY_USER:
        if name in content.array_records:
            known |= _own_rows(unseal(content.array_records[name], bundle.own, name), task.users)
    if "near" in known:
        known["near"] = items_of(known["near"], tokens)
    broadcast = cast(Any, task.broadcast)
    names = {each.name for each in fields(broadcast)}
    return replace(
        task, broadcast=replace(broadcast, **{name: value for name, value in known.items() if name in names})
    )


def _own_rows(sealed: dict[str, Tensor], users: Tensor) -> dict[str, Tensor]:
    """The rows of ``users`` [B] in what the service sealed for their node. New users (negative numbers) have none: -1
    in whole numbers, 0 in others."""
    whose, wanted = sealed.pop("users"), users.cpu()
    places = torch.searchsorted(whose, wanted).clamp(max=whose.numel() - 1)
    if not torch.equal(whose[places][wanted >= 0], wanted[wanted >= 0]):
        raise PerfedrecError("pre-trained vectors or lists came for other users; expected those of the users asked")
    new = (wanted < 0)[:, None]
    rows = {name: table[places] for name, table in sealed.items()}
    return {
        name: each.masked_fill(new, 0.0 if each.is_floating_point() else -1).to(users.device)
        for name, each in rows.items()
    }


def order_table(message: Message, bundle: Bundle) -> Message:
    """A node's answer to a table by token: the table in the order of items."""
    table = unseal(message.content.array_records["table"], bundle.common, "table")["table"]
    return Message(RecordDict({"table": pack({"table": table[bundle.tokens(table.shape[0])]})}), reply_to=message)


def _purpose(number: int) -> str:
    return f"reports of round {number}"


# --- what the coordinator asks the service for ---


@dataclass(frozen=True)
class ServiceTask:
    """The service's part of a round.

    ``clients`` is the number of clients in the round's sum, and ``key`` that of the server's draws. ``sealed`` are the
    nodes' parts by node, and ``users`` by node the identities [h] of the users asked there with their places [h] among
    all users. ``centroids`` [K, d] are those from which clustering starts.
    """

    phase: str
    round: int
    clients: int
    key: Key
    n_users: int
    n_items: int
    sealed: Mapping[int, ArrayRecord]
    users: Mapping[int, tuple[Tensor, Tensor]]
    centroids: Tensor | None

    def content(self, setup: Setup | None) -> RecordDict:
        """The message to the service."""
        task: dict[str, str | int | list[int]] = {"phase": self.phase, "round": self.round, "clients": self.clients}
        task |= {"key": str(self.key.value), "n_users": self.n_users, "n_items": self.n_items}
        content = RecordDict({"task": ConfigRecord({**task, "nodes": list(self.sealed)})})
        content["centroids"] = pack({} if self.centroids is None else {"centroids": self.centroids})
        if setup is not None:
            content["setup"] = setup.record()
        for node, record in self.sealed.items():
            identities, places = self.users[node]
            content[f"private {node}"] = record
            content[f"users {node}"] = pack({"users": identities, "places": places})
        return content

    @staticmethod
    def read(content: RecordDict) -> ServiceTask:
        """The task in a message."""
        task: dict[str, Any] = dict(content.config_records["task"].items())
        sealed, users = dict[int, ArrayRecord](), dict[int, tuple[Tensor, Tensor]]()
        for node in task.pop("nodes"):
            found = unpack(content.array_records[f"users {node}"])
            sealed[node], users[node] = content.array_records[f"private {node}"], (found["users"], found["places"])
        centroids = unpack(content.array_records["centroids"]).get("centroids")
        key = Key(int(task.pop("key")))
        return ServiceTask(**task, key=key, sealed=sealed, users=users, centroids=centroids)


# --- the service ---


class StateStore(Protocol):
    """Where a service keeps its state of a run: at least the last states, each whole or not at all."""

    def get(self, run: str, played: int, like: Any) -> Any:
        """The state, a record like ``like``, after ``played`` rounds of a run; ``None`` where it was not kept."""

    def put(self, run: str, played: int, state: Any) -> None:
        """Keep a state, and delete those of other runs."""


@dataclass(frozen=True)
class _Member:
    """A node whose part was accepted: its public ``key``, its users' identities [h], and their ``places`` [h] among all
    users."""

    key: bytes
    users: Tensor
    places: Tensor


class NeighbourhoodService:
    """The service's state, and the ``ClientApp`` by which the coordinator asks it.

    ``private`` is its key, and ``clients`` the public key of all nodes. It has neither the tokens' key nor any item
    table of the coordinator. In a ``state_store`` it keeps its state of the ``run`` after each round, and plays the
    last round again where it is asked to.
    """

    def __init__(
        self,
        algorithm: ServedAlgorithm[Any, Any, Any],
        private: bytes,
        clients: bytes,
        state_store: StateStore | None = None,
        run: str = "",
    ) -> None:
        self.algorithm, self.private, self.clients = algorithm, private, clients
        self.state_store, self.run = state_store, run
        # The reports in the state have to last: users who are seldom asked do not send theirs again soon.
        self.state: Any = None
        self.played: int | None = None

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app = ClientApp()

        @app.train(SERVE.partition(".")[2])
        def serve(message: Message, context: Context) -> Message:
            return Message(self.answer(message.content), reply_to=message)

        return app

    def answer(self, content: RecordDict) -> RecordDict:
        """The service's part of a round. Raises :class:`PerfedrecError` where it cannot play that round."""
        task = ServiceTask.read(content)
        self._load(task.round, task.n_users)
        parts, members, refused = dict[str, list[Tensor]](), dict[int, _Member](), dict[str, str]()
        for node, record in task.sealed.items():
            users, places = task.users[node]
            try:
                private = unseal(record, self.private, _purpose(task.round))
                key = private.pop("key").numpy().tobytes()
                self._check(private, users, task.n_items)
            except (KeyError, PerfedrecError) as error:
                refused[str(node)] = f"{error.reason if isinstance(error, UploadError) else 'sealed'}: {error}"
                continue
            members[node] = _Member(key, users, places)
            for name, value in private.items():
                parts.setdefault(name, []).append(_by_place(name, value, members[node]))
        published = self._play(task, {name: torch.cat(values) for name, values in parts.items()})
        return self._reply(published, members, refused)

    def _play(self, task: ServiceTask, private: Mapping[str, Tensor]) -> Published:
        """Play the round with what all nodes have sent, and keep the state after it."""
        given: dict[str, Any] = dict(private)
        total = replace(Aggregate.empty(task.n_items, 1), clients=task.clients, **given)
        self.played = None  # until the next round's state is complete: this one may be changed in place
        self.state, published = self.algorithm.serve(
            self.state, task.phase, task.round + 1, total, task.centroids, task.key
        )
        if self.state_store is not None:
            self.state_store.put(self.run, task.round + 1, self.state)
        self.played = task.round + 1
        return published

    def _load(self, played: int, n_users: int) -> None:
        """Continue from the state after ``played`` rounds."""
        if self.state is not None and (self.state_store is None or self.played == played):
            return
        blank = self.algorithm.open_service(n_users)
        kept = None if self.state_store is None or not played else self.state_store.get(self.run, played, blank)
        if kept is None and played:
            raise PerfedrecError(
                f"the neighbourhood service was not in the first {counted(played, 'round')} of this run, or has "
                "lost its state; "
                "expected the folder that it had then"
            )
        self.state, self.played = blank if kept is None else kept, played

    def _check(self, private: Mapping[str, Tensor], users: Tensor, n_items: int) -> None:
        """Raises :class:`PerfedrecError` where a node's part cannot be that of these users."""
        wanted = {"report_users": users[:0], "reports": self.state.reports[:0], "edges": users.new_zeros(0, 3)}
        if not private.keys() >= {"report_users", "reports"}:
            raise PerfedrecError(f"expected reports and their users, got {sorted(private)}")
        check_alike(private, {name: wanted[name] for name in private if name in wanted})
        check_reports(private, users, n_items)

    def _reply(self, published: Published, members: Mapping[int, _Member], refused: Mapping[str, str]) -> RecordDict:
        """What is published, sealed for those who may read it, and the nodes that were refused."""
        content = RecordDict({"refused": ConfigRecord(dict(refused))})
        for name in (*BY_TOKEN, "table"):
            value = getattr(published, name)
            if value is not None:
                content[name] = seal({name: value}, self.clients, name)
        own: dict[str, dict[str, Tensor]] = {}
        if published.table is not None and self.state.start is not None:
            own["start"] = {"start": self.state.start}
        if published.low_rank is not None and self.state.near is not None:
            own["near"] = {"near": self.state.near, "nearness": self.state.nearness}
        for node, member in members.items():
            order = member.users.argsort()
            for name, tables in own.items():
                rows = {each: table[member.places[order]] for each, table in tables.items()}
                content[f"{name} {node}"] = seal({"users": member.users[order], **rows}, member.key, name)
        if published.user_init_scale is not None:
            content["scale"] = ConfigRecord({"user_init_scale": published.user_init_scale})
        if published.centroids is not None:
            found = {"labels": published.labels, "centroids": published.centroids}
            content["clusters"] = pack({name: each for name, each in found.items() if each is not None})
        return content


def _by_place(name: str, value: Tensor, member: _Member) -> Tensor:
    """One field of what a node has sent, with users by their places among all users instead of identities."""
    if name == "reports":
        return value
    order = member.users.argsort()
    named = value if name == "report_users" else value[:, 1]
    found = member.places[order][torch.searchsorted(member.users[order], named.contiguous())]
    return found if name == "report_users" else torch.stack([value[:, 0], found, value[:, 2]], dim=1)
