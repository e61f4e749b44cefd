"""The app that ``deploy/flower-app`` names: a whole run on the virtual nodes of Flower's simulation engine.

It computes what ``perfedrec train`` computes in one process with the same seed, bit for bit.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.mistakes import explain
from perfedrec.core.settings import Settings
from perfedrec.core.types import RoundReport
from perfedrec.data import Catalogue, Dataset
from perfedrec.federation.agreement import build, federated
from perfedrec.federation.local import deal_out, parted
from perfedrec.federation.run import FederatedRun
from perfedrec.runs.config import Config, load, open_data
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Lines
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.flower import Answers, Coordinator, Directory, Federation
from perfedrec.runtimes.flower.virtual import partitions, virtual_client, virtual_server
from perfedrec.runtimes.node import Store

NODES = "nodes"
"""Folder of a run with the stores of its virtual nodes."""

ANSWER_SECONDS = 600.0
"""How long a round of all virtual nodes may take: each worker plays many of them, one after the other."""


class Options(Settings):
    """The run's options, as ``flwr run --run-config`` gives them. Their defaults are in the app's folder."""

    data: str
    output: str
    preset: str
    privacy: str
    set: str
    rounds: int
    seed: int


def options(given: Mapping[str, Any]) -> Options:
    """The options of a run. Raises :class:`ConfigError` that names what is wrong."""
    try:
        return Options.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError("run-config: " + explain(error.errors(), Options)) from None


def resolved(given: Options) -> Config:
    """The configuration of a run. Raises :class:`ConfigError` that names what is wrong."""
    values: dict[str, Any] = {"data__path": given.data, "run__rounds": given.rounds, "run__seed": given.seed}
    try:
        overrides = shlex.split(given.set)
    except ValueError as error:
        raise ConfigError(f"run-config: set = {given.set!r}: {error}; expected section.key=value, ...") from None
    return load(given.preset, None, overrides, privacy=given.privacy or None, run__device="cpu", **values)


@dataclass
class Strict(Coordinator):
    """A coordinator that plays no round without a node: in a simulation a node that fails is a mistake.

    ``names`` are those of all nodes.
    """

    names: Mapping[int, str] = field(default_factory=dict)

    def begin(self) -> Any:
        state = super().begin()
        self._check()
        return state

    def play(self, state: Any) -> tuple[Any, RoundReport]:
        after = super().play(state)
        self._check()
        return after

    def evaluate(self, served: Any, question: Question) -> Answers:
        answers = super().evaluate(served, question)
        self._check()
        return answers

    def _check(self) -> None:
        for each in self.rejected:
            raise PerfedrecError(
                f"round {each.round}: virtual node {self.names[each.node]}: {each.reason}: {each.detail}"
            )


def play(grid: Any, given: Mapping[str, Any]) -> None:
    """Train with the nodes of a Flower ``grid``, by the options ``given``, and give the nodes the model.

    The users of the data set are dealt out to the nodes. ``output`` becomes a run folder like that of
    :func:`perfedrec.federation.coordinator.serve`, with the nodes' stores under ``nodes/n0/`` and so on. A run that has
    a checkpoint there is resumed. Raises :class:`PerfedrecError` as soon as a node fails.
    """
    chosen = options(given)
    config, output = resolved(chosen), RunFolder(Path(chosen.output))
    algorithm, resume = federated(config), _is_resumed(output)
    dataset = open_data(config.data, config.attributes)
    places = partitions(grid, ANSWER_SECONDS)
    parts, catalogue = parted(dataset.train, len(places)), Catalogue.of(dataset, config.attributes)
    if resume and (before := sum(1 for _ in (output.path / NODES).iterdir())) != len(places):
        raise ConfigError(
            f"{output.path.absolute()} is a run with {counted(before, 'node')}; expected the same number, and not "
            f"{len(places)}"
        )
    name = output.path.absolute().name
    run = FederatedRun(config, algorithm, catalogue, output, name, resume, dataset.fingerprint)
    if not resume:
        deal_out(output.path / NODES, dataset, catalogue, parts, held_out=run.evaluation.rule is not None)
    names = {node: f"n{place}" for node, place in sorted(places.items())}
    coordinator = _coordinator(grid, run, dataset, catalogue, names)
    hosts = {node: torch.from_numpy(parts[place]) for node, place in places.items()}
    coordinator.directory = Directory(torch.arange(dataset.n_users), hosts)
    with output.locked():
        run.begin(coordinator, coordinator.directory.identities)
        reporter = Lines()
        while not run.progress.over:
            run.play(coordinator, names, print)
            reporter.round(run.progress)
        test = run.test(coordinator, names, print)
        took = sorted(places[node] for node in coordinator.hand_out(run.best))
        run.finish([f"n{place}" for place in took], "simulated", test=test)


def _is_resumed(output: RunFolder) -> bool:
    """Whether there is a run to resume in a folder. Raises :class:`ConfigError` where there is something else."""
    if output.checkpoints():
        return True
    if output.path.exists() and any(output.path.iterdir()):
        raise ConfigError(
            f"{output.path.absolute()} is not empty, and has no run with a checkpoint; expected a new folder as output"
        )
    return False


def _coordinator(
    grid: Any, run: FederatedRun, dataset: Dataset, catalogue: Catalogue, names: Mapping[int, str]
) -> Strict:
    """The coordinator of a run over the engine's grid; it is the neighbourhood service as well."""
    items = catalogue.item_attributes
    federation = Federation(
        run.algorithm,
        dataset.n_items,
        run.config.run.seed,
        run.setup,
        ANSWER_SECONDS,
        item_attributes=None if items is None else torch.tensor(items.values),
        n_user_attributes=catalogue.n_user_attributes,
        keeper=run.keeper(names),
    )
    return Strict(grid, federation, names)


def _hosted(given: Mapping[str, Any], partition: int) -> tuple[Store, int]:
    """The store of a partition, by the run's options, and the seed of the run."""
    chosen = options(given)
    return Store.open(Path(chosen.output) / NODES / f"n{partition}" / "store.db"), chosen.seed


client = virtual_client(_hosted, build)
server = virtual_server(play)
