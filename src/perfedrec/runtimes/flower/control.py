"""A SuperLink's control API, as an administrator uses it: register nodes and open runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes.flower.connection import A, AwayError, Endpoint, Q, call

APP = {
    "project": {"name": "perfedrec", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "perfedrec",
                "components": {
                    "serverapp": "perfedrec:serverapp",
                    "clientapp": "perfedrec:clientapp",
                },
                "config": {},
            }
        }
    },
}
"""The description of an app that a SuperLink requires before it opens a run. The components in it are never loaded: the
coordinator takes the run's task itself, and nodes answer messages in their own processes."""


class Control:
    """The control API of the SuperLink at an ``endpoint``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        version = RuntimeVersionHttpInterceptor(component_name="flwr-cli")
        self._client = endpoint.client(ControlHttpClient, [version])

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until the SuperLink answers; raises :class:`~perfedrec.runtimes.flower.connection.AwayError` after
        ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            try:
                self._call(self._client.ListNodes, ListNodesRequest())
                return
            except AwayError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def register(self, keys: Iterable[bytes]) -> dict[int, bytes]:
        """Register the nodes with these public keys (PEM), and no others, and return the keys by node number.

        A key that was unregistered from this SuperLink cannot be registered again: it is missing in what is returned.
        """
        wanted, known = set(keys), set[bytes]()
        for each in self._call(self._client.ListNodes, ListNodesRequest()).nodes_info:
            known.add(each.public_key)
            if each.public_key not in wanted and each.status != NodeStatus.UNREGISTERED:
                self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=each.node_id))
        for key in sorted(wanted - known):
            self._call(self._client.RegisterNode, RegisterNodeRequest(public_key=key))
        nodes = self._call(self._client.ListNodes, ListNodesRequest()).nodes_info
        registered = [each for each in nodes if each.public_key in wanted and each.status != NodeStatus.UNREGISTERED]
        return {int(each.node_id): bytes(each.public_key) for each in registered}

    def open(self) -> int:
        """Open a run and return its number. Runs that a killed coordinator left open are ended first."""
        for each, run in self._call(self._client.ListRuns, ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                with suppress(PerfedrecError):
                    self._call(self._client.StopRun, StopRunRequest(run_id=each))
        content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(APP).encode()})
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        return int(self._call(self._client.StartRun, StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, method: Callable[[Q], A], request: Q) -> A:
        return call(method, request, self.endpoint)
