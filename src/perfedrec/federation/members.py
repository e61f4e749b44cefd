"""The register of a federation's nodes: which are known, whose part counts, and what the operator has decided.

It is a file of lines beside the nodes' public keys. Lines are only added, and each has a number: so every decision can
be read, and undone. The coordinator and ``perfedrec federation nodes`` write to it, and the coordinator reads it at the
start of each round.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, reason
from perfedrec.core.nearest import listing, nearest

REGISTER = "nodes.jsonl"
"""The file, in the folder of the nodes' public keys."""

MEMBER, NEW, HELD, EXCLUDED = "member", "new", "held", "excluded"
"""What a node is: its part counts; it counts after some rounds; it waits for a decision; it takes no part."""

DECISIONS = {"exclude": EXCLUDED, "admit": MEMBER, "hold": HELD}
"""Lines that decide what a node is. The coordinator writes "hold", the operator the others."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """What the register says of a node.

    ``state`` is :data:`MEMBER`, :data:`NEW`, :data:`HELD` or :data:`EXCLUDED`, ``why`` in a few words, by the line
    ``decision`` where it was decided. ``users`` is the largest number of users that it was allowed to claim, and
    ``left`` the number of rounds after which a new node counts. ``since`` is when it was first seen (seconds since
    1970), with the key of the fingerprint ``key``.
    """

    name: str
    state: str = MEMBER
    why: str = ""
    decision: int | None = None
    users: int | None = None
    left: int = 0
    since: float | None = None
    key: str = ""

    @property
    def counts(self) -> bool:
        """Whether what the node sends is part of sums."""
        return self.state == MEMBER


class Register:
    """The register in the folder ``keys`` of the nodes' public keys.

    Methods raise :class:`ConfigError` for a file that cannot be read or written.
    """

    def __init__(self, keys: Path) -> None:
        self.keys, self.path = keys, keys / REGISTER
        self._read: tuple[tuple[int, int], list[dict[str, Any]]] | None = None
        self._nodes: tuple[list[dict[str, Any]], dict[str, Known]] | None = None

    def names(self) -> list[str]:
        """The nodes whose public keys are in the folder."""
        return sorted(path.stem for path in self.keys.glob("*.pub"))

    def lines(self) -> list[dict[str, Any]]:
        """All lines, in their order. They are read again only where the file has changed."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return []
        mark = found.st_mtime_ns, found.st_size
        if self._read is None or self._read[0] != mark:
            self._read = mark, self._parsed()
        return self._read[1]

    def nodes(self) -> dict[str, Known]:
        """By name what the register says of each node that it knows."""
        lines = self.lines()
        if self._nodes is None or self._nodes[0] is not lines:
            self._nodes = lines, fold(lines)
        return self._nodes[1]

    def add(self, *lines: Line) -> list[int]:
        """Add lines; returns their numbers. Each is on the disk when this returns, whole or not at all."""
        with self._writing() as file:
            number = len(self._parsed())
            made = [{"number": number + place, "time": time.time(), **each} for place, each in enumerate(lines, 1)]
            _write_whole(file, "".join(json.dumps(each) + "\n" for each in made).encode())
        return [each["number"] for each in made]

    def check_writable(self) -> None:
        """Raise :class:`ConfigError` where lines cannot be added."""
        place = self.path if self.path.exists() else self.keys
        if not os.access(place, os.W_OK):
            raise ConfigError(
                f"{place}: cannot be written; expected a folder of keys in which the coordinator can keep its register "
                "of nodes"
            )

    # --- decisions ---

    def exclude(self, name: str, because: str = "") -> int:
        """Let a node take no part from the next round on; returns the number of the decision."""
        return self._decide("exclude", name, because)

    def admit(self, name: str, because: str = "") -> int:
        """Let a node's part count from the next round on; returns the number of the decision."""
        return self._decide("admit", name, because)

    def undo(self, number: int, because: str = "") -> int:
        """Undo a decision: the one before it holds again. Raises :class:`ConfigError` where there is none of this
        number, or it is undone already."""
        lines = self.lines()
        found = next((each for each in lines if each["number"] == number), None)
        if found is None or found["event"] not in DECISIONS:
            known = ", ".join(str(each["number"]) for each in lines if each["event"] in DECISIONS) or "none so far"
            raise ConfigError(f"{self.path}: {number} is not a decision; expected the number of one ({known})")
        if number in _undone(lines):
            raise ConfigError(f"{self.path}: decision {number} is undone already; expected another one")
        return self.add({"event": "undo", "of": number, "node": found["node"], "because": because})[0]

    def _decide(self, event: str, name: str, because: str) -> int:
        known = sorted({*self.names(), *self.nodes()} - {"service"})
        if name not in known:
            expected = f"{listing(known) or 'its keys'}{nearest(name, known)}"
            raise ConfigError(f"{self.keys}: has no node {name}; expected one of {expected}")
        return self.add({"event": event, "node": name, "because": because})[0]

    # --- the file ---

    def _parsed(self) -> list[dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: cannot be read ({reason(error)}); expected lines of JSON") from None
        found, lines = list[dict[str, Any]](), text.splitlines()
        for place, each in enumerate(lines, 1):
            try:
                found.append(_checked(json.loads(each)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                half = place == len(lines) and not text.endswith("\n")
                raise ConfigError(
                    f"{self.path}, line {place}: the last line is half written; expected a whole one: delete that "
                    "line, and repeat its decision if it was one; all others hold"
                    if half
                    else f"{self.path}, line {place}: cannot be read ({reason(error)}); expected what perfedrec wrote "
                    "there, or a backup of the file"
                ) from None
        return found

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """The file, to which nobody else writes meanwhile."""
        try:
            with open(self.path, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o644)) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written ({reason(error)}); expected a folder of keys in which the coordinator "
                "can keep its register of nodes"
            ) from None


def _write_whole(file: Any, content: bytes) -> None:
    """Write at the end of a file, or leave it as it was."""
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def fold(lines: Sequence[Line]) -> dict[str, Known]:
    """What the ``lines`` of a register say of each node."""
    undone, of = _undone(lines), dict[str, list[Line]]()
    for each in lines:
        of.setdefault(str(each["node"]), []).append(each)
    return {name: _known(name, own, undone) for name, own in sorted(of.items())}


def _known(name: str, lines: Sequence[Line], undone: set[int]) -> Known:
    decided = [each for each in lines if each["event"] in DECISIONS and each["number"] not in undone]
    last = decided[-1] if decided else None
    first = next((each for each in lines if each["event"] == "seen"), None)
    waits = 0 if first is None else int(first.get("waits", 0))
    left = max(waits - len({(each["run"], each["round"]) for each in lines if each["event"] == "waited"}), 0)
    # A number that a node was held for counts as allowed once that has been decided otherwise.
    holding = {} if last is None or last["event"] != "hold" else {last["number"]}
    allowed = [int(each["users"]) for each in lines if "users" in each and each["number"] not in holding]
    keys = [str(each.get("key", "")) for each in lines if each["event"] == "seen"]
    known = Known(
        name,
        users=max(allowed, default=None),
        since=None if first is None else float(first["time"]),
        key=keys[-1] if keys else "",
    )
    if last is not None:
        why = str(last.get("because") or "the operator has decided so")
        return replace(known, state=DECISIONS[last["event"]], why=why, decision=int(last["number"]))
    if left:
        return replace(known, state=NEW, why=waiting(left), left=left)
    return known


def waiting(left: int) -> str:
    """Why a new node does not count yet."""
    return f"it is new: what it sends counts after {counted(left, 'more round')}"


def _undone(lines: Sequence[Line]) -> set[int]:
    return {int(each["of"]) for each in lines if each["event"] == "undo"}


def _checked(line: Any) -> dict[str, Any]:
    """A line, if it has what every line has."""
    made: dict[str, Any] = {str(name): value for name, value in line.items()}
    int(made["number"]), float(made["time"]), str(made["node"])
    if made["event"] not in (*DECISIONS, "undo", "seen", "waited"):
        raise ValueError(f"event {made['event']}")
    for name in {"undo": ("of",), "waited": ("run", "round")}.get(made["event"], ()):
        made[name]
    return made
