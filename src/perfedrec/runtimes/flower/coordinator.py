"""The coordinator of a deployment: who is there, rounds with them, and what they recommend with afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from secrets import randbits
from typing import Any, cast

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.aggregate import from_fixed
from perfedrec.core.algorithm import Algorithm, ServedAlgorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Plan, RoundReport, Spec
from perfedrec.runtimes.flower.codec import SERVING, BroadcastLayout, Instructions, Setup, UploadError, pack, unpack
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.rounds import POLL, Rejection, Traffic, exchange, forgotten, gather, gone, play_round
from perfedrec.runtimes.flower.service import ServiceClient

MOST_USERS = 10_000_000
"""Users that a node may host: a bound on what a node's word can make the coordinator do."""


@dataclass
class Directory:
    """Who hosts whom: ``identities`` [n] of all users, ascending, and by node the places [h] of its users in it."""

    identities: Tensor
    hosts: dict[int, Tensor]


@dataclass
class Coordinator:
    """Plays rounds of ``algorithm`` over a ``grid`` with the nodes that agree to ``setup``.

    ``seed`` serves selection and the server's steps; ``deadline`` is in seconds a round, and ``enough`` the share of
    the clients asked after whose answers a round is closed. Nodes that a round went on without are in ``rejected``.
    """

    grid: Grid
    algorithm: Algorithm[Any, Any, Any]
    setup: Setup
    n_items: int
    seed: int
    deadline: float = 60.0
    enough: float = 1.0
    item_attributes: Tensor | None = None
    rejected: list[Rejection] = field(default_factory=list)
    n_user_attributes: int = 0
    directory: Directory | None = None
    names: Mapping[int, str] | None = None
    """Nodes that may take part, and what they are called (``None``: all). Whoever can reach a SuperLink's control API
    can register others."""

    known: Tensor | None = None
    """Users [n] of a run that goes on: nobody joins it, and those who are away are away."""
    service: int | None = None
    """The node that is registered as the neighbourhood service: it hosts nobody."""
    service_client: ServiceClient | None = None
    """The dealings with that service, where the method needs one: without, the coordinator is the service as well."""
    present: frozenset[int] = frozenset()
    """Nodes that were connected when it last looked: while it waits for them, and at the start of a round."""

    def assemble(
        self,
        min_nodes: int,
        min_users: int,
        seconds: float,
        tell: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Directory:
        """Wait for so many nodes and users, and for the service. ``tell`` is told what changes, in one line.

        A node that hosts a user of another one is refused. Raises
        :class:`~perfedrec.runtimes.flower.connection.AwayError` after ``seconds``, and once ``stopped``.
        """
        end, asked, claimed = time.monotonic() + seconds, dict[str, int](), dict[int, Tensor]()
        taken, known, line = torch.zeros(0, dtype=torch.int64), set[int](), ""
        served = self.service_client is None
        while True:
            present = self._present()
            new = sorted(present - known)
            if new:
                names = self.grid.push_messages([self._hello(node) for node in new])
                sent = {name: node for name, node in zip(names, new, strict=True) if name}
                asked |= sent
                known |= set(sent.values())
            for reply in self.grid.pull_messages(asked) if asked else ():
                node = asked.pop(reply.metadata.reply_to_message_id)
                if forgotten(reply) or gone(reply):
                    known.discard(node)  # to be asked again once it is there
                    continue
                try:
                    if node == self.service:
                        served = self._serves(reply)
                        continue
                    if nameless := self._nameless(reply):
                        (name,) = self.grid.push_messages([self._hello(node, nameless)])
                        asked[name] = node
                        continue
                    users = self._presented(reply, taken)
                    claimed[node], taken = users, torch.cat([taken, users])
                except UploadError as error:
                    self._refuse(node, error)
                    tell(f"node {node if self.names is None else self.names[node]} is refused: {error}")
            here = {node: users for node, users in claimed.items() if node in present}
            count = sum(users.numel() for users in here.values())
            news = f"{len(here)} of {min_nodes} nodes and {count} of {min_users} users are present"
            news += "" if served else ", and the neighbourhood service is not"
            if news != line:
                tell(line := news)
            if len(here) >= min_nodes and count >= min_users and served:
                break
            if stopped() or time.monotonic() > end:
                raise AwayError(f"gave up waiting: {news}")
            time.sleep(4 * POLL)
        identities = taken.sort().values if self.known is None else self.known
        hosts = {node: torch.searchsorted(identities, users.sort().values) for node, users in sorted(claimed.items())}
        self.directory = Directory(identities, hosts)
        return self.directory

    def _present(self) -> set[int]:
        present = set(self.grid.get_node_ids())
        if self.service_client is None:  # there is nothing to say to a service
            present -= {self.service}
        self.present = frozenset(present if self.names is None else present & self.names.keys())
        return set(self.present)

    def blank(self) -> Any:
        """A state of the right kind and sizes, in which a stored one finds its types."""
        return self._start(torch.ones(self.n_items))

    def begin(self) -> Any:
        """The state before the first round. Where the method needs item degrees and clients do not release them as a
        phase of their own, the nodes are asked for them: a secure sum, whatever the method's other sums are, unless
        there is one node alone. Raises :class:`PerfedrecError` where none answers, or too few for a secure sum."""
        assert self.directory is not None
        spec, state = self._spec(torch.ones(self.n_items)), self.blank()
        if not self.algorithm.needs_degrees:
            return state
        plan = Plan("degrees", torch.arange(self.directory.identities.numel()))
        traffic = Traffic(self.grid, -1, plan.phase, self.deadline)
        start = replace(state, round=-1)  # before the first round, which nodes answer once
        total = gather(
            traffic,
            self.algorithm,
            start,
            plan,
            spec,
            self.directory.hosts,
            self._layout,
            self.setup,
            self.directory.identities,
            secure=sum(users.numel() > 0 for users in self.directory.hosts.values()) > 1,
        )
        self.rejected += traffic.rejections
        if not total.clients:
            why = "; ".join(dict.fromkeys(each.detail for each in traffic.rejections))
            raise PerfedrecError(f"no node has told its users' item degrees: {why}")
        degrees = torch.zeros(self.n_items).index_copy_(0, total.keys, from_fixed(total.sums).squeeze(1))
        return self._start(degrees)

    def _start(self, degrees: Tensor) -> Any:
        """The first state; tokens are not the coordinator's where there is a service."""
        state = self.algorithm.init(self._spec(degrees), Key(self.seed).fold("init"))
        return (
            state
            if self.service_client is None
            else cast(ServedAlgorithm[Any, Any, Any], self.algorithm).without_tokens(state)
        )

    def play(self, state: Any) -> tuple[Any, RoundReport]:
        """Play the next round with the nodes that are there."""
        assert self.directory is not None
        present = self._present()
        for node in self.directory.hosts.keys() - present:
            self.rejected.append(Rejection(node, state.round, "", "away", "it is not connected", 0))
        return play_round(
            self.grid,
            self.algorithm,
            state,
            self._spec(torch.ones(self.n_items)),
            {node: users for node, users in self.directory.hosts.items() if node in present},
            self._layout,
            self.seed,
            self.deadline,
            self.service_client,
            setup=self.setup,
            identities=self.directory.identities,
            enough=self.enough,
            rejected=self.rejected,
        )

    def hand_out(self, state: Any) -> list[int]:
        """Give every node that is there what its users recommend with, and the nodes that took it."""
        assert self.directory is not None
        present = self._present()
        state, newcomer = self.algorithm.serving(state), torch.tensor([NEWCOMER])
        instructions = Instructions(
            self.algorithm, state, SERVING, 0, self._layout, self.setup, self.directory.identities, serving=True
        )
        contents = {
            node: instructions.content(torch.cat([users, newcomer]))
            for node, users in self.directory.hosts.items()
            if node in present
        }
        if self.service_client is not None:
            contents = {node: self.service_client.add(node, each, serving=True) for node, each in contents.items()}
        messages = [
            Message(content, dst_node_id=node, message_type="query.model") for node, content in contents.items()
        ]
        return sorted(node for node, reply in exchange(self.grid, messages, self.deadline) if not reply.has_error())

    @property
    def _layout(self) -> BroadcastLayout:
        return BroadcastLayout.of(self.algorithm)

    def _spec(self, degrees: Tensor) -> Spec:
        assert self.directory is not None
        users = self.directory.identities.numel()
        return Spec(users, self.n_items, degrees, self.n_user_attributes, self.item_attributes)

    def _hello(self, node: int, new: int = 0) -> Message:
        """A question who is there, with identities for so many ``new`` users: numbers of 62 bits that nobody has."""
        content = RecordDict({"setup": self.setup.record()})
        if new:
            content["identities"] = pack({"identities": torch.tensor([randbits(62) for _ in range(new)])})
        return Message(content, dst_node_id=node, message_type="query")

    @staticmethod
    def _serves(reply: Message) -> bool:
        """Whether the service agrees. Raises :class:`UploadError` with the reason why it does not."""
        if reply.has_error():
            raise UploadError("service", reply.error.reason or "the neighbourhood service failed")
        return True

    def _nameless(self, reply: Message) -> int:
        """How many users of a node need identities; none do in a run that goes on, which they cannot join."""
        if reply.has_error() or self.known is not None or "about" not in reply.content.config_records:
            return 0
        new = reply.content.config_records["about"].get("new")
        return new if isinstance(new, int) and 0 <= new <= MOST_USERS else 0

    def _presented(self, reply: Message, taken: Tensor) -> Tensor:
        """[h] the users that a node hosts. Raises :class:`UploadError` with the reason why it cannot be taken."""
        if reply.has_error():
            reason, _, detail = (reply.error.reason or "").partition(": ")
            raise UploadError(reason if detail else "failed", detail or reason)
        try:
            about = reply.content.config_records["about"]
            users = unpack(reply.content.array_records["users"])["users"]
            items, attributes = int(about["items"]), int(about["attributes"])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise UploadError("malformed", f"its answer came without {error}") from None
        if users.dtype != torch.int64 or users.dim() != 1 or bool((users < 0).any()):
            raise UploadError("malformed", "users: expected a list of whole numbers from 0")
        if items != self.n_items or attributes != self.n_user_attributes:
            expected = f"{self.n_items} items and {self.n_user_attributes} attributes"
            raise UploadError(
                "catalogue", f"it has {items} items and {attributes} user attributes; expected {expected}"
            )
        if users.unique().numel() != users.numel():
            raise UploadError("users", "it names a user twice")
        if bool(torch.isin(users, taken).any()):
            count = int(torch.isin(users, taken).sum())
            raise UploadError("users", f"{count} of its users are hosted by another node")
        return users if self.known is None else users[torch.isin(users, self.known)]

    def _refuse(self, node: int, error: UploadError) -> None:
        self.rejected.append(Rejection(node, -1, "registration", error.reason, str(error), 0))
