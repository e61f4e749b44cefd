"""The metrics that the processes of a federation show to Prometheus, and the page with them.

The processes count what they do; metrics are made from these counts when somebody requests the page. No metric is about
a single user: a node shows how many users it hosts, and nothing about their data.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.extras import needed_by
from perfedrec.federation.members import HELD
from perfedrec.federation.unusual import GROUP, STATISTICS
from perfedrec.privacy.ledger import Ledger
from perfedrec.runtimes.flower import REASONS, counted

if TYPE_CHECKING:
    from prometheus_client import Metric

    from perfedrec.runs.folder import Entry
    from perfedrec.runtimes.flower import Activity, Coordinator, SuperLink
    from perfedrec.runtimes.node import Store

ADDRESS = "127.0.0.1"
"""The page can be read on the same machine alone, unless its owner passes it on."""

COORDINATOR = {
    "rounds_planned": "Rounds of the run, pre-training included.",
    "rounds_done": "Rounds of the run that have been played, also by earlier processes.",
    "rounds_total{outcome}": "Rounds: complete, partial (not all clients asked are in the sum), or aborted.",
    "round_seconds": "How long rounds took.",
    "last_round_timestamp_seconds": "When the last round ended; before that, when the first one began.",
    "deadline_seconds": "Seconds that nodes have to answer a message.",
    "asked_clients_total": "Clients asked in rounds.",
    "answered_clients_total": "Clients whose answers are in the sum of a round.",
    "received_bytes_total": "Bytes of the arrays in nodes' answers.",
    "sent_bytes_total": "Bytes of the arrays in messages to nodes.",
    "rejections_total{node,reason}": "Rounds that went on without a node, or without a part of what it sent.",
    "node_connected{node}": "Whether a node was connected when the coordinator last looked, at the start of a round.",
    "node_counts{node}": "Whether what a node sends is part of sums: not that of a new, held or excluded node.",
    "node_held{node}": "Whether a node waits for the operator's decision.",
    "unusual_total{node,statistic}": "How often a node stood out among the others, by what it stood out with.",
    "superlink_restarts_total": "How often the SuperLink had died and was started again.",
    "epsilon": "Epsilon against the coordinator of what the run has released; absent where nothing is guaranteed.",
    "epsilon_planned": "Epsilon against the coordinator after all planned rounds; absent where nothing is guaranteed.",
    "validation{metric}": "Metrics of the last evaluation on items that users hold out, means over users.",
    "certificate_expiry_timestamp_seconds{certificate}": "When a certificate that was read at the start expires.",
}
SERVICE = {
    "connected": "Whether there is a connection to the coordinator.",
    "rounds_total": "Rounds computed.",
    "last_round": "Number of the round that was last computed, as in metrics.jsonl.",
    "last_answer_timestamp_seconds": "When the last message was answered.",
    "computing_seconds_total": "Seconds spent on answers.",
    "refusals_total{reason}": "Messages that were answered with an error.",
}
NODE = SERVICE | {
    "users": "Users hosted.",
    "model_timestamp_seconds": "When the model was received with which the node recommends.",
}
"""The meaning of each metric, by its name without ``perfedrec_``, the role and ``_``. Names of labels are in braces."""

LIMITS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
"""Upper limits, in seconds, of the classes in which durations are counted."""


@dataclass(frozen=True)
class Durations:
    """A histogram of durations: ``counts`` [11] in the classes of :data:`LIMITS`, the last one for longer ones, and the
    ``total`` in seconds."""

    counts: tuple[int, ...] = (0,) * (len(LIMITS) + 1)
    total: float = 0.0

    def add(self, seconds: float) -> Durations:
        """The same with one more duration."""
        place = bisect_left(LIMITS, seconds)
        counts = (count + (at == place) for at, count in enumerate(self.counts))
        return Durations(tuple(counts), self.total + seconds)


Counts = dict[tuple[str, ...], float]
Figure = float | Mapping[tuple[str, ...], float] | Durations | None
"""A number, numbers by the values of their labels, a histogram, or ``None`` where there is nothing to show."""


class Watch:
    """What a coordinator has counted since it started. It may be read from another thread, which sees whole rounds."""

    def __init__(self, names: Mapping[int, str], planned: int, deadline: float, ends: Mapping[str, float]) -> None:
        """``names`` are those of registered nodes, ``planned`` is the number of rounds, ``deadline`` is in seconds, and
        ``ends`` are the times at which certificates expire (seconds since 1970), by name."""
        self.names = dict(sorted(names.items(), key=lambda each: each[1]))
        self.planned, self.deadline, self.ends = planned, deadline, ends
        self.done = self.asked = self.answered = self.received = self.sent = 0
        self.ended: float | None = None
        self.outcomes: Counts = {(outcome,): 0 for outcome in ("complete", "partial", "aborted")}
        self.rejections: Counts = {(name, reason): 0 for name in self.names.values() for reason in REASONS}
        self.unusual: Counts = {(name, each): 0 for name in self.names.values() for each in (*STATISTICS, GROUP)}
        self.durations, self._lock = Durations(), threading.Lock()
        self.valid: Counts = {}
        self._epsilons: dict[int, float | None] = {}

    def begin(self, done: int, now: float, valid: Mapping[str, float] | None = None) -> None:
        """Start to count ``now`` (seconds since 1970), after ``done`` rounds, the last evaluation of which was
        ``valid``."""
        with self._lock:
            self.done, self.ended = done, now
            self._evaluated(valid)

    def count(self, entry: Entry, without: Iterable[tuple[str, str]], now: float) -> None:
        """Count a round that ended ``now``. It went on ``without`` some nodes: their names, each with a reason."""
        report = entry.report
        outcome = "complete" if report.clients >= report.cohort else "partial"
        with self._lock:
            self.done, self.ended = report.round + 1, now
            self.outcomes[(outcome if report.aborted is None else "aborted",)] += 1
            self.durations = self.durations.add(entry.seconds)
            self.asked += report.cohort
            self.answered += report.clients
            self.received += report.bytes_up
            self.sent += report.bytes_down
            self._evaluated(entry.valid)
            for name, reason in without:
                if (place := (name, counted(reason))) in self.rejections:
                    self.rejections[place] += 1

    def note(self, unusual: Iterable[tuple[str, str]], limited: Iterable[str]) -> None:
        """Count nodes that stood out, each with what it stood out with, and those of which the SuperLink refused
        requests."""
        with self._lock:
            for place in unusual:
                if place in self.unusual:
                    self.unusual[place] += 1
            for name in limited:
                if (name, "limit") in self.rejections:
                    self.rejections[name, "limit"] += 1

    def _evaluated(self, valid: Mapping[str, float] | None) -> None:
        if valid is not None:
            self.valid = {(name,): value for name, value in valid.items() if "@" in name}

    def metrics(self, coordinator: Coordinator, link: SuperLink) -> Iterator[Metric]:
        """The metrics of the coordinator with the SuperLink ``link``."""
        return _families("coordinator", COORDINATOR, self.figures(coordinator, link))

    def figures(self, coordinator: Coordinator, link: SuperLink) -> dict[str, Figure]:
        """The figure of each metric in :data:`COORDINATOR`."""
        present = coordinator.present
        spent, planned = (self._epsilon(coordinator, rounds) for rounds in (self.done, self.planned))
        # A service that has no work is not looked for.
        unasked = None if coordinator.service_client is not None else coordinator.service
        connected: Counts = {(name,): node in present for node, name in self.names.items() if node != unasked}
        apart, nodes = coordinator.apart, [each for each in self.names.items() if each[0] != coordinator.service]
        with self._lock:
            return {
                "rounds_planned": self.planned,
                "rounds_done": self.done,
                "rounds_total": self.outcomes.copy(),
                "round_seconds": self.durations,
                "last_round_timestamp_seconds": self.ended,
                "deadline_seconds": self.deadline,
                "asked_clients_total": self.asked,
                "answered_clients_total": self.answered,
                "received_bytes_total": self.received,
                "sent_bytes_total": self.sent,
                "rejections_total": self.rejections.copy(),
                "node_connected": connected,
                "node_counts": {(name,): node not in apart for node, name in nodes},
                "node_held": {(name,): node in apart and apart[node].state == HELD for node, name in nodes},
                "unusual_total": self.unusual.copy(),
                "superlink_restarts_total": link.restarts,
                "epsilon": spent,
                "epsilon_planned": planned,
                "validation": self.valid.copy(),
                "certificate_expiry_timestamp_seconds": {(name,): end for name, end in self.ends.items()},
            }

    def _epsilon(self, coordinator: Coordinator, rounds: int) -> float | None:
        """Epsilon against the coordinator of the first ``rounds`` rounds; computed once for each number."""
        if coordinator.directory is None:
            return None
        algorithm, users = coordinator.algorithm, coordinator.directory.identities.numel()
        if rounds not in self._epsilons:
            releases = algorithm.releases(max(rounds - len(algorithm.phases), 0), users)
            ledger = Ledger(releases, algorithm.settings.privacy.delta)
            self._epsilons[rounds] = ledger.epsilon("coordinator").value
        return self._epsilons[rounds]


def of_service(activity: Activity) -> Iterator[Metric]:
    """The metrics of the neighbourhood service."""
    return _families("service", SERVICE, _of(activity))


def of_node(activity: Activity, store: Store) -> Iterator[Metric]:
    """The metrics of a node; those about its users are absent where its file cannot be read."""
    users, received = None, None
    with suppress(PerfedrecError):
        users, received = store.summary()
    return _families("node", NODE, {**_of(activity), "users": users, "model_timestamp_seconds": received})


def _of(activity: Activity) -> dict[str, Figure]:
    return {
        "connected": activity.connected,
        "rounds_total": activity.rounds,
        "last_round": activity.last and activity.last[1],
        "last_answer_timestamp_seconds": activity.answered,
        "computing_seconds_total": activity.seconds,
        "refusals_total": {(reason,): count for reason, count in activity.refused.items()},
    }


def plain(texts: Mapping[str, str], figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Figures as JSON has them, by the names of their metrics: a number, a list of numbers with their labels, or the
    count and the sum of a histogram. What is not known is left out, and so are counts of 0 with labels."""
    found: dict[str, Any] = {}
    for key in texts:
        name, _, labels = key.rstrip("}").partition("{")
        figure = figures[name]
        if isinstance(figure, Durations):
            found[name] = {"count": sum(figure.counts), "sum": figure.total}
        elif isinstance(figure, Mapping):
            shown = {values: number for values, number in figure.items() if number or not name.endswith("_total")}
            named = [(dict(zip(labels.split(","), values, strict=True)), number) for values, number in shown.items()]
            found[name] = [{**label, "value": number} for label, number in named]
        elif figure is not None:
            found[name] = figure
    return found


