"""A node at work in a deployment: it answers a coordinator that tells it method and options, in one long-lived process.

Three kinds of messages come: ``query`` (which users are here?), ``train`` (a round), and ``query.model`` (what to
recommend with). Each one carries the :class:`~perfedrec.runtimes.flower.codec.Setup` that both sides have to agree on,
so that a node keeps nothing about its coordinator and may be restarted at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import Algorithm
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.privacy.noise import check_source
from perfedrec.privacy.policy import Policy
from perfedrec.runtimes.flower import service
from perfedrec.runtimes.flower.client_app import work
from perfedrec.runtimes.flower.codec import (
    REASONS,
    BroadcastLayout,
    Setup,
    Task,
    UploadError,
    counted,
    digest,
    dump,
    load,
    pack,
    reply,
    unpack,
)
from perfedrec.runtimes.flower.connection import AwayError, StoppedError
from perfedrec.runtimes.flower.fleet import Fleet
from perfedrec.runtimes.flower.rounds import FAILED
from perfedrec.runtimes.flower.sealing import Bundle
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.flower.secure_sum import RECORD, Stages
from perfedrec.runtimes.node import Store

POLL = 0.1
IDLE = 1.0
"""Seconds between two questions for messages, where the SuperLink does not hold them for as long: at first, and at most
when there was none for long."""

LINGER = 1.0
"""Least seconds between an answer and a goodbye: a SuperLink drops the answers of nodes that have left."""

PATIENCE = 5.0
"""Most seconds between two attempts to reach a coordinator."""


@dataclass
class Work:
    """What a node has done since it was started: rounds, and the ``last`` of them by run and number; messages that it
    ``refused`` by :data:`~perfedrec.runtimes.flower.codec.REASONS`; seconds of computing; and when it gave its last
    answer (seconds since 1970)."""

    rounds: int = 0
    last: tuple[str, int] | None = None
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    seconds: float = 0.0
    answered: float | None = None
    connected: bool = False

    def play(self, run: str, number: int) -> None:
        """Take a round into account, once."""
        self.rounds += (run, number) != self.last
        self.last = run, number


class Working(Protocol):
    """What is at work in a process: its ``app``, what it has ``done``, and ``about`` it a few words."""

    done: Work

    @property
    def about(self) -> str: ...

    def app(self) -> ClientApp: ...


class NodeApp:
    """The app of a node whose users are in a ``store``; ``build`` makes the method that a configuration in TOML
    describes. A node refuses to work with another catalogue or another ``version`` of this package than its own,
    without a ``bundle`` where its users' vectors and edges are for a neighbourhood service, and where its owner's
    ``policy`` is against it."""

    def __init__(
        self,
        store: Store,
        build: Callable[[str], Algorithm[Any, Any, Any]],
        version: str,
        bundle: Bundle | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.store, self.build, self.version, self.bundle, self.policy = store, build, version, bundle, policy
        self.done = Work()
        self._joined: tuple[Setup, Algorithm[Any, Any, Any], int] | None = None
        self._masked = -1, b""  # the round that was worked on last, and what was asked

    @property
    def about(self) -> str:
        """What it brings along, in a few words."""
        least = "" if self.policy is None else f", and requires profile {self.policy.profile} or more protection"
        return f"{self.store.n_users + len(self.store.unregistered())} users{least}"

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app, secret = ClientApp(), b"" if self.bundle is None else self.bundle.vouching
        stages = Stages(secret, lambda nodes: self.store.open_sum(*self._masked, nodes))

        @app.query()
        def present(message: Message, context: Context) -> Message:
            self._agreed(Setup.read(message.content))
            if "identities" in message.content.array_records:
                given = unpack(message.content.array_records["identities"])["identities"].tolist()
                self.store.register(dict(zip(self.store.unregistered(), given, strict=False)))
            users, new = self.store.everyone(), len(self.store.unregistered())
            counts = {"items": self.store.n_items, "attributes": self.store.n_user_attributes}
            about = ConfigRecord({**counts, "new": new})
            return Message(RecordDict({"about": about, "users": pack({"users": users})}), reply_to=message)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            algorithm, seed = self._agreed(Setup.read(message.content))
            if algorithm.protection.secure:
                raise PerfedrecError("this node's uploads are for sums alone; expected stages of secure aggregation")
            if self.policy is not None and Task.round_of(message.content) < 0:  # whose items they are is plain to see
                raise UploadError("policy", self._against(self.policy, "item degrees are asked for without a sum"))
            total = self._work(message, algorithm, seed)
            if self.bundle is None or not service.needed(algorithm):
                return Message(reply(total), reply_to=message)
            number, content = Task.round_of(message.content), reply(service.for_coordinator(total))
            return Message(service.parted(content, total, number, self.bundle), reply_to=message)

        def stage(message: Message, context: Context) -> Message:
            def vector() -> Aggregate:
                return self._work(message, *self._agreed(Setup.read(message.content)))

            return stages.answer(message, context, vector)

        for name in STAGES:
            app.train(name)(stage)

        @app.train(service.NAME.partition(".")[2])
        def name_items(message: Message, context: Context) -> Message:
            if self.bundle is None:
                raise PerfedrecError("this node has no bundle: it does not know what tokens stand for")
            return service.named(message, self.bundle)

        @app.query("model")
        def model(message: Message, context: Context) -> Message:
            setup = Setup.read(message.content)
            algorithm, _ = self._agreed(setup)
            task = self._task(message, algorithm)
            self.store.receive(task.broadcast, task.users[:-1], setup.run, task.round, setup.configuration)
            return Message(RecordDict(), reply_to=message)

        return app

    def _work(self, message: Message, algorithm: Algorithm[Any, Any, Any], seed: int) -> Aggregate:
        """What the users hand over for a message."""
        task = self._task(message, algorithm)
        self._check_phase(task, algorithm)
        self._masked = task.round, digest(message.content, without=RECORD)
        total = once(self.store, algorithm, task, self._masked[1], seed)
        if task.round >= 0:
            self.done.play(Setup.read(message.content).run, task.round)
        return total

    def _check_phase(self, task: Task, algorithm: Algorithm[Any, Any, Any]) -> None:
        """Each phase in its turn: what is released once for the ledger must not be asked for again and again."""
        if task.round >= 0:
            due = next((each.name for each in algorithm.phases[task.round :]), "train")
        else:  # one question, and none to a method that releases degrees in a phase of its own
            due = "degrees" if task.round == -1 and algorithm.needs_degrees else "no phase"
        if task.phase != due:
            raise UploadError("phase", f"phase {task.phase} came in round {task.round}, where it is {due}'s turn")
        if self.policy is not None and (why := self.policy.objection_to(task.phase, algorithm)):
            raise UploadError("policy", self._against(self.policy, why))

    @staticmethod
    def _against(policy: Policy, why: str) -> str:
        return f"this node requires the protection of profile {policy.profile} at least, and {why}"

    def _task(self, message: Message, algorithm: Algorithm[Any, Any, Any]) -> Task:
        task = Task.read(message.content, BroadcastLayout.of(algorithm), self.store.device)
        if self.bundle is None or not service.needed(algorithm):
            return task
        return service.informed(task, message.content, self.bundle, self.store.n_items)

    def _agreed(self, setup: Setup) -> tuple[Algorithm[Any, Any, Any], int]:
        """The method of a setup that this node agrees to, and the seed of its users' draws."""
        if self._joined is None or self._joined[0] != setup:
            algorithm = self._method(setup)
            seed = self.store.join_run(algorithm, setup.run, configuration=setup.configuration)
            self._joined = setup, algorithm, seed
        return self._joined[1:]

    def _method(self, setup: Setup) -> Algorithm[Any, Any, Any]:
        """The method of a setup that this node agrees to."""
        if setup.version != self.version:
            raise UploadError("version", f"this node runs version {self.version}, the coordinator {setup.version}")
        if setup.catalogue != self.store.catalogue:
            raise UploadError(
                "catalogue", f"this node has the catalogue {self.store.catalogue}, the coordinator {setup.catalogue}"
            )
        try:
            algorithm: Any = self.build(setup.configuration)
        except PerfedrecError as error:
            raise UploadError("configuration", f"this node cannot play by the configuration: {error}") from error
        try:
            check_source(algorithm.settings.privacy)
        except ConfigError as error:
            raise UploadError("noise", f"this node cannot draw its noise: {error}") from error
        if self.policy is not None and (why := self.policy.objection(algorithm)):
            raise UploadError("policy", self._against(self.policy, why))
        if self.bundle is None and service.needed(algorithm):
            raise UploadError(
                "bundle", "this node has no bundle, and hands vectors over to a neighbourhood service alone"
            )
        made: Algorithm[Any, Any, Any] = algorithm
        return made


