"""How far a run is, and reporters that show it."""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

if TYPE_CHECKING:  # who only shows how a run is needs no torch
    from perfedrec.core.types import RoundReport
    from perfedrec.runs.config import Config
    from perfedrec.runs.folder import Entry
    from perfedrec.runs.result import Result


@dataclass
class Progress:
    """How far a run is: rounds ``done`` of ``total``, of which the first ``n_phases`` are phases before training, the
    ``phase`` and ``loss`` of the last round, the last and the ``best`` value of the validation ``metric``, the standard
    ``error`` of the last one where a sample of users validates, bytes and uploads of all clients so far, the number of
    ``users`` (0 while it is not known), each of them a client, and the ``seconds`` that this process has spent since it
    ``started_at`` a round. Phases before training say nothing of how long a round takes: with the first round this
    count begins anew."""

    total: int
    metric: str
    done: int = 0
    phase: str = ""
    loss: float | None = None
    value: float | None = None
    error: float | None = None
    best: float | None = None
    best_round: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    uploads: int = 0
    seconds: float = 0.0
    started_at: int = 0
    n_phases: int = 0
    users: int = 0

    def resumed(self, stored: Mapping[str, Any]) -> Progress:
        """This run, as far as a checkpoint has ``stored``."""
        planned = {"total": self.total, "n_phases": self.n_phases, "users": self.users}
        return Progress(**{**stored, **planned, "seconds": 0.0, "started_at": stored["done"]})

    @property
    def trained(self) -> int:
        """Rounds of training played; 0 and below before training."""
        return self.done - self.n_phases

    @property
    def place(self) -> str:
        """The last round as people count: see :func:`place`."""
        return place(self.done, self.total, self.n_phases, self.phase)

    @property
    def planned(self) -> str:
        """All rounds as people count: ``2 phases and 20 rounds``, without the phases where there are none."""
        rounds = self.total - self.n_phases
        phases = f"{self.n_phases} phase{'s' * (self.n_phases != 1)} and " if self.n_phases else ""
        return f"{phases}{rounds} round{'s' * (rounds != 1)}"

    def count(self, report: RoundReport, seconds: float) -> None:
        """Add a round that took ``seconds``."""
        if report.round >= self.n_phases > self.started_at:
            self.started_at, self.seconds = self.n_phases, 0.0
        self.done, self.phase, self.loss = report.round + 1, report.phase, report.loss
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.uploads += report.clients
        self.seconds += seconds

    def sent(self, users: int) -> dict[str, float]:
        """The communication of the run so far, as a :class:`~perfedrec.runs.summary.Summary` has it."""
        from perfedrec.runs.summary import communication

        return communication(self.bytes_up, self.bytes_down, self.uploads, users)

    @property
    def over(self) -> bool:
        """Whether no round is left to play."""
        return self.done >= self.total

    @property
    def rate(self) -> float:
        """Rounds per second in this process; 0 before the first one."""
        return (self.done - self.started_at) / self.seconds if self.seconds and self.trained > 0 else 0.0


class Reporter(Protocol):
    """Shows the progress of a run: before the first round, after each round, and after the last one."""

    def start(self, progress: Progress) -> None: ...

    def round(self, progress: Progress) -> None: ...

    def stop(self, progress: Progress) -> None: ...


class Tracker(Protocol):
    """Receives everything that a run records: its configuration, each line of its history, and its result.

    An exception that :meth:`entry` raises ends the run.
    """

    def start(self, config: Config, done: int) -> None:
        """A run begins. ``done`` rounds have been played before; more than 0 where it is resumed."""

    def entry(self, entry: Entry) -> None:
        """A round has been played."""

    def stop(self, result: Result | None) -> None:
        """The run has ended; with ``None`` it was interrupted or it failed."""


class Quiet:
    """Shows nothing."""

    def start(self, progress: Progress) -> None:
        pass

    def round(self, progress: Progress) -> None:
        pass

    def stop(self, progress: Progress) -> None:
        pass


@dataclass
class Lines(Quiet):
    """Writes plain lines, at least ``every`` seconds apart, for logs and pipes."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every: float = 2.0
    _last: float = 0.0

    def round(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= self.every or progress.done == progress.total:
            self._last = now
            print(describe(progress), file=self.stream, flush=True)


@dataclass
class JsonLines(Quiet):
    """Writes one JSON object per round."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def round(self, progress: Progress) -> None:
        print(json.dumps({"event": "round", **asdict(progress)}), file=self.stream, flush=True)


