"""The same small world twice: in the simulator, and on the nodes of an in-memory Flower grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message
from tests.parity.grid import MemoryGrid
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.records import flatten
from perfedrec.core.types import Spec
from perfedrec.data.synthetic import synthetic
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.runtimes import round as simulator
from perfedrec.runtimes.flower import (
    BroadcastLayout,
    Directory,
    Federation,
    Rejection,
    ServiceClient,
    play_round,
)
from perfedrec.runtimes.flower.client_app import client_app
from perfedrec.runtimes.flower.sealing import Bundle, public_of
from perfedrec.runtimes.flower.service import NeighbourhoodService
from perfedrec.runtimes.hosted import Hosted
from perfedrec.runtimes.population import Population

N_USERS, N_ITEMS, DIM, SEED = 23, 60, 8, 7
SERVICE = 999
SINGLE = (1,) * N_USERS
UNEQUAL = (1, 10, 4, 8)
PROTECTED = {"clip": 0.05, "noise_scale": 0.01, "pseudo_items": 0.4, "masking": 0.2}


def settings(**parts: dict[str, Any]) -> PerFedRecSettings:
    """Small settings in which every part has an effect within a few rounds."""
    base: dict[str, dict[str, Any]] = {
        "model": {"embedding_dim": DIM, "refresh_every": 2},
        "clusters": {"n_clusters": 3, "start": 1, "every": 2},
        "selection": {"n_clients_per_round": 12},
        "pretraining": {"kind": "none", "steps": 2, "batch_size": 16, "passes": 2, "cluster_passes": 1},
    }
    return PerFedRecSettings.model_validate({name: base.get(name, {}) | parts.get(name, {}) for name in base | parts})


def population(attributes: bool = False) -> Population:
    data, _ = synthetic(N_USERS, N_ITEMS, clusters=3, interactions_per_user=7, seed=3)
    own = torch.arange(N_USERS * 3).reshape(N_USERS, 3).remainder(5).float() / 5 if attributes else None
    return Population(torch.tensor(data.offsets), torch.tensor(data.items), N_ITEMS, own)


LAYOUT = BroadcastLayout.of(PerFedRecPP(settings()))


class Twins:
    """A simulated and a Flower federation with the same keys; node 100 + i hosts ``sizes[i]`` users.

    With ``apart`` the neighbourhood service is a node of its own, and the coordinator holds neither tokens nor reports.
    """

    def __init__(
        self,
        config: PerFedRecSettings,
        sizes: Iterable[int],
        tamper: Callable[[Message], Message | None] | None = None,
        attributes: bool = False,
        apart: bool = False,
        algorithm: Any = None,
    ) -> None:
        self.algorithm = algorithm or PerFedRecPP(config)
        self.population = population(attributes)
        degrees = torch.bincount(self.population.items, minlength=N_ITEMS)
        self.kinds = torch.arange(N_ITEMS * 2).reshape(N_ITEMS, 2).remainder(3).float() if attributes else None
        self.n_attributes = 3 if attributes else 0
        spec = Spec(N_USERS, N_ITEMS, degrees, self.n_attributes, self.kinds)
        self.population.init_clients(self.algorithm, SEED)
        self.simulated = self.algorithm.init(spec, Key(SEED).fold("init"))
        self.flower = self.algorithm.init(spec, Key(SEED).fold("init"))
        shuffled = (torch.arange(N_USERS) * 16 + 5) % N_USERS  # 16 and 23 have no common divisor
        self.hosts = {100 + i: users.sort().values for i, users in enumerate(shuffled.split(list(sizes)))}
        self.nodes = {node: Hosted.part(self.population, users) for node, users in self.hosts.items()}
        for node in self.nodes.values():
            node.init_clients(self.algorithm, SEED)
        self.service, self.service_client, bundles = None, None, dict[int, Bundle]()
        if apart:
            private = bytes(range(32))
            bundles = {node: Bundle(b"s" * 32, public_of(private), bytes([node]) * 32) for node in self.nodes}
            self.service = NeighbourhoodService(self.algorithm, private, public_of(bundles[100].common))
            self.service_client, self.bundles = ServiceClient(SERVICE), bundles
            self.simulated = replace(self.simulated, tokens=bundles[100].tokens(N_ITEMS))
            self.flower = replace(self.flower, tokens=None)
        apps = {
            node: client_app(self.algorithm, held, BroadcastLayout.of(self.algorithm), SEED, bundles.get(node))
            for node, held in self.nodes.items()
        }
        if self.service is not None:
            apps[SERVICE] = self.service.app()
        self.grid = MemoryGrid(apps, tamper)

    def simulate(self, block_size: int = 10) -> simulator.RoundReport:
        self.simulated, report = simulator.play_round(
            self.algorithm, self.simulated, self.population, SEED, block_size=block_size
        )
        return report

    def play(self, rejected: list[Rejection] | None = None) -> simulator.RoundReport:
        federation = Federation(
            self.algorithm,
            N_ITEMS,
            SEED,
            deadline=0.0,
            item_attributes=self.kinds,
            n_user_attributes=self.n_attributes,
            service_client=self.service_client,
        )
        directory = Directory(torch.arange(N_USERS), self.hosts)
        self.flower, report = play_round(self.grid, federation, directory, self.flower, rejected)
        return report

    def difference(self) -> float:
        """The largest difference between the two, over all tensors of the server's state and all users' states."""
        pairs = list(pair(flatten(self.simulated)[0], flatten(self.flower)[0]))
        for users, node in ((self.hosts[name], each) for name, each in self.nodes.items()):
            _, places = self.population.rows(users)
            _, own = node.rows(users)
            pairs += pair(
                flatten(self.population.load_client_states(users, places))[0],
                flatten(node.load_client_states(users, own))[0],
            )
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def pair(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert a[name].dtype == b[name].dtype, name
        yield a[name], b[name]
