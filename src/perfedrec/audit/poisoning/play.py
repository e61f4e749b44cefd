"""An attack on a run's own data and method, in simulation: the run is trained again with malicious clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from perfedrec.audit.poisoning.adversary import Adversary, Known
from perfedrec.audit.poisoning.attacks import ATTACKS
from perfedrec.audit.poisoning.clients import draw_targets, n_malicious, named_targets, with_clients
from perfedrec.audit.poisoning.exposure import Exposure, measure
from perfedrec.audit.poisoning.hostile import Bound, Hostile
from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.core.sampling import choose
from perfedrec.core.settings import Settings
from perfedrec.data import Dataset
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.config import Config
from perfedrec.runs.engine import engine_of
from perfedrec.runs.progress import Progress
from perfedrec.runs.rounds import Rounds

Told = Callable[[Progress], None]
"""Told after each round how far a training is."""


class Scenario(Settings):
    """What an adversary has and wants."""

    share: float = Field(0.01, gt=0, le=1, description="malicious clients, as a share of the honest users")
    n_targets: int = Field(1, ge=1, description="number of target items, drawn among those with few users")
    targets: tuple[str, ...] = Field((), description="ids of the target items, instead of drawn ones")
    bound: Bound = Field(
        "kept", description="whether malicious clients keep the bound on what a client may send (kept or ignored)"
    )
    length: float = Field(
        10.0,
        gt=0,
        description="length of what a malicious client sends: as a multiple of honest work or, where it "
        "ignores the bound, of the bound",
    )
    before: float = Field(
        100.0, gt=0, description="how many clients a malicious client counts for in phases before training"
    )
    list_length: int = Field(
        0, ge=0, description="items that a malicious client claims to have, targets included (0: as many as others)"
    )
    public: float = Field(
        0.05, gt=0, le=1, description="share of honest users whose lists are public, if an attack needs them"
    )
    k: int = Field(20, ge=1, description="length of the lists in which the targets shall stand")


def poisoned(
    config: Config,
    dataset: Dataset,
    attack: str | None,
    share: float = 0.01,
    seed: int = 0,
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    told: Told = lambda progress: None,
) -> Exposure:
    """Train the method of ``config`` on the ``dataset`` with malicious clients, and measure the best round.

    ``attack`` is a name of :data:`ATTACKS`; ``None`` for the same without an attack. ``share`` is that of the malicious
    clients and replaces the one of the ``scenario``. ``options`` are those of the attack. The best round is chosen by
    validation items, of which malicious clients may invent some. Raises :class:`ConfigError` for a centralised method,
    an unknown attack, and options that it does not have.
    """
    scenario = (scenario or Scenario()).model_copy(update={"share": share})
    run = config.run.model_copy(update={"seed": seed, "device": "cpu", "workers": 0})
    algorithm = config.model_copy(update={"run": run}).build()
    if isinstance(algorithm, Method):
        raise ConfigError(
            f"{config.algorithm} is centralised: it has no clients that could lie; expected a federated method"
        )
    targets, trained, data = targets_of(dataset, scenario, seed), algorithm, dataset
    if attack is not None:
        adversary = make(attack, known_of(dataset, attack, targets, scenario, seed), options or {})
        n = n_malicious(dataset.n_users, scenario.share)
        data = with_clients(dataset, adversary.lists(n), adversary.held_out(n))
        hostile = Hostile(trained, adversary, dataset.n_users, scenario.bound, scenario.length, scenario.before)
        trained = cast(AnyAlgorithm, hostile)
    rounds = Rounds(engine_of(cast(Any, trained), data, run), data, run)
    while not rounds.progress.over:
        rounds.play()
        told(rounds.progress)
    return measure(rounds.finish(), data, dataset.n_users, targets, scenario.k, rounds.best_round)


def targets_of(dataset: Dataset, scenario: Scenario, seed: int) -> Tensor:
    """int64 [t] the targets that a scenario names, or those that are drawn by ``seed``."""
    if scenario.targets:
        return named_targets(dataset, scenario.targets)
    return draw_targets(dataset, scenario.n_targets, seed)


def known_of(dataset: Dataset, attack: str, targets: Tensor, scenario: Scenario, seed: int) -> Known:
    """What the adversary of an ``attack`` knows of the data, and nothing else."""
    kind, train, key = kind_of(attack), dataset.train, Key(seed).fold("adversary")
    popular, public = None, None
    if "popularity" in kind.knows:
        popular = torch.from_numpy(np.argsort(-train.item_degrees, kind="stable").copy())
    if "public" in kind.knows:
        users = choose(train.n_users, max(round(scenario.public * train.n_users), 1), key.fold("public"))
        lists = [train.items[train.offsets[each] : train.offsets[each + 1]] for each in users.tolist()]
        public = [torch.from_numpy(each.copy()) for each in lists]
    length = scenario.list_length or max(round(train.n_interactions / train.n_users), 1)
    return Known(train.n_items, min(length, train.n_items), targets, key, popular, public)


def kind_of(attack: str) -> type[Adversary]:
    """The class of an attack. Raises :class:`ConfigError` for an unknown name."""
    if attack not in ATTACKS:
        raise ConfigError(
            f"there is no attack {attack!r}; expected one of {', '.join(ATTACKS)}{nearest(attack, ATTACKS)}"
        )
    return ATTACKS[attack]


def make(attack: str, known: Known, options: Mapping[str, Any]) -> Adversary:
    """The adversary of an ``attack`` with its ``options``. Raises :class:`ConfigError` for options that it does not
    have."""
    return kind_of(attack)(known, make_options(attack, options))


def make_options(attack: str, options: Mapping[str, Any]) -> Settings:
    """The checked ``options`` of an ``attack``. Raises :class:`ConfigError` for options that it does not have."""
    kind = kind_of(attack).Options
    try:
        return kind(**options)
    except ValidationError as error:
        has = ", ".join(kind.model_fields) or "none"
        raise ConfigError(f"attack {attack} (options: {has}): {explain(error.errors(), kind)}") from None