class _Lined(RichProgress):
    """A bar with lines of figures under it. On one line they do not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in (line for task in self.tasks for line in task.fields["detail"].splitlines() or [""]):
            yield Text("  " + line, overflow="ellipsis", no_wrap=True)


class Bar:
    """Shows a progress bar on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.bar = _Lined(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[place]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task("training", total=None, place="", detail="")

    def start(self, progress: Progress) -> None:
        self.bar.update(self.task, total=progress.total, completed=progress.done, place=progress.place)
        self.bar.start()

    def round(self, progress: Progress) -> None:
        detail = describe(progress, bar=True)
        self.bar.update(self.task, total=progress.total, completed=progress.done, place=progress.place, detail=detail)

    def stop(self, progress: Progress) -> None:
        self.bar.stop()


class Notebook(Quiet):
    """Shows a bar in a notebook, with a line of figures, at most ten times a second. It needs no widgets."""

    def __init__(self) -> None:
        self.progress, self._last = Progress(0, ""), 0.0
        self._handle: Any = None

    def start(self, progress: Progress) -> None:
        from IPython.display import display

        self.progress = progress
        self._handle = display(self, display_id=True)

    def round(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._handle is not None and (now - self._last >= 0.1 or progress.over):
            self._last, self.progress = now, progress
            self._handle.update(self)

    def stop(self, progress: Progress) -> None:
        self._last = 0.0
        self.round(progress)

    def __repr__(self) -> str:
        return describe(self.progress)

    def _repr_html_(self) -> str:
        figures = html.escape(describe(self.progress))
        return f'<progress max="{self.progress.total}" value="{self.progress.done}"></progress> {figures}'


def best_reporter() -> Reporter:
    """What shows progress best: a bar in a notebook or on a terminal, plain lines elsewhere."""
    if Console(stderr=True).is_jupyter:
        return Notebook()
    return Bar() if sys.stderr.isatty() else Lines()


def describe(progress: Progress, bar: bool = False) -> str:
    """One line: round, loss and validation metric where there are any, with the best one so far where that is an
    earlier one, rounds per second, what a client has sent and received so far, as a mean over all clients, and the time
    left.

    For a ``bar``, which shows them itself, round, speed and time left are left out, and what a client has sent has a
    line of its own.
    """
    parts = [] if bar else [progress.place]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.value is not None:
        error = "" if progress.error is None else f" ± {progress.error:.4f}"
        parts.append(f"validation {progress.metric} {progress.value:.4f}{error}{_best(progress)}")
    if not bar and progress.rate:
        parts.append(f"{progress.rate:.1f} rounds/s")
    if progress.bytes_up and progress.users:
        up, down = (size(count / progress.users) for count in (progress.bytes_up, progress.bytes_down))
        sent = f"a client: {up} up, {down} down"
        if bar:
            return "  ".join(parts) + f"\n{sent}"
        parts.append(sent)
    if not bar and progress.rate:
        parts.append(f"eta {(progress.total - progress.done) / progress.rate:.0f} s")
    return "  ".join(parts)


def _best(progress: Progress) -> str:
    """The best validation value so far and where it was, if that is not the last value."""
    if progress.best is None or progress.value is None or progress.best_round is None:
        return ""
    where = round_name(progress.best_round + progress.n_phases - 1, progress.n_phases)
    return f" (best {progress.best:.4f}, {where})" if progress.best > progress.value else ""


def place(done: int, total: int, n_phases: int, phase: str = "") -> str:
    """The last of ``done`` rounds as people count: ``phase 3/5`` with its name before training, and ``round 60/300``
    in training."""
    if done > n_phases or not n_phases:
        return f"round {done - n_phases}/{total - n_phases}"
    return f"phase {done}/{n_phases} {phase}".rstrip()


def round_name(number: int, n_phases: int) -> str:
    """Round ``number`` of a run, counted from 0 with its ``n_phases`` phases, as people count: ``phase 1`` or
    ``round 1``."""
    if number < 0:
        return "before the first round"
    return f"phase {number + 1}" if number < n_phases else f"round {number - n_phases + 1}"


def size(count: float) -> str:
    """A number of bytes for people: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
