"""The process of a node or of the neighbourhood service: it receives messages and answers them until it is stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes.flower.codec import REASONS, UploadError, counted
from perfedrec.runtimes.flower.connection import AwayError, StoppedError, UnknownNameError
from perfedrec.runtimes.flower.exchange import FAILED
from perfedrec.runtimes.flower.fleet import Fleet

POLL = 0.1
"""The time between two requests for messages, in seconds, at first and where the SuperLink does not hold them."""

IDLE = 1.0
"""The longest time between two requests for messages, in seconds: after a long time without any message."""

LINGER = 1.0
"""The shortest time between an answer and the goodbye in seconds: a SuperLink drops the answers of nodes that left."""

PATIENCE = 5.0
"""The longest time between two attempts to reach a coordinator, in seconds."""

NAME_SECONDS = 60.0
"""How long a process tries to resolve the name of a coordinator that it has not reached before, in seconds. The network
of a machine that has just started may need some time; after that the name is probably wrong."""


@dataclass
class Activity:
    """What a process has done since it was started: the number of ``rounds``, and the ``last`` of them by run and
    number; messages that it ``refused``, by :data:`~perfedrec.runtimes.flower.codec.REASONS`; ``seconds`` of computing;
    when it ``answered`` last (seconds since 1970); and whether it is ``connected``."""

    rounds: int = 0
    last: tuple[str, int] | None = None
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    seconds: float = 0.0
    answered: float | None = None
    connected: bool = False
    run: str | None = None
    """The run that it takes part in, until that has ended here."""

    log: Callable[[str], None] = field(default=lambda line: None, repr=False)
    """Receives one line for the begin and one for the end of each run."""

    _before: int = 0

    def play(self, run: str, number: int) -> None:
        """Count a round, once."""
        self.rounds += (run, number) != self.last
        self.last = run, number

    def begin(self, run: str, method: str) -> None:
        """Take part in a run of a ``method`` from now on; called again in the same run, nothing happens."""
        if run != self.run:
            self.end("without a model: another run begins")
            self.run, self._before = run, self.rounds
            self.log(f"run {run} begins here: {method}")

    def end(self, result: str) -> None:
        """Take part no longer, if it does, with a ``result`` in a few words."""
        if self.run is not None:
            played = self.rounds - self._before
            self.log(f"run {self.run} ends here, after {played} round{'' if played == 1 else 's'}, {result}")
            self.run = None


class DeployedApp(Protocol):
    """The app of a process, its ``activity``, a short ``description`` of what it takes part with, and the reason for
    its ``absence`` while it shall answer nothing (``None``: it answers)."""

    activity: Activity

    @property
    def description(self) -> str:
        """A few words."""

    @property
    def absence(self) -> str | None:
        """A few words, or ``None``."""

    def app(self) -> ClientApp:
        """The ``ClientApp``."""


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's answer to a message, or an error that begins with its reason."""
    try:
        return app(message, context)
    except UploadError as error:
        return Message(Error(FAILED, f"{error.reason}: {error}"), reply_to=message)
    except PerfedrecError as error:
        return Message(Error(FAILED, f"failed: {error}"), reply_to=message)
    except Exception as error:
        return Message(Error(FAILED, f"failed: {type(error).__name__}: {error}"), reply_to=message)


def run_node(
    connect: Callable[[], Fleet], deployed: DeployedApp, stop: threading.Event, log: Callable[[str], None]
) -> None:
    """Answer messages until ``stop`` is set; the current message is still answered. ``log`` receives one line for each
    change. While the app is absent, there is no connection.

    A connection that breaks is made again, after longer and longer waits. Raises
    :class:`~perfedrec.runtimes.flower.connection.RefusedError` where trying again cannot help, and
    :class:`~perfedrec.runtimes.flower.connection.UnknownNameError` where the coordinator's name cannot be resolved for
    :data:`NAME_SECONDS` after the start.
    """
    app, wait, reached, end = deployed.app(), POLL, False, time.monotonic() + NAME_SECONDS
    deployed.activity.log = log
    while not stop.is_set():
        if (why := deployed.absence) is not None:
            log(f"answers nothing from now on: {why}")
            while deployed.absence is not None and not stop.is_set():
                stop.wait(IDLE)
            continue
        fleet = connect()
        fleet.ending = stop
        try:
            node = fleet.activate()
            log(f"connected to {fleet.endpoint} as node {node}, with {deployed.description}")
            deployed.activity.connected, reached, wait = True, True, POLL
            _answer_all(fleet, node, app, deployed, stop, log)
        except AwayError as error:
            unknown = isinstance(error, UnknownNameError) and not reached
            if unknown and time.monotonic() > end and not stop.is_set():
                raise UnknownNameError(
                    f"{error}; expected --coordinator HOST:PORT with a name that is known here"
                ) from None
            if not stop.is_set():
                log(f"{error}; trying again in {wait:.1f} s{f', for {NAME_SECONDS:.0f} s in all' if unknown else ''}")
            stop.wait(wait)
            wait = min(2 * wait, PATIENCE)
        finally:
            deployed.activity.connected = False
            fleet.close()
    deployed.activity.end("without a model: this process ends")


def _answer_all(
    fleet: Fleet, node: int, app: ClientApp, deployed: DeployedApp, stop: threading.Event, log: Callable[[str], None]
) -> None:
    activity = deployed.activity
    last, context, sent, refusal = time.monotonic(), Context(0, node, {}, RecordDict(), {}), -LINGER, ""
    while not stop.is_set() and deployed.absence is None:
        try:
            asked = time.monotonic()
            message = fleet.receive()
            if message is None:
                idle = time.monotonic() - last
                stop.wait(max(asked + min(max(POLL, idle / 20), IDLE) - time.monotonic(), 0.0))
                continue
            start = last = time.monotonic()
            if message.metadata.run_id != context.run_id:
                context = Context(message.metadata.run_id, node, {}, RecordDict(), {})
            reply = answer(app, message, context)
            activity.seconds += (seconds := time.monotonic() - start)
            if reply.has_error():
                activity.refused[counted((reply.error.reason or "").partition(": ")[0])] += 1
                if reply.error.reason != refusal:
                    refusal = reply.error.reason or ""
                    log(f"refused to answer: {refusal}")
            fleet.send(reply, seconds)
            sent, activity.answered = time.monotonic(), time.time()
        except StoppedError:
            continue
    time.sleep(max(sent + LINGER - time.monotonic(), 0.0))
