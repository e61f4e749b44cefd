"""What a run tells while it goes on: events, and reporters that show them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from perfedrec.core.types import RoundReport

if TYPE_CHECKING:
    from perfedrec.runs.config import Config
    from perfedrec.runs.training import Entry, Result


@dataclass
class Standing:
    """Where a run stands: rounds ``done`` of ``total`` (pre-training included), the last report and validation figure,
    bytes and uploads per client so far, and the seconds this process has spent."""

    total: int
    metric: str
    done: int = 0
    phase: str = ""
    loss: float | None = None
    value: float | None = None
    best: float | None = None
    best_round: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    uploads: int = 0
    seconds: float = 0.0
    started_at: int = 0

    def count(self, report: RoundReport, seconds: float) -> None:
        """Take a round into account."""
        self.done, self.phase, self.loss = report.round + 1, report.phase, report.loss
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.uploads += report.clients
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Rounds a second in this process."""
        return (self.done - self.started_at) / self.seconds if self.seconds else 0.0


class Reporter(Protocol):
    """Shows a run's progress."""

    def start(self, standing: Standing) -> None: ...

    def round(self, standing: Standing) -> None: ...

    def stop(self, standing: Standing) -> None: ...


class Tracker(Protocol):
    """Is told everything that a run records: its configuration, each line of its history, and what came out.

    An exception that :meth:`entry` raises ends the run.
    """

    def start(self, config: Config, done: int) -> None:
        """``done`` rounds have been played already: the run is resumed."""

    def entry(self, entry: Entry) -> None: ...

    def stop(self, result: Result | None) -> None:
        """``None``: the run was interrupted or failed."""


class Quiet:
    """Shows nothing."""

    def start(self, standing: Standing) -> None:
        pass

    def round(self, standing: Standing) -> None:
        pass

    def stop(self, standing: Standing) -> None:
        pass


@dataclass
class Lines(Quiet):
    """Plain lines, at least ``every`` seconds apart: for logs and pipes."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every: float = 2.0
    _last: float = 0.0

    def round(self, standing: Standing) -> None:
        now = time.monotonic()
        if now - self._last >= self.every or standing.done == standing.total:
            self._last = now
            print(describe(standing), file=self.stream, flush=True)


@dataclass
class JsonLines(Quiet):
    """One JSON object a round."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def round(self, standing: Standing) -> None:
        print(json.dumps({"event": "round", **asdict(standing)}), file=self.stream, flush=True)


class _TwoLines(Progress):
    """A bar with a line of figures under it: on one line they do not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text("  " + task.fields["detail"], overflow="ellipsis", no_wrap=True) for task in self.tasks)


class Bar:
    """A progress bar for terminals."""

    def __init__(self, console: Console | None = None) -> None:
        self.progress = _TwoLines(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("round {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self.task = self.progress.add_task("training", total=None, detail="")

    def start(self, standing: Standing) -> None:
        self.progress.update(self.task, total=standing.total, completed=standing.done)
        self.progress.start()

    def round(self, standing: Standing) -> None:
        detail = describe(standing, bar=True)
        self.progress.update(self.task, completed=standing.done, description=standing.phase, detail=detail)

    def stop(self, standing: Standing) -> None:
        self.progress.stop()


def describe(standing: Standing, bar: bool = False) -> str:
    """One line: round, loss and validation metric where there are any, rounds a second, bytes so far, time left."""
    parts = [] if bar else [f"round {standing.done}/{standing.total} {standing.phase}"]
    if standing.loss is not None:
        parts.append(f"loss {standing.loss:.4f}")
    if standing.value is not None:
        parts.append(f"{standing.metric} {standing.value:.4f}")
    parts.append(f"{standing.rate:.1f} rounds/s")
    parts.append(f"up {size(standing.bytes_up)} down {size(standing.bytes_down)}")
    if not bar and standing.rate:
        parts.append(f"eta {(standing.total - standing.done) / standing.rate:.0f} s")
    return "  ".join(parts)


def size(count: float) -> str:
    """Bytes for people: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
