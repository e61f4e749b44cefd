"""Who takes part: the coordinator asks every node which users it hosts, and checks the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from secrets import randbits
from typing import Any, cast

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.counted import counted
from perfedrec.runtimes.flower.codec import UploadError, pack, unpack
from perfedrec.runtimes.flower.exchange import message_unknown, node_unavailable
from perfedrec.runtimes.flower.gate import tell
from perfedrec.runtimes.flower.rounds import Directory, Federation

MOST_USERS = 10_000_000
"""The most users that a node may host. It limits the memory that a node's answer can make the coordinator use."""


@dataclass
class Registration:
    """The nodes of a ``federation`` that were asked over a ``grid``, and the users that they host.

    ``known`` are the users [n] of a run that is continued: no other user can join it. ``service`` is the node of the
    neighbourhood service, where it is needed. ``refuse`` receives each node that is refused, and the reason. ``claim``
    receives the number of users that a node says it hosts, and may raise :class:`UploadError`.
    """

    grid: Grid
    federation: Federation[Any, Any, Any]
    known: Tensor | None
    service: int | None
    refuse: Callable[[int, UploadError], None]
    claim: Callable[[int, int], None] = lambda node, users: None
    users: dict[int, Tensor] = field(default_factory=dict)
    """By node the identities [h] of the users that it hosts."""

    taken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """The identities of all users that nodes host."""

    service_agrees: bool = False
    _asked: set[int] = field(default_factory=set)
    _waiting: dict[str, int] = field(default_factory=dict)

    def ask(self, present: set[int]) -> None:
        """Ask the nodes that are ``present`` and were not asked yet."""
        new = sorted(present - self._asked)
        if not new:
            return
        names = self.grid.push_messages([self._question(node) for node in new])
        sent = {name: node for name, node in zip(names, new, strict=True) if name}
        self._waiting |= sent
        self._asked |= set(sent.values())

    def read(self) -> None:
        """Read the answers that have come."""
        for reply in self.grid.pull_messages(self._waiting) if self._waiting else ():
            node = self._waiting.pop(reply.metadata.reply_to_message_id)
            if message_unknown(reply) or node_unavailable(reply):
                self._asked.discard(node)  # it is asked again once it is connected
                continue
            try:
                self._read(node, reply)
            except UploadError as error:
                self.refuse(node, error)
                if not reply.has_error():  # else the node has said so itself
                    tell(self.grid, node, f"this node is refused: {error}", self.federation.deadline)

    def directory(self) -> Directory:
        """Which node hosts which users."""
        identities = self.taken.sort().values if self.known is None else self.known
        hosts = {
            node: torch.searchsorted(identities, users.sort().values) for node, users in sorted(self.users.items())
        }
        return Directory(identities, hosts)

    def _read(self, node: int, reply: Message) -> None:
        if node == self.service:
            self.service_agrees = _agreement(reply)
        elif new := self._without_identity(reply):
            self.claim(node, new)  # before it is given that many identities
            (name,) = self.grid.push_messages([self._question(node, new)])
            self._waiting[name] = node
        else:
            users = self._hosted(reply)
            self.claim(node, users.numel())
            self.users[node] = users
            self.taken = torch.cat([self.taken, users])

    def _question(self, node: int, new: int = 0) -> Message:
        """The question which users a node hosts, with identities for a number of ``new`` users: random numbers of 62
        bits."""
        content = RecordDict()
        if self.federation.setup is not None:
            content["setup"] = self.federation.setup.record()
        if new:
            content["identities"] = pack({"identities": torch.tensor([randbits(62) for _ in range(new)])})
        return Message(content, dst_node_id=node, message_type="query")

    def _without_identity(self, reply: Message) -> int:
        """How many users of a node need an identity. In a run that is continued none does: they cannot join it."""
        if reply.has_error() or self.known is not None or "about" not in reply.content.config_records:
            return 0
        new = reply.content.config_records["about"].get("new")
        return new if isinstance(new, int) and 0 <= new <= MOST_USERS else 0

    def _hosted(self, reply: Message) -> Tensor:
        """[h] the users that a node hosts. Raises :class:`UploadError` with the reason where it is refused."""
        if reply.has_error():
            reason, _, detail = (reply.error.reason or "").partition(": ")
            raise UploadError(reason if detail else "failed", detail or reason)
        try:
            about = cast(Mapping[str, Any], reply.content.config_records["about"])
            users = unpack(reply.content.array_records["users"])["users"]
            items, attributes = int(about["items"]), int(about["attributes"])
        except (KeyError, TypeError, ValueError) as error:
            raise UploadError("malformed", f"its answer came without {error}") from None
        if users.dtype != torch.int64 or users.dim() != 1 or bool((users < 0).any()):
            raise UploadError("malformed", "users: expected a list of whole numbers from 0")
        wanted = self.federation.n_items, self.federation.n_user_attributes
        if (items, attributes) != wanted:
            expected = f"{counted(wanted[0], 'item')} and {counted(wanted[1], 'attribute')}"
            raise UploadError(
                "catalogue",
                f"it has {counted(items, 'item')} and {counted(attributes, 'user attribute')}; expected {expected}",
            )
        if users.unique().numel() != users.numel():
            raise UploadError("users", "it names a user twice; expected each user once")
        if count := int(torch.isin(users, self.taken).sum()):
            raise UploadError(
                "users",
                f"{counted(count, 'of its users is', 'of its users are')} hosted by another node; expected one node "
                "for each user",
            )
        return users if self.known is None else users[torch.isin(users, self.known)]


def _agreement(reply: Message) -> bool:
    """That the service agrees to the setup. Raises :class:`UploadError` with the reason where it does not."""
    if reply.has_error():
        raise UploadError("service", reply.error.reason or "the neighbourhood service failed")
    return True
