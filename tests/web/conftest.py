"""A node's file with a small model, people, titles and covers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from perfedrec.data import load
from perfedrec.data.details import Details
from perfedrec.federation import invented
from perfedrec.federation.owner import Node
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.node import Store, serving_broadcast
from perfedrec.runtimes.simulator import Simulator

DATA = "synthetic:users=120,items=90,clusters=3,interactions_per_user=12,strength=0.95,seed=4"
OPTIONS: dict[str, Any] = {
    "model": {"embedding_dim": 16, "refresh_every": 2},
    "pretraining": {"kind": "spectral"},
    "clusters": {"n_clusters": 3, "start": 1, "every": 2},
    "selection": {"n_clients_per_round": 60},
    "privacy": {"aggregation": "secure", "norm": "l2", "clip": 10.0},
}
PEOPLE = ("ann", "Bo / Béla")


def make_home(path: Path) -> None:
    """A node with the first users of a simulation, under names of people; odd items have covers."""
    dataset = load(DATA)
    simulator = Simulator(PerFedRecPP(PerFedRecPP.Options.model_validate(OPTIONS)), dataset, seed=5, device="cpu")
    for _ in range(simulator.n_phases + 3):
        simulator.play()
    ids, users = dataset.train.user_ids[: len(PEOPLE)], torch.arange(len(PEOPLE))
    names = dict(zip(ids.tolist(), PEOPLE, strict=True))
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids.tolist()))
    frame = frame.with_columns(pl.col("user").replace_strict(names, return_dtype=pl.String))
    with Store.create(path, dataset.train.item_ids, secret=b"s" * 32) as store:
        store.import_interactions(frame, identities={name: place for place, name in enumerate(PEOPLE)})
        store.join_run(simulator.algorithm, "simulated")
        _, positions = simulator.population.rows(users)
        store.save_client_states(users, positions, simulator.population.load_client_states(users, positions))
        broadcast = serving_broadcast(simulator.algorithm, simulator.state, users)
        store.receive(broadcast, users, "simulated", 3, "", simulator.algorithm.inference)
    assert dataset.truth is not None
    genres = dataset.truth.item_clusters.tolist()
    with Node.open(path) as node:
        node.describe(
            Details(
                str(item),
                title,
                ("image/png", invented.cover(number, genre)) if number % 2 else None,
                {"genre": invented.GENRES[genre]},
            )
            for number, (item, title, genre) in enumerate(
                zip(dataset.train.item_ids.tolist(), invented.titles(genres), genres, strict=True)
            )
        )


@pytest.fixture(scope="session")
def home_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("home") / "home.node"
    make_home(path)
    return path.read_bytes()


@pytest.fixture(scope="session")
def new_home(home_template: bytes) -> Callable[[Path], Path]:
    """A function that puts a copy of the node's file into a folder."""

    def copy(folder: Path) -> Path:
        path = folder / "home.node"
        path.write_bytes(home_template)
        return path

    return copy


@pytest.fixture(scope="session")
def genres() -> np.ndarray[Any, Any]:
    """The genre of each item, by number."""
    truth = load(DATA).truth
    assert truth is not None
    return np.array(invented.GENRES)[truth.item_clusters]
