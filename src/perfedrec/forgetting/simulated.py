"""A run as it is after its training, in a simulator again: what the methods of forgetting start from."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.data import Dataset
from perfedrec.runs.config import RunSettings
from perfedrec.runs.folder import Entry
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.simulator import PersonalRecommender, Simulator

CHOSEN = ("mix", "beta", "turn")
"""Fields of a server state that hold what held-out items have chosen."""

Trained: TypeAlias = PersonalRecommender[Any, Any, Any]
"""The recommender of a finished run of any method."""


@dataclass(frozen=True)
class Played:
    """What a method made: the recommender, the rounds that clients played for it, and the seconds."""

    recommender: Trained
    entries: list[Entry]
    seconds: float


def simulated(algorithm: AnyAlgorithm, left: Dataset, run: RunSettings) -> Simulator[Any, Any, Any]:
    """The simulator of a run on the data that are ``left``, before its first round."""
    return Simulator(
        algorithm, left, seed=run.seed, device="cpu", block_size=run.block_size, dropout_rate=run.dropout_rate
    )


def chosen_as(state: Any, before: Any) -> Any:
    """The state with what held-out items have chosen in the state ``before``: nobody is asked again."""
    names = {each.name for each in fields(state)} & set(CHOSEN)
    return replace(state, **{name: getattr(before, name) for name in names})


def adopt(population: Population[Any], before: Trained, absent: Tensor | None) -> None:
    """Give the users of a ``population`` their client states in the model ``before``; forgotten users keep a first
    state, which nothing was ever trained into."""
    everyone = population.everyone()
    for users in (everyone if absent is None else everyone[~absent]).split(1024):
        _, old = before.population.rows(users)
        _, new = population.rows(users)
        population.save_client_states(users, new, before.population.load_client_states(users, old))


def rounds(simulator: Simulator[Any, Any, Any], number: int) -> list[Entry]:
    """Play a ``number`` of rounds, and return their entries in a history."""
    found = []
    for _ in range(number):
        start = time.perf_counter()
        report = simulator.play()
        found.append(Entry(report, time.perf_counter() - start))
    return found


def touched_items(before: Trained, gone: Tensor) -> Tensor:
    """[m] whether a user of ``gone`` [k] has each item, in the data of the model ``before``."""
    touched = torch.zeros(before.n_items, dtype=torch.bool)
    touched[before.population.rows(gone)[0].items] = True
    return touched
