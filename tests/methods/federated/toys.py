"""Small populations and states that the tests of algorithms and runtimes share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.types import RoundReport, Rows, Spec, Update
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.methods.federated.state import PerFedRecClient, PerFedRecState
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import play_round

SEED = 3

BASE: dict[str, dict[str, Any]] = {
    "model": {"embedding_dim": 6, "refresh_every": 2},
    "client": {"user_learning_rate": 0.05, "n_negatives": 5},
    "server": {"learning_rate": 0.05},
    "clusters": {"n_clusters": 3, "start": 1, "every": 2},
    "selection": {"n_clients_per_round": 12},
    "pretraining": {"kind": "none", "batch_size": 16},
}


def settings(**changes: Any) -> PerFedRecSettings:
    """BASE with changes such as ``client__loss="softmax"``."""
    parts = {name: dict(part) for name, part in BASE.items()}
    for name, value in changes.items():
        section, _, option = name.partition("__")
        parts.setdefault(section, {})[option] = value
    return PerFedRecSettings(**parts)


def population(n_users: int = 30, n_items: int = 24, seed: int = 0, attributes: bool = False) -> Population:
    """Users of two tastes with 1 to 8 items each."""
    generator = np.random.default_rng(seed)
    lists = []
    for user in range(n_users):
        near = np.arange(n_items) // (n_items // 2) == user % 2
        chances = np.where(near, 5.0, 1.0) * (1 + np.arange(n_items) % 3)
        size = generator.integers(1, 9)
        lists.append(np.sort(generator.choice(n_items, size, replace=False, p=chances / chances.sum())))
    offsets = torch.tensor(np.cumsum([0] + [each.size for each in lists]))
    own = torch.from_numpy(generator.random((n_users, 3)).astype(np.float32)) if attributes else None
    return Population(offsets, torch.from_numpy(np.concatenate(lists)), n_items, own)


@dataclass
class World:
    algorithm: PerFedRec
    state: PerFedRecState
    population: Population

    def play(self, rounds: int, **options: Any) -> list[RoundReport]:
        reports = []
        for _ in range(rounds):
            self.state, report = play_round(self.algorithm, self.state, self.population, SEED, **options)
            reports.append(report)
        return reports

    def block(self, users: list[int] | Tensor) -> tuple[Any, Rows, PerFedRecClient]:
        """Broadcast, rows and client states of some users."""
        which = torch.as_tensor(users)
        rows, positions = self.population.rows(which)
        return self.algorithm.broadcast(self.state, which), rows, self.population.load_client_states(which, positions)

    def train(self, users: list[int] | Tensor) -> tuple[Update, PerFedRecClient]:
        """One training round of some users under ``Key(SEED)``; it does not change the world."""
        return protected(self.algorithm, "train", *self.block(users), Key(SEED))

    def scores(self) -> Tensor:
        return self.algorithm.scores(*self.block(self.population.everyone()))


def protected(algorithm: Any, phase: str, *given: Any) -> tuple[Update, Any]:
    """What clients send, with protection, and their new client states. The last argument is the key."""
    update, after = algorithm.client(phase, *given)
    return algorithm.protection.upload(phase, update, given[-1]), after


def cluster_table(broadcast: Any, group: int) -> Tensor:
    """[m, d] the model of a cluster."""
    every = torch.arange(broadcast.items.shape[0])
    return broadcast.tables.rows(every, torch.full_like(every, group))


def world(plus: bool = True, attributes: bool = False, **changes: Any) -> World:
    """A population with a new server state and new client states."""
    people = population(attributes=attributes)
    algorithm = (PerFedRecPP if plus else PerFedRec)(settings(model__attributes=attributes, **changes))
    given = torch.rand(people.n_items, 4, generator=torch.Generator().manual_seed(5)) if attributes else None
    spec = Spec(
        people.n_users,
        people.n_items,
        torch.bincount(people.items, minlength=people.n_items),
        n_user_attributes=3 if attributes else 0,
        item_attributes=given,
    )
    state = algorithm.init(spec, Key(SEED).fold("init"))
    people.init_clients(algorithm, SEED)
    return World(algorithm, state, people)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Assert that two records are equal bit by bit."""
    for field in fields(a):
        left, right, name = getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}"
        if isinstance(left, Tensor):
            assert isinstance(right, Tensor), name
            assert torch.equal(left, right), f"{name} differs by {(left.double() - right.double()).abs().max()}"
        elif hasattr(left, "__dataclass_fields__"):
            assert_same(left, right, name)
        else:
            assert left == right, name


def of_user(update: Update, place: int) -> dict[str, Tensor]:
    """What the user at position ``place`` of the block sent, rows in ascending order of items."""
    assert update.segments is not None
    assert update.items is not None
    assert update.deltas is not None
    mine = update.segments == place
    order = update.items[mine].argsort()
    sent = {"items": update.items[mine][order], "deltas": update.deltas[mine][order]}
    sent |= {"weights": update.weights[place], "groups": update.groups[place]}
    for name in ("dense", "reports"):
        value = getattr(update, name)
        if value is not None:
            sent[name] = value[place]
    return sent


def of_client(client_state: PerFedRecClient, rows: Rows, place: int) -> dict[str, Tensor]:
    """The client state of the user at position ``place`` of the block."""
    names = ("private", "first", "second", "steps", "mix", "loss")
    return {name: getattr(client_state, name)[place] for name in names} | {
        "rows": client_state.rows[rows.segments == place]
    }