def _families(role: str, texts: Mapping[str, str], figures: Mapping[str, Figure]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    for key, text in texts.items():
        short, _, labels = key.rstrip("}").partition("{")
        name, figure = f"perfedrec_{role}_{short}", figures[short]
        if isinstance(figure, Durations):
            limits = [*map(str, LIMITS), "+Inf"]
            classes = list(zip(limits, accumulate(figure.counts), strict=True))
            yield HistogramMetricFamily(name, text, classes, figure.total)
            continue
        kind = CounterMetricFamily if short.endswith("_total") else GaugeMetricFamily
        family = kind(name, text, labels=labels.split(",") if labels else [])
        for values, number in (figure if isinstance(figure, Mapping) else {(): figure}).items():
            if number is not None:
                family.add_metric(values, number)
        yield family


Source = Callable[[], Iterable["Metric"]]
Expose = Callable[[Source], None]


def nowhere(source: Source) -> None:
    """Ignore a source of metrics, where no page was asked for."""


@contextmanager
def exposed(port: int | None) -> Iterator[Expose]:
    """Answer Prometheus on a port of this machine until the end of the block; with ``None``, do not.

    The page has the figures of the process, and those of all sources that are given to the function that is yielded.
    Raises :class:`ConfigError` for a port that cannot be used, and where prometheus-client is not installed.
    """
    if port is None:
        yield nowhere
        return
    if not 0 < port < 65536:
        raise ConfigError(f"--metrics-port {port}: expected a port, a number from 1 to 65535")
    with needed_by("--metrics-port"):
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
    registry, page = CollectorRegistry(), _Page()
    ProcessCollector(registry=registry)
    registry.register(page)
    try:
        server, thread = start_http_server(port, ADDRESS, registry)
    except OSError as error:
        why = f"cannot be listened on ({error.strerror}); expected a free port"
        raise ConfigError(f"--metrics-port {port}: {why}") from None
    try:
        yield page.sources.append
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Page:
    """The sources of a process, as a collector of Prometheus."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def collect(self) -> Iterator[Metric]:
        for source in list(self.sources):
            yield from source()
