"""Who may take part, and how much of it: limits for each key, nodes that are new, and what the operator has decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from torch import Tensor

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError
from perfedrec.federation.bundles import SERVICE
from perfedrec.federation.members import EXCLUDED, MEMBER, NEW, Known, Register, waiting
from perfedrec.runtimes.flower import Apart, Rates, UploadError

FEW = 10
"""Users from which on growth is looked at: a node of a family may go from one to ten."""


@dataclass(frozen=True)
class Limits:
    """What one node, which is one key, may do.

    ``max_users``: the most users that it may claim (``None``: any number). ``max_growth``: a node that claims more than
    this many times the users that it had in an earlier run is held until the operator admits it (0: it is not).
    ``quarantine``: rounds in which a node that is new to the federation is connected before what it sends counts; in
    the first run of a federation no node is new. ``max_joins``, ``max_requests`` and ``max_megabytes`` are what it may
    do in a minute: connect, send requests to the SuperLink, and send bytes.

    Raises :class:`ConfigError` for a value that is not possible.
    """

    max_users: int | None = None
    max_growth: float = 10.0
    quarantine: int = 0
    max_joins: int = 30
    max_requests: int = 6_000
    max_megabytes: int = 4_096

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_users", self.max_users is None or self.max_users > 0, "at least 1"),
            ("max_growth", self.max_growth == 0 or self.max_growth >= 1, "at least 1, or 0 for no limit"),
            ("quarantine", self.quarantine >= 0, "0 rounds or more"),
            ("max_joins", self.max_joins > 0, "at least 1 a minute"),
            ("max_requests", self.max_requests > 0, "at least 1 a minute"),
            ("max_megabytes", self.max_megabytes > 0, "at least 1 a minute"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {expected}")

    def changed(self) -> dict[str, Any]:
        """The limits that differ from the defaults, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def rates(self) -> Rates:
        """What a key may do in a minute, as the SuperLink needs it."""
        return Rates(self.max_joins, self.max_requests, self.max_megabytes)


class Admission:
    """The gate of a coordinator: it knows the ``limits`` and the ``register`` of nodes.

    ``registered`` are the names of the nodes by public key (PEM). ``tell`` receives what a person should know. The
    coordinator gives the nodes numbers, which :meth:`know` receives.
    """

    def __init__(
        self, register: Register, limits: Limits, registered: Mapping[bytes, str], tell: Callable[[str], None]
    ) -> None:
        register.check_writable()
        self.register, self.limits, self.tell = register, limits, tell
        self.fingerprints = {name: sha256(key).hexdigest()[:16] for key, name in registered.items()}
        for name, other in self._renamed():
            tell(
                f"{register.keys / name}.pub is the key of node {other}: a node is known by the name of the file of "
                f"its key, so that decisions about {other} do not hold for {name}, and it cannot ask for users of "
                f"{other}; name the file {other}.pub again, unless you mean this"
            )
        self.first = all(each.since is None for each in register.nodes().values())
        """Whether this is the first run of the federation: then nobody is new."""

        self._names = dict[int, str]()
        self._last = register.nodes()
        self._why = ""

    def _renamed(self) -> list[tuple[str, str]]:
        """Names that the register does not know yet, of keys that it knows under a name of which there is no key now;
        with that name."""
        nodes = self.register.nodes()
        known = {each.key: name for name, each in nodes.items() if name not in self.fingerprints}
        here = sorted(self.fingerprints.items())
        return [(name, known[key]) for name, key in here if key in known and name not in nodes]

    def know(self, names: Mapping[int, str]) -> None:
        """The names of the nodes, by the numbers that the SuperLink has given them. The neighbourhood service may be
        among them, and is no node."""
        self._names = {node: name for node, name in names.items() if name != SERVICE}

    def nodes(self) -> dict[str, Known]:
        """What holds for each node that has a number, by name. A register that cannot be read changes nothing."""
        try:
            self._last, self._why = self.register.nodes(), ""
        except ConfigError as error:
            if str(error) != self._why:
                self._why = str(error)
                self.tell(f"{error}; until then what was read before holds")
        return {name: self._known(name) for name in self._names.values()}

    def apart(self) -> dict[int, Apart]:
        """The nodes that do not count, by number."""
        found, numbers = self.nodes(), {name: node for node, name in self._names.items()}
        return {
            numbers[name]: Apart(each.state, _told(each), each.state == EXCLUDED)
            for name, each in found.items()
            if not each.counts
        }

    def claim(self, node: int, users: int) -> None:
        """Refuse a node that claims too many users, and hold one whose number has grown too much."""
        name, limits = self._names[node], self.limits
        if limits.max_users is not None and users > limits.max_users:
            raise UploadError(
                "limit",
                f"it claims {counted(users, 'user')}; expected {limits.max_users:,} at most (serve --max-users)",
            )
        known = self.nodes()[name]
        if not limits.max_growth or known.users is None or known.state != MEMBER:
            return
        if users > limits.max_growth * max(known.users, FEW):
            why = (
                f"it claims {counted(users, 'user')} and had {known.users:,} before (serve --max-growth "
                f"{limits.max_growth:g})"
            )
            number = self.register.add({"event": "hold", "node": name, "because": why, "users": users})[0]
            self.tell(
                f"node {name} is held until you decide: {why}; perfedrec federation nodes {self.register.keys} --admit "
                f"{name} or --exclude {name}, or --undo {number}"
            )

    def begin(self, hosts: Mapping[int, Tensor]) -> None:
        """Write down the nodes that take part in a run with the users in ``hosts``, where that is news."""
        before, lines = self.register.nodes(), []
        for node, users in sorted(hosts.items(), key=lambda each: self._names[each[0]]):
            name, count = self._names[node], users.numel()
            known, key = before.get(name), self.fingerprints[self._names[node]]
            line = {"event": "seen", "node": name, "key": key, "users": count}
            if known is None or known.since is None:
                lines.append({**line, "waits": 0 if self.first else self.limits.quarantine})
            elif known.state == MEMBER and (known.key != key or count > (known.users or 0)):
                lines.append(line)
            if known is not None and known.key not in ("", key):
                self.tell(f"node {name} has another key than before: {key}, not {known.key}")
        if lines:
            self.register.add(*lines)

    def waited(self, run: str, number: int, present: frozenset[int]) -> None:
        """Write down that a round has been played while new nodes were connected."""
        new = [name for node, name in self._names.items() if node in present and self.nodes()[name].state == NEW]
        lines = [{"event": "waited", "node": name, "run": run, "round": number} for name in sorted(new)]
        if lines:
            self.register.add(*lines)

    def _known(self, name: str) -> Known:
        """What the register says of a node, also of one that took part in no run so far."""
        known = self._last.get(name)
        if known is not None and (known.since is not None or known.decision is not None):
            return known
        left = 0 if self.first else self.limits.quarantine
        return Known(name, NEW, waiting(left), left=left) if left else Known(name)


def _told(known: Known) -> str:
    """Why a node does not count, as the node may know it: what the operator has noted about it is not for it."""
    if known.state == EXCLUDED:
        return "the operator has excluded it"
    return known.why