def once(store: Store, algorithm: Algorithm[Any, Any, Any], task: Task, request: bytes, seed: int) -> Aggregate:
    """What the users of a store hand over for a ``task``, whose message has the digest ``request``: once, and the same
    when the same is asked for again."""
    if task.round < 0:  # before the first round, where nothing is noised or remembered
        return work(algorithm, store, task, seed)
    made = store.answer_round(task.round, request, lambda: dump(work(algorithm, store, task, seed)))
    assert made is not None
    return load(made)


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """What the app says to a message, or an error that names its kind."""
    try:
        return app(message, context)
    except UploadError as error:
        return Message(Error(FAILED, f"{error.reason}: {error}"), reply_to=message)
    except PerfedrecError as error:
        return Message(Error(FAILED, f"failed: {error}"), reply_to=message)
    except Exception as error:
        return Message(Error(FAILED, f"failed: {type(error).__name__}: {error}"), reply_to=message)


def run_node(
    connect: Callable[[], Fleet], station: Working, stop: threading.Event, tell: Callable[[str], None]
) -> None:
    """Answer messages until ``stop`` is set, after the work at hand. ``tell`` is told what changes, in one line.

    Connections that break are made anew, with longer and longer waits. Raises
    :class:`~perfedrec.runtimes.flower.connection.RefusedError` where that cannot help.
    """
    app, wait = station.app(), POLL
    while not stop.is_set():
        fleet = connect()
        fleet.ending = stop
        try:
            node = fleet.activate()
            tell(f"connected to {fleet.address} as node {node}, with {station.about}")
            station.done.connected, wait = True, POLL
            _answer_all(fleet, node, app, station, stop, tell)
        except AwayError as error:
            if not stop.is_set():
                tell(f"{error}; trying again in {wait:.1f} s")
            stop.wait(wait)
            wait = min(2 * wait, PATIENCE)
        finally:
            station.done.connected = False
            fleet.close()


def _answer_all(
    fleet: Fleet, node: int, app: ClientApp, station: Working, stop: threading.Event, tell: Callable[[str], None]
) -> None:
    last, context, sent, refusal = time.monotonic(), Context(0, node, {}, RecordDict(), {}), -LINGER, ""
    while not stop.is_set():
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
            said = answer(app, message, context)
            station.done.seconds += (seconds := time.monotonic() - start)
            if said.has_error():
                station.done.refused[counted((said.error.reason or "").partition(": ")[0])] += 1
                if said.error.reason != refusal:
                    refusal = said.error.reason or ""
                    tell(f"refused to answer: {refusal}")
            fleet.send(said, seconds)
            sent, station.done.answered = time.monotonic(), time.time()
        except StoppedError:
            continue
    time.sleep(max(sent + LINGER - time.monotonic(), 0.0))
