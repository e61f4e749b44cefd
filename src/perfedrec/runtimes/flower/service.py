"""The neighbourhood service as a node of its own in a deployment, and the other roles' dealings with it.

Users' protected vectors and edges leave a node sealed for the service. The coordinator passes them on
(:class:`ServiceClient`), and passes back what the service gives out: neighbour sums and a pre-trained table by token, sealed
for the nodes, which alone know what a token stands for; pre-trained user vectors, sealed for their users' node; and in
the clear the clustering, by which the coordinator keeps tables and selects cohorts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import Algorithm, ServedAlgorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Published
from perfedrec.runtimes.flower.codec import SERVING, Setup, Task, UploadError, check_alike, check_reports, pack, unpack
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.sealing import SEALED, Bundle, public_of, seal, unseal

SERVE, NAME = "train.serve", "train.name"
"""Types of messages: to the service, its part of a round; to a node, a table by token to be put in items' order."""

ATTEMPTS = 2
"""How often the service is asked for its part of a round: it may be restarted in the middle of it."""

_PRIVATE = ("report_users", "reports", "edges")
Ask = Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]]


def needed(algorithm: Algorithm[Any, Any, Any]) -> bool:
    """Whether a method has work for a neighbourhood service: its clients hand over vectors of their own, and its
    coordinator can do without these."""
    return algorithm.needs_service


# --- a node ---


def parted(content: RecordDict, total: Aggregate, number: int, bundle: Bundle) -> RecordDict:
    """An answer to round ``number`` in which what is for the service is sealed: ``content`` is that for the coordinator
    alone."""
    private = {name: value for name in _PRIVATE if (value := getattr(total, name)) is not None}
    if private:
        private["key"] = torch.frombuffer(bytearray(public_of(bundle.own)), dtype=torch.uint8)
        content["private"] = seal(private, bundle.service, f"reports of round {number}")
    return content


def for_coordinator(total: Aggregate) -> Aggregate:
    """An aggregate without what is for the service."""
    return replace(total, report_users=None, reports=None, edges=None)


def informed(task: Task, content: RecordDict, bundle: Bundle, n_items: int) -> Task:
    """The task with what only a node can read or knows: tokens, neighbour sums, and its users' pre-trained vectors.

    There are no tokens in what is to be recommended with.
    """
    tokens = bundle.tokens(n_items).to(task.users.device)
    known: dict[str, Tensor] = {} if task.phase == SERVING else {"tokens": tokens}
    if "neighbours" in content.array_records:
        sums = unseal(content.array_records["neighbours"], bundle.common, "neighbours")["neighbours"]
        known["neighbours"] = sums.to(tokens.device).index_select(1, tokens)
    if "start" in content.array_records:
        start = unseal(content.array_records["start"], bundle.own, "start")
        places = torch.searchsorted(start["users"], task.users.cpu())
        if not torch.equal(start["users"][places.clamp(max=start["users"].numel() - 1)], task.users.cpu()):
            raise PerfedrecError("pre-trained vectors came for other users than those asked")
        known["start"] = start["start"][places].to(tokens.device)
    names = {each.name for each in fields(task.broadcast)}
    return replace(
        task, broadcast=replace(task.broadcast, **{name: value for name, value in known.items() if name in names})
    )


def named(message: Message, bundle: Bundle) -> Message:
    """A node's answer to a table by token: the table in items' order."""
    table = unseal(message.content.array_records["table"], bundle.common, "table")["table"]
    return Message(RecordDict({"table": pack({"table": table[bundle.tokens(table.shape[0])]})}), reply_to=message)


# --- the service ---


class StateStore(Protocol):
    """Where a service keeps its state of a run: the last ones at least, each whole or not at all."""

    def get(self, run: str, played: int, like: Any) -> Any:
        """The state, a record like ``like``, after so many rounds of a run; ``None`` where it was not kept."""

    def put(self, run: str, played: int, state: Any) -> None:
        """Keep a state, and drop those of other runs."""


