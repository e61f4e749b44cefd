"""The log of requests to forget, and the limits that they are held to: such requests are a way to attack a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError
from perfedrec.runs.files import read_lines

NAME = "forgetting.jsonl"
"""The file of a run's folder with a line for each request: accepted, refused or done."""


@dataclass(frozen=True)
class Limits:
    """How many requests are served: users who were forgotten from a run are at most the ``share`` of its users (one is
    always allowed), and of each node (or of the operator) at most ``per_day`` requests are accepted within 24 hours.

    Chosen requests can move a model more than deletions at random do: in FedMUA (Chen et al., IEEE TIFS 2025, arXiv
    2501.11848) 0.3 % malicious requests make predictions for others wrong. So requests are counted.
    """

    share: float = 0.05
    per_day: int = 20


class Log:
    """The log in the ``folder`` of a run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def lines(self) -> list[dict[str, Any]]:
        """All lines, oldest first; a line that was cut off is left out."""
        return read_lines(self.path)

    def allow(
        self, limits: Limits, users: Sequence[str], before: int, n_users: int, by: str, nonce: str | None = None
    ) -> None:
        """Note that ``users`` are to be forgotten, of ``n_users`` of whom a number were forgotten ``before``. ``nonce``
        is that of a signed request.

        Raises :class:`ConfigError`, and notes the refusal, where the limits do not allow it.
        """
        recent = self.accepted(by, since=datetime.now(UTC) - timedelta(days=1))
        more = {} if nonce is None else {"nonce": nonce}
        most = max(int(limits.share * n_users), 1)
        problem = ""
        if before + len(users) > most:
            problem = (
                f"{before + len(users):,} of {counted(n_users, 'user')} would be forgotten; expected at most "
                f"{most:,} (a share "
                f"of {limits.share:g}): many requests can be an attack; look at {self.path}, and allow a larger share "
                "(--max-share) if they are genuine"
            )
        elif recent >= limits.per_day:
            problem = (
                f"{counted(recent, 'request')} of {by} {'was' if recent == 1 else 'were'} accepted within a day; "
                f"expected at most {limits.per_day}; see "
                f"{self.path}"
            )
        if problem:
            self.add("refused", users=list(users), by=by, **more, reason=problem)
            raise ConfigError(problem)
        self.add("accepted", users=list(users), by=by, **more)

    def accepted(self, by: str, since: datetime) -> int:
        """How many requests of somebody were accepted since a moment."""
        moment, found = since.isoformat(timespec="seconds"), [each for each in self.lines() if each.get("by") == by]
        return sum(line.get("event") == "accepted" and str(line.get("time", "")) >= moment for line in found)

    def done(self, users: Sequence[str], method: str, by: str, output: Path, alerts: Sequence[str]) -> None:
        """Note that users were forgotten."""
        self.add("done", users=list(users), by=by, method=method, output=str(output), alerts=list(alerts))

    def add(self, event: str, **more: Any) -> None:
        """Add a line."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **more}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
