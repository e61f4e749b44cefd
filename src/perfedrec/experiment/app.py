"""The app that ``deploy/flower-app`` names: a whole run on the virtual nodes of Flower's simulation engine.

It computes what ``perfedrec train`` computes in one process, with the same seed, bit for bit.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from perfedrec import __version__
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.settings import Settings
from perfedrec.data import Catalogue
from perfedrec.experiment import checkpoint
from perfedrec.experiment.config import Config, explain, load
from perfedrec.experiment.federation import deal_out, parted
from perfedrec.experiment.methods import centralised, method
from perfedrec.experiment.node import build
from perfedrec.experiment.progress import Lines, Standing
from perfedrec.experiment.run import Entry, open_data, write_settings
from perfedrec.experiment.serve import Roll, summarised, told
from perfedrec.runtimes.flower import Coordinator, Directory, Setup
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
        raise ConfigError("run-config: " + "; ".join(explain(entry, Options) for entry in error.errors())) from None


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


def play(grid: Any, given: Mapping[str, Any]) -> None:
    """Deal a data set out to the nodes of a Flower grid, train with them and give them the model.

    ``output`` becomes a run folder as :func:`perfedrec.experiment.serve.serve` writes it, with the nodes' stores under
    ``nodes/n0/``, .... Raises :class:`PerfedrecError` as soon as a node fails: in a simulation that is a mistake.
    """
    chosen = options(given)
    config, output = resolved(chosen), Path(chosen.output)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output.absolute()} is not empty; expected a new folder as output")
    algorithm, dataset = config.build(), open_data(config.data)
    train = dataset.train
    places = partitions(grid, ANSWER_SECONDS)
    parts, catalogue = parted(train, len(places)), Catalogue.of(dataset, config.attributes)
    deal_out(output / NODES, dataset, catalogue, parts)
    items = catalogue.item_attributes
    setup = Setup(output.absolute().name, told(config, algorithm), catalogue.fingerprint, __version__)
    coordinator = Coordinator(
        grid,
        algorithm,
        setup,
        train.n_items,
        config.run.seed,
        ANSWER_SECONDS,
        item_attributes=None if items is None else torch.tensor(items.values),
        n_user_attributes=catalogue.n_user_attributes,
    )
    hosts = {node: torch.from_numpy(parts[place]) for node, place in places.items()}
    coordinator.directory = Directory(torch.arange(train.n_users), hosts)

    write_settings(output, config)
    standing, reporter = Standing(config.run.rounds + len(algorithm.prelude), config.run.select_by), Lines()
    state = coordinator.begin()
    _whole(coordinator, places)
    with open(output / "metrics.jsonl", "a", encoding="utf-8") as history:
        while standing.done < standing.total:
            start = time.perf_counter()
            state, report = coordinator.play(state)
            _whole(coordinator, places)
            standing.count(report, seconds := time.perf_counter() - start)
            print(json.dumps(Entry(report, seconds).line()), file=history, flush=True)
            reporter.round(standing)

    extra = {"best_round": config.run.rounds, "valid": {}}
    records = {"state": algorithm.serving(state), "roll": Roll(coordinator.directory.identities)}
    belongs = {"catalogue": setup.catalogue}
    checkpoint.save(output / "model", records, belongs, extra)
    took = [f"n{place}" for place in sorted(places[node] for node in coordinator.hand_out(state))]
    summary = summarised(config, algorithm, standing, train.n_users, took, "simulated")
    checkpoint.write_atomic(output / "result.json", json.dumps(summary, indent=1).encode())


def _whole(coordinator: Coordinator, places: Mapping[int, int]) -> None:
    """Raises :class:`PerfedrecError` where a round went on without a node."""
    for each in coordinator.rejected:
        raise PerfedrecError(f"round {each.round}: virtual node n{places[each.node]}: {each.reason}: {each.detail}")


def _hosted(given: Mapping[str, Any], partition: int) -> tuple[Store, int]:
    chosen = options(given)
    return _store(Path(chosen.output), partition), chosen.seed


def _store(output: Path, partition: int) -> Store:
    return Store.open(output / NODES / f"n{partition}" / "store.db")


client = virtual_client(_hosted, build)
server = virtual_server(play)