class NeighbourhoodService:
    """The service's state, and the ``ClientApp`` by which the coordinator asks it.

    ``private`` is its key, and ``clients`` the public key that all nodes have in common. It holds neither the tokens'
    key nor any item table of the coordinator's. With a ``shelf`` it keeps its state of the ``run`` there after each
    round, and plays the last round again where it is asked to.
    """

    def __init__(
        self,
        algorithm: ServedAlgorithm[Any, Any, Any],
        private: bytes,
        clients: bytes,
        shelf: StateStore | None = None,
        run: str = "",
    ) -> None:
        self.algorithm, self.private, self.clients, self.shelf, self.run = algorithm, private, clients, shelf, run
        self.state: Any = None  # a record, to be kept: reports of users who are seldom asked cannot be had again soon
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
        task: dict[str, Any] = dict(content.config_records["task"].items())
        self._stand_at(task["round"], task["n_users"])
        parts, keys, refused = dict[str, list[Tensor]](), dict[int, tuple[bytes, Tensor, Tensor]](), dict[str, Any]()
        for node in task["nodes"]:
            users = unpack(content.array_records[f"users {node}"])
            try:
                private = unseal(
                    content.array_records[f"private {node}"], self.private, f"reports of round {task['round']}"
                )
                key = private.pop("key").numpy().tobytes()
                self._check(private, users["users"], task["n_items"])
            except (KeyError, PerfedrecError) as error:
                refused[str(node)] = f"{error.reason if isinstance(error, UploadError) else 'sealed'}: {error}"
                continue
            keys[node] = (key, users["users"], users["places"])
            for name, value in private.items():
                parts.setdefault(name, []).append(_placed(name, value, users["users"], users["places"]))
        empty = Aggregate.empty(task["n_items"], 1)
        joined: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items()}
        centroids = unpack(content.array_records["centroids"]).get("centroids")
        self.played = None  # until the state, which may be changed in place, is that of the next round
        self.state, published = self.algorithm.serve(
            self.state,
            task["phase"],
            task["round"] + 1,
            replace(empty, clients=task["clients"], **joined),
            centroids,
            Key(int(task["key"])),
        )
        if self.shelf is not None:
            self.shelf.put(self.run, task["round"] + 1, self.state)
        self.played = task["round"] + 1
        return self._given_out(published, keys, refused)

    def _stand_at(self, played: int, n_users: int) -> None:
        """Take up the state after so many rounds."""
        if self.state is not None and (self.shelf is None or self.played == played):
            return
        blank = self.algorithm.open_service(n_users)
        kept = None if self.shelf is None or not played else self.shelf.get(self.run, played, blank)
        if kept is None and played:
            raise PerfedrecError(
                f"the neighbourhood service was not in the first {played} rounds of this run, or has lost its state; "
                "expected the folder that it had then"
            )
        self.state, self.played = blank if kept is None else kept, played

    def _check(self, private: Mapping[str, Tensor], users: Tensor, n_items: int) -> None:
        wanted = {"report_users": users[:0], "reports": self.state.reports[:0], "edges": users.new_zeros(0, 3)}
        if not private.keys() >= {"report_users", "reports"}:
            raise PerfedrecError(f"expected reports and their users, got {sorted(private)}")
        check_alike(private, {name: wanted[name] for name in private if name in wanted})
        check_reports(private, users, n_items)

    def _given_out(
        self, published: Published, keys: Mapping[int, tuple[bytes, Tensor, Tensor]], refused: Mapping[str, Any]
    ) -> RecordDict:
        content = RecordDict({"refused": ConfigRecord(dict(refused))})
        for name in ("neighbours", "table"):
            value = getattr(published, name)
            if value is not None:
                content[name] = seal({name: value}, self.clients, name)
        if published.table is not None and self.state.start is not None:
            for node, (key, users, places) in keys.items():
                order = users.argsort()
                own = {"users": users[order], "start": self.state.start[places[order]]}
                content[f"start {node}"] = seal(own, key, "start")
        if published.labels is not None and published.centroids is not None:
            content["clusters"] = pack({"labels": published.labels, "centroids": published.centroids})
        return content


def _placed(name: str, value: Tensor, users: Tensor, places: Tensor) -> Tensor:
    """Reports' users and edges with users by their places among all of them."""
    if name == "reports":
        return value
    order = users.argsort()
    named = value if name == "report_users" else value[:, 1]
    found = places[order][torch.searchsorted(users[order], named.contiguous())]
    return found if name == "report_users" else torch.stack([value[:, 0], found, value[:, 2]], dim=1)


