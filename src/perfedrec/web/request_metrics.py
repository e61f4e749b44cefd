"""The figures of an interface for Prometheus: requests by path, how long they took, and the process. None is about a
single user."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIMITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper limits, in seconds, of the classes in which durations are counted."""

METRICS = {
    "perfedrec_api_requests_total{method,path,status}": "Requests that were answered.",
    "perfedrec_api_request_seconds{method,path}": "How long answers took, from the whole header to the last byte.",
    "perfedrec_node_users": "Users hosted.",
    "perfedrec_node_model_timestamp_seconds": "When the model was received with which the node recommends.",
}
"""The meaning of each metric. Names of labels are in braces. Paths are those of the OpenAPI document, with {user} and
{item} in place of ids; ``none`` stands for all others."""

_METHODS = frozenset({"GET", "POST", "DELETE"})


class Measured:
    """An app whose requests are counted and timed. ``gauges`` gives the values of the metrics of the node, by name; it
    is called when somebody asks for the figures."""

    def __init__(self, app: ASGIApp, gauges: Callable[[], Mapping[str, float | None]]) -> None:
        self.app, self._registry = app, CollectorRegistry()
        (requests, counted), (seconds, timed) = list(METRICS.items())[:2]
        self._requests = Counter(_name(requests), counted, _labels(requests), registry=self._registry)
        self._seconds = Histogram(_name(seconds), timed, _labels(seconds), registry=self._registry, buckets=LIMITS)
        self._registry.register(_Gauges(gauges))
        ProcessCollector(registry=self._registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = scope.get("route")
            path = "none" if route is None else route.path_format
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, path, str(status)).inc()
            self._seconds.labels(method, path).observe(time.perf_counter() - start)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The figures in the format that a header ``Accept`` prefers, and its media type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Gauges(Collector):
    def __init__(self, values: Callable[[], Mapping[str, float | None]]) -> None:
        self.values = values

    def collect(self) -> Iterator[Metric]:
        for name, value in self.values().items():
            if value is not None:
                yield GaugeMetricFamily(name, METRICS[name], value)


def _name(key: str) -> str:
    return key.partition("{")[0]


def _labels(key: str) -> list[str]:
    return key.partition("{")[2].rstrip("}").split(",")
