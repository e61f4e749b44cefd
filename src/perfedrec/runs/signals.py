"""Signals that end a run after a whole round."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from perfedrec.core.errors import PerfedrecError


class InterruptedRunError(PerfedrecError):
    """A signal ended a run after a whole round. ``exit_code`` is the one that a shell reports for that signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def signals(tell: Callable[[str], None] | None = None) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that is yielded, instead of ending the process.

    A second SIGINT raises :class:`KeyboardInterrupt` at once; after the first one, ``tell`` receives a line that says
    so. Outside the main thread nothing is collected, because Python delivers signals to the main thread alone.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if tell is not None and number == signal.SIGINT:
            line = "stopping after the current round; press Ctrl-C again to stop at once"
            # From another thread: the signal may have interrupted this one while it was writing a line.
            threading.Thread(target=tell, args=(line,)).start()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
