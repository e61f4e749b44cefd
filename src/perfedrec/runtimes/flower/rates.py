"""How much one key may do in a minute. The SuperLink's process uses it, so nothing of the package is imported here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "PERFEDREC_RATES"
"""The variable of the environment in which the SuperLink's process finds the rates, as JSON."""

REFUSED = "limits.jsonl"
"""The file in the SuperLink's folder in which it writes down whose requests it refuses."""

MINUTE = 60.0

MOST_BYTES = 32 * 2**20
"""The most bytes of one request of a node. Parts of messages have 8 MiB."""


@dataclass(frozen=True)
class Rates:
    """What one key may do in a minute: how often it may join (connect), how many requests it may send, and how many
    megabytes."""

    joins: int
    requests: int
    megabytes: int

    def dump(self) -> str:
        """As :data:`VARIABLE` has it."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Rates:
        """The rates that :meth:`dump` wrote."""
        return Rates(**json.loads(text))


class Meter:
    """Counts what keys do, with ``rates`` for each.

    Each kind of use is a bucket that holds the use of a minute and fills at an even pace: a key may use a minute's
    worth at once, and has to wait then. Refusals are written to ``path``, one line for each key, kind and minute.
    """

    def __init__(self, rates: Rates, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._most = {"joins": float(rates.joins), "requests": float(rates.requests)}
        self._most["megabytes"] = rates.megabytes * 1e6
        self._left = dict[tuple[int, str], tuple[float, float]]()
        self._written = dict[tuple[int, str], float]()

    def take(self, node: int, size: int, joins: bool) -> str | None:
        """Count a request of a ``node`` with ``size`` bytes, which ``joins`` or does not. Where it has no more left the
        request does not count, and the answer is why it is refused."""
        now, wanted = self._clock(), {"requests": 1.0, "megabytes": float(size), **({"joins": 1.0} if joins else {})}
        left = {kind: self._filled(node, kind, now) for kind in wanted}
        for kind, amount in wanted.items():
            if left[kind] < min(amount, self._most[kind]):
                why = f"more than {self._most[kind] / (1e6 if kind == 'megabytes' else 1):,.0f} {kind} a minute"
                self._write(node, kind, why, now)
                return why
        for kind, amount in wanted.items():
            self._left[node, kind] = left[kind] - amount, now
        return None

    def _filled(self, node: int, kind: str, now: float) -> float:
        most = self._most[kind]
        left, then = self._left.get((node, kind), (most, now))
        return min(most, left + most * (now - then) / MINUTE)

    def _write(self, node: int, kind: str, why: str, now: float) -> None:
        if now - self._written.get((node, kind), -MINUTE) < MINUTE:
            return
        self._written[node, kind] = now
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "node": node, "kind": kind, "why": why}) + "\n")


class Refused:
    """Reads what a SuperLink in a ``folder`` has refused since it was read last; at first, since now."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / REFUSED
        self._read = self._path.stat().st_size if self._path.exists() else 0

    def news(self) -> list[tuple[int, str]]:
        """The nodes whose requests were refused, each with the reason."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [(int(each["node"]), str(each["why"])) for each in map(json.loads, whole.splitlines())]
