"""Several attacks on a finished run, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from perfedrec.audit.poisoning.clients import n_malicious
from perfedrec.audit.poisoning.exposure import Exposure, measure
from perfedrec.audit.poisoning.play import Scenario, kind_of, make_options, poisoned, targets_of
from perfedrec.audit.poisoning.record import Attacked, Outcome
from perfedrec.core.errors import ConfigError, DivergedError
from perfedrec.data import Dataset
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.config import Config
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Progress
from perfedrec.runs.result import Result, open_run

Doing = Callable[[str, Progress], None]
"""Told after each round what is trained, and how far it is."""

FIRST = ("popular", "pieck-uea", "collusion")
"""The attacks that are made where none are named: one through honest clients, one without knowledge, and the strongest
one."""


def attack(
    folder: Path,
    attacks: Sequence[str] = FIRST,
    shares: Sequence[float] = (0.01,),
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    rounds: int | None = None,
    data: str | None = None,
    doing: Doing = lambda what, progress: None,
) -> Attacked:
    """Train a finished run again with malicious clients, once for each of the ``attacks`` and ``shares``, and write the
    figures to ``attack.json`` in its ``folder`` after each. Those of other attacks and shares stay there, if all else
    is the same; a record of another scenario is set aside as ``attack-1.json``, ``attack-2.json`` and so on.

    ``options`` are those of a single attack. With ``rounds``, all trainings have this number of rounds, also the one
    without an attack, which otherwise is the run's own model. Raises :class:`ConfigError` for a centralised method, a
    federation, an unknown attack or option, and a share that is not above 0 and at most 1.
    """
    scenario = scenario or Scenario()
    _check(folder, attacks, shares, options or {}, rounds)
    result, config = open_run(folder, data, "cpu")
    if isinstance(config.build(), Method):
        raise ConfigError(
            f"{folder}: {config.algorithm} is centralised: it has no clients that could lie; expected a run of a "
            "federated method"
        )
    dataset, seed = result.dataset, config.run.seed
    targets = targets_of(dataset, scenario, seed)
    before, config = _before(result, config, scenario, rounds, doing)
    record = Attacked(
        targets=tuple(str(dataset.train.item_ids[each]) for each in targets.tolist()),
        target_users=tuple(int(dataset.train.item_degrees[each]) for each in targets.tolist()),
        scenario=scenario.model_dump(exclude={"share", "targets"}),
        seed=seed,
        rounds=config.run.rounds,
        chance=min(scenario.k / dataset.n_items, 1.0),
        before=before,
        outcomes=(),
    )
    kept = False
    for name in attacks:
        for share in shares:
            what = f"{name}, {share:.3g} malicious"
            after: Exposure | None = None
            with suppress(DivergedError):  # the attack has ended the training
                after = poisoned(config, dataset, name, share, seed, scenario, options, partial(doing, what))
            chosen = {each: str(value) for each, value in (options or {}).items()}
            outcome = Outcome(name, share, n_malicious(dataset.n_users, share), after, chosen)
            record, kept = (record if kept else record.continued(folder)).having(outcome), True
            record.write(folder)
    return record


def _check(
    folder: Path, attacks: Sequence[str], shares: Sequence[float], options: Mapping[str, Any], rounds: int | None
) -> None:
    """Raise :class:`ConfigError` for what cannot be played, before anything is read or trained."""
    if not attacks or not shares:
        raise ConfigError("there is nothing to do; expected at least one attack and one share")
    if wrong := [each for each in shares if not 0 < each <= 1]:
        raise ConfigError(f"a share of malicious clients is {wrong[0]:g}; expected above 0, at most 1, such as 0.01")
    if rounds is not None and rounds < 0:
        raise ConfigError(f"--rounds is {rounds}; expected 0 or more")
    kinds = [kind_of(each) for each in attacks]
    if options and len(kinds) != 1:
        raise ConfigError("options belong to one attack; expected a single attack with them")
    for name in attacks:
        make_options(name, options)
    if RunFolder(folder).is_federation:
        raise ConfigError(
            f"{folder}: a federation's users are on its nodes, and attacks are simulated; expected a run of train with "
            "the same configuration"
        )


def _before(
    result: Result, config: Config, scenario: Scenario, rounds: int | None, doing: Doing
) -> tuple[Exposure, Config]:
    """The figures without an attack, and the configuration of all trainings."""
    dataset: Dataset = result.dataset
    if rounds is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"rounds": rounds})})
        told = partial(doing, "without an attack")
        return poisoned(config, dataset, None, 0.01, config.run.seed, scenario, None, told), config
    targets = targets_of(dataset, scenario, config.run.seed)
    return measure(result.recommender, dataset, dataset.n_users, targets, scenario.k, result.best_round), config
