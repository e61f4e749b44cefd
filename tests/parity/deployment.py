"""What ``perfedrec serve``, ``node run`` and ``service run`` set up, over a grid in memory and with real files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from tests.parity.federation import N_ITEMS, N_USERS, SEED, SERVICE, UNEQUAL, Twins, population
from tests.parity.grid import MemoryGrid
from tests.parity.test_store import stored

from perfedrec.federation.bundles import BUNDLE, KEYS, deal, read_bundle, read_keys
from perfedrec.federation.service import StateStore
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.runtimes.flower import Coordinator, Federation, NodeApp, ServiceApp, ServiceClient, Setup, needs_service
from perfedrec.runtimes.flower.node_loop import answer


class Deployment:
    """A coordinator, the apps of four nodes, and the neighbourhood service; :meth:`serve` starts the service again."""

    def __init__(
        self,
        config: PerFedRecSettings,
        folder: Path,
        tamper: Callable[[Message], Message | None] | None = None,
    ) -> None:
        self.algorithm, self.population, self.folder = PerFedRecPP(config), population(), folder
        self.hosts = Twins(config, UNEQUAL).hosts
        if not folder.joinpath("service").exists():
            deal(folder, map(str, self.hosts), folder / "service")
        self.bundles = {node: read_bundle(folder / str(node) / BUNDLE) for node in self.hosts}
        self.nodes = {node: stored(folder / str(node) / "store.db", users) for node, users in self.hosts.items()}
        self.apps: dict[int, Any] = {
            node: partial(answer, NodeApp(store, lambda _: self.algorithm, "1", self.bundles[node]).app())
            for node, store in self.nodes.items()
        }
        self.serve()
        self.grid = MemoryGrid(self.apps, tamper)
        service_client = ServiceClient(SERVICE) if needs_service(self.algorithm) else None
        setup = Setup("a run", "", self.nodes[100].catalogue, "1")
        federation = Federation(self.algorithm, N_ITEMS, SEED, setup, deadline=0.0, service_client=service_client)
        self.coordinator = Coordinator(self.grid, federation, service=SERVICE)
        self.flower: Any = None

    def serve(self, version: str = "1") -> None:
        """A new process of the service, which has only what is in its folder."""
        keys = read_keys(self.folder / "service" / KEYS)
        state_store = StateStore(self.folder / "service")
        self.service = ServiceApp(keys.private, keys.nodes, lambda _: self.algorithm, version, state_store)
        self.apps[SERVICE] = partial(answer, self.service.app())

    def begin(self) -> None:
        self.coordinator.assemble(len(self.nodes), N_USERS, 0.0, lambda line: None)
        self.flower = self.coordinator.begin()

    def play(self) -> Any:
        if self.flower is None:
            self.begin()
        self.flower, report = self.coordinator.play(self.flower)
        assert self.coordinator.rejected == []
        return report
