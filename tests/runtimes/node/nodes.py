"""Files of nodes that a simulation has trained, for tests of what is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from perfedrec.data import Dataset
from perfedrec.runtimes.node import Store, serving_broadcast
from perfedrec.runtimes.simulator import Simulator


def write_node(simulator: Simulator[Any, Any, Any], dataset: Dataset, users: Tensor, rounds: int, path: Path) -> None:
    """A node's file with some ``users`` of a simulation, their client states and its model after ``rounds``."""
    ids = dataset.train.user_ids[users.numpy()]
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids.tolist()))
    numbers = {str(name): place for name, place in zip(ids, users.tolist(), strict=True)}
    with Store.create(path, dataset.train.item_ids, secret=b"s" * 32) as store:
        store.import_interactions(frame, identities=numbers)
        store.join_run(simulator.algorithm, "simulated")
        _, positions = simulator.population.rows(users)
        store.save_client_states(users, positions, simulator.population.load_client_states(users, positions))
        broadcast = serving_broadcast(simulator.algorithm, simulator.state, users)
        store.receive(broadcast, users, "simulated", rounds, "", simulator.algorithm.inference)
