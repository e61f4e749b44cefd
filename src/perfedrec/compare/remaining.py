"""How long the rest of a comparison is expected to take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import fmean

from perfedrec.compare.bench import Cell


class Remaining:
    """Estimates the seconds until all ``cells`` have been played, ``processes`` at a time.

    A run is expected to take as long as the finished runs of the same method on the same data, or else as the runs of
    this method that are being played and how far they are, or else as the mean of what is known. ``spent`` gives the
    seconds of the runs that are finished already, and ``clock`` the time.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        processes: int,
        spent: Callable[[Cell], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.processes, self.clock = processes, clock
        self.waiting: list[Cell] = []
        self.playing: dict[str, tuple[Cell, float, float]] = {}  # by name, since when, and the share that is done
        self.known: dict[tuple[str, str], list[float]] = {}
        for cell in cells:
            if not cell.finished:
                self.waiting.append(cell)
            elif (seconds := spent(cell)) is not None:
                self._learn(cell, seconds)

    def begin(self, cell: Cell) -> None:
        """A run has started."""
        self.waiting.remove(cell)
        self.playing[cell.name] = (cell, self.clock(), 0.0)

    def advance(self, cell: Cell, share: float) -> None:
        """A share of a run's rounds has been played."""
        self.playing[cell.name] = (cell, self.playing[cell.name][1], share)

    def end(self, cell: Cell) -> None:
        """A run has ended."""
        _, since, _ = self.playing.pop(cell.name)
        self._learn(cell, self.clock() - since)

    def of(self, cell: Cell) -> float | None:
        """Seconds until the end of a run that is being played; ``None`` where nothing is known."""
        _, since, share = self.playing[cell.name]
        elapsed = self.clock() - since
        if share > 0:
            return elapsed / share - elapsed
        whole = self._whole(cell)
        return None if whole is None else max(whole - elapsed, 0.0)

    def all(self) -> float | None:
        """Seconds until the end of the last run; ``None`` where nothing is known yet."""
        playing = [self.of(cell) for cell, _, _ in self.playing.values()]
        waiting = [self._whole(cell) for cell in self.waiting]
        left = [each for each in (*playing, *waiting) if each is not None]
        if len(left) < len(playing) + len(waiting):
            return None
        return max([sum(left) / self.processes, *left]) if left else 0.0

    def _learn(self, cell: Cell, seconds: float) -> None:
        self.known.setdefault((cell.label, cell.data), []).append(seconds)

    def _whole(self, cell: Cell) -> float | None:
        """The expected seconds of a whole run."""
        same = self.known.get((cell.label, cell.data))
        if same:
            return fmean(same)
        begun = [(each, (self.clock() - since) / share) for each, since, share in self.playing.values() if share > 0]
        alike = [seconds for each, seconds in begun if (each.label, each.data) == (cell.label, cell.data)]
        others = [seconds for each in self.known.values() for seconds in each] + [seconds for _, seconds in begun]
        return fmean(alike or others) if alike or others else None