# --- the coordinator ---


@dataclass
class ServiceClient:
    """The coordinator's dealings with the service, which is the node ``service``: what it passes on and back.

    ``neighbours`` are the sums that the service gave out last, and ``starts`` pre-trained vectors by node, all sealed.
    The latter are kept by the ``names`` of nodes, because a node with a new key is another one to Flower.
    """

    service: int
    neighbours: ArrayRecord | None = None
    starts: dict[str, ArrayRecord] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, as bytes that are kept with the coordinator's state."""
        held = {f"start {name}": record for name, record in self.starts.items()}
        if self.neighbours is not None:
            held["neighbours"] = self.neighbours
        return {name: unpack(record)[SEALED] for name, record in held.items()}

    @staticmethod
    def of(service: int, tensors: Mapping[str, Tensor], names: Mapping[int, str] | None = None) -> ServiceClient:
        """The mediator that held these ``tensors``; ``names`` are those of the nodes by now."""
        held = {name: pack({SEALED: tensor}) for name, tensor in tensors.items()}
        starts = {name.partition(" ")[2]: record for name, record in held.items() if name.startswith("start ")}
        return ServiceClient(service, held.get("neighbours"), starts, names or {})

    def add(self, node: int, content: RecordDict, serving: bool = False) -> RecordDict:
        """An instruction with what the service has given out for the ``node``; ``serving``: to recommend with."""
        if self.neighbours is not None:
            content["neighbours"] = self.neighbours
        if (name := self._name(node)) in self.starts and not serving:
            content["start"] = self.starts[name]
        return content

    def consult(
        self,
        ask: Ask,
        task: Mapping[str, Any],
        private: Mapping[int, ArrayRecord],
        users: Mapping[int, tuple[Tensor, Tensor]],
        centroids: Tensor | None,
        table: Tensor,
        setup: Setup | None = None,
    ) -> tuple[Published, dict[int, str]]:
        """Have the service play its part of a round: what the coordinator learns of it, and the nodes it refused.

        ``private`` are the nodes' sealed parts, ``users`` by node who was asked there, by the node's names and by
        their places, and ``table`` is one of the sizes of a pre-trained table. Raises
        :class:`~perfedrec.runtimes.flower.connection.AwayError` where the service does not answer.
        """
        content = RecordDict({"task": ConfigRecord({**task, "nodes": list(private)})})
        content["centroids"] = pack({} if centroids is None else {"centroids": centroids})
        if setup is not None:
            content["setup"] = setup.record()
        for node, record in private.items():
            names, places = users[node]
            content[f"private {node}"], content[f"users {node}"] = record, pack({"users": names, "places": places})
        for _ in range(ATTEMPTS):
            if answers := dict(ask(SERVE, {self.service: content})):
                break
        else:
            raise AwayError(f"the neighbourhood service, node {self.service}, does not answer")
        answer = answers[self.service]
        arrays = answer.array_records
        self.neighbours = arrays.get("neighbours", self.neighbours)
        self.starts |= {self._name(node): arrays[f"start {node}"] for node in private if f"start {node}" in arrays}
        published = Published()
        if "clusters" in arrays:
            published = replace(published, **unpack(arrays["clusters"], table.device))
        if "table" in arrays:
            published = replace(published, table=self._named(ask, arrays["table"], list(private), table))
        refused = {int(node): str(why) for node, why in answer.config_records["refused"].items()}
        return published, refused

    def _name(self, node: int) -> str:
        return self.names.get(node, str(node))

    @staticmethod
    def _named(ask: Ask, sealed: ArrayRecord, nodes: list[int], like: Tensor) -> Tensor:
        """The table in items' order, by the first node that can tell."""
        for node in nodes:
            for _, content in ask(NAME, {node: RecordDict({"table": sealed})}):
                table = unpack(content.array_records.get("table", ArrayRecord()), like.device).get("table")
                if table is not None and table.shape == like.shape and bool(table.isfinite().all()):
                    return table
        raise PerfedrecError("no node put the pre-trained table in the order of items")
