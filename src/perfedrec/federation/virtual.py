"""The app that ``deploy/flower-app`` names: a whole run on the virtual nodes of Flower's simulation engine.

It computes what ``perfedrec train`` computes in one process, with the same seed, bit for bit.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.settings import Settings
from perfedrec.core.types import RoundReport
from perfedrec.data import Catalogue
from perfedrec.federation.coordinator import Run
from perfedrec.federation.local import deal_out, parted
from perfedrec.federation.model_file import build
from perfedrec.methods.registry import centralised, method
from perfedrec.runs import checkpoint
from perfedrec.runs.config import Config, explain, load
from perfedrec.runs.progress import Lines
from perfedrec.runs.training import open_data
from perfedrec.runtimes.flower import Coordinator, Directory
from perfedrec.runtimes.flower.virtual import partitions, virtual_client, virtual_server
from perfedrec.runtimes.node import Store

NODES = "nodes"
"""Folder of a run with the stores of its virtual nodes."""

ANSWER_SECONDS = 600.0
"""How long a round of all virtual nodes may take: a worker has many of them to work through."""


class Options(Settings):
    """The run's options, as ``flwr run --run-config`` gives them; what they are by default is in the app's folder."""

    data: str
    output: str
    preset: str
    privacy: str
    set: str
    rounds: int
    seed: int


def options(given: Mapping[str, Any]) -> Options:
    """Raises :class:`ConfigError` with what is wrong."""
    try:
        return Options.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError("run-config: " + explain(error.errors(), Options)) from None


def resolved(given: Options) -> Config:
    """The configuration of a run."""
    values: dict[str, Any] = {"data__path": given.data, "run__rounds": given.rounds, "run__seed": given.seed}
    try:
        overrides = shlex.split(given.set)
    except ValueError as error:
        raise ConfigError(f"run-config: set = {given.set!r}: {error}; expected section.key=value, ...") from None
    config = load(given.preset, None, overrides, privacy=given.privacy or None, run__device="cpu", **values)
    if centralised(method(config.algorithm)):
        raise ConfigError(f"{config.algorithm} is centralised: it has no nodes; expected a federated method")
    return config


@dataclass
class Strict(Coordinator):
    """A coordinator that goes on without nobody: in a simulation a node that fails is a mistake. ``names`` of nodes."""

    names: Mapping[int, str] = field(default_factory=dict)

    def begin(self) -> Any:
        state = super().begin()
        self._check()
        return state

    def play(self, state: Any) -> tuple[Any, RoundReport]:
        after = super().play(state)
        self._check()
        return after

    def _check(self) -> None:
        for each in self.rejected:
            raise PerfedrecError(
                f"round {each.round}: virtual node {self.names[each.node]}: {each.reason}: {each.detail}"
            )


def play(grid: Any, given: Mapping[str, Any]) -> None:
    """Deal a data set out to the nodes of a Flower grid, train with them and give them the model.

    ``output`` becomes a run folder as :func:`perfedrec.federation.coordinator.serve` writes it, with the nodes' stores under
    ``nodes/n0/``, .... A run with a checkpoint in it goes on. Raises :class:`PerfedrecError` as soon as a node fails.
    """
    chosen = options(given)
    config, output = resolved(chosen), Path(chosen.output)
    resume = bool(checkpoint.folders(output / "checkpoints"))
    if output.exists() and any(output.iterdir()) and not resume:
        raise ConfigError(
            f"{output.absolute()} is not empty, and no run with a checkpoint; expected a new folder as output"
        )
    algorithm, dataset = config.build(), open_data(config.data)
    train = dataset.train
    places = partitions(grid, ANSWER_SECONDS)
    parts, catalogue = parted(train, len(places)), Catalogue.of(dataset, config.attributes)
    if resume and (dealt := sum(1 for _ in (output / NODES).iterdir())) != len(places):
        raise ConfigError(f"{output.absolute()} is a run with {dealt} nodes; expected as many, and not {len(places)}")
    run = Run(config, algorithm, catalogue, output, output.absolute().name, resume, dataset.fingerprint)
    if not resume:
        deal_out(output / NODES, dataset, catalogue, parts)
    items, names = catalogue.item_attributes, {node: f"n{place}" for node, place in sorted(places.items())}
    coordinator = Strict(
        grid,
        algorithm,
        run.setup,
        train.n_items,
        config.run.seed,
        ANSWER_SECONDS,
        item_attributes=None if items is None else torch.tensor(items.values),
        n_user_attributes=catalogue.n_user_attributes,
        names=names,
    )
    hosts = {node: torch.from_numpy(parts[place]) for node, place in places.items()}
    coordinator.directory = Directory(torch.arange(train.n_users), hosts)
    reporter = Lines()
    run.begin(coordinator, coordinator.directory.identities)
    while run.standing.done < run.standing.total:
        run.step(coordinator, names, print)
        reporter.round(run.standing)
    took = sorted(places[node] for node in coordinator.hand_out(run.state))
    run.finish([f"n{place}" for place in took], "simulated")


def _hosted(given: Mapping[str, Any], partition: int) -> tuple[Store, int]:
    chosen = options(given)
    return _store(Path(chosen.output), partition), chosen.seed


def _store(output: Path, partition: int) -> Store:
    return Store.open(output / NODES / f"n{partition}" / "store.db")


client = virtual_client(_hosted, build)
server = virtual_server(play)
