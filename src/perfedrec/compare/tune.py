"""Tuning: an Optuna study of a method's options on validation data, in an SQLite file that several processes may share.

The data of a study have no test part, so that no trial can look at one. Trials that fall behind the median of others at
the same round are broken off. What a trial tries is drawn by a key of the seed and its number.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from perfedrec.core.errors import ConfigError, DivergedError, reason
from perfedrec.core.settings import Settings
from perfedrec.data import Dataset
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.config import Config, check, differences, explain, nearest, put
from perfedrec.runs.config import keys as keys_of
from perfedrec.runs.progress import Quiet, Reporter
from perfedrec.runs.training import Entry, InterruptedRunError, Result, signals, train

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

BEST = "best.toml"
STARTUP = 5
"""Trials that are not pruned, because there is too little to compare them with."""


class Dimension(Settings):
    """The values of one option: a range (whole numbers where both ends are), or a choice."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[bool | int | float | str, ...] = ()

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.choices and (self.low is None and self.high is None and not self.log):
            return self
        if self.choices or self.low is None or self.high is None or self.low >= self.high:
            raise ValueError(
                "expected { low = .., high = .., log = true or false } with low < high, or { choices = [..] }"
            )
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range needs low > 0")
        return self

    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all: if these are valid, the rest is."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Trial, key: str) -> Any:
        """The value that a trial tries."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


class Space(Settings):
    """What is searched; ``methods`` are those it is meant for."""

    methods: tuple[str, ...] = ()
    space: dict[str, Dimension] = Field(min_length=1)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its ``state`` (complete, pruned or infeasible), best validation value so far, and rounds."""

    number: int
    state: str
    value: float | None
    rounds: int
    changes: dict[str, Any]
    best_value: float | None
    best_number: int | None
    finished: int
    remark: str = ""


def ready_made(algorithm: str) -> Space:
    """The search space that comes with the package for a method."""
    known: dict[str, Space] = {}
    for entry in sorted((resources.files("perfedrec.compare") / "spaces").iterdir(), key=lambda each: each.name):
        if entry.name.endswith(".toml"):
            space = _space(entry.read_text(encoding="utf-8"), f"space {entry.name}")
            known |= dict.fromkeys(space.methods, space)
    if algorithm not in known:
        raise ConfigError(f"there is no search space for {algorithm}; expected --space FILE (see docs/tune.md)")
    return known[algorithm]


def read_space(path: Path) -> Space:
    """A search space from a TOML file."""
    try:
        return _space(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({reason(error)}); expected a TOML file with a table [space]"
        ) from None


def _space(text: str, where: str) -> Space:
    try:
        return Space.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: " + explain(error.errors(), Space)) from None


class Tuning:
    """A study in a folder: ``study.db``, ``base.toml`` (the configuration that trials change) and ``best.toml``."""

    def __init__(self, config: Config, space: Space, dataset: Dataset, output: Path) -> None:
        self.config, self.space, self.output = config, space, output
        self.dataset = dataset.without_test()
        self.base = config.model_dump(mode="json", by_alias=True)
        if not self.dataset.valid.n_interactions:
            raise ConfigError("tuning needs validation data, and there is none")
        known = keys_of(type(config))
        for key, dimension in space.space.items():
            if key not in known or key.startswith(("data.", "run.seed")):
                raise ConfigError(f"space: there is no option {key} of {config.algorithm}{nearest(key, known)}")
            for value in dimension.ends():
                self.with_changes({key: value}, f"space, {key} = {value}")

    def with_changes(self, changes: dict[str, Any], where: str = "") -> Config:
        """The configuration of a trial."""
        tree = json.loads(json.dumps(self.base))
        for key, value in changes.items():
            put(tree, key, value)
        return check(tree, where)

    def play(self, n_trials: int, tell: Callable[[Outcome], None], reporter: Callable[[], Reporter] = Quiet) -> Study:
        """Try until the study has so many finished trials, pruned and infeasible ones included.

        ``tell`` hears of each; ``reporter`` shows its rounds. SIGINT and SIGTERM break a trial off after its round; it
        is tried again when the study goes on.
        """
        study = self._open()
        with signals() as caught:
            while len(_finished(study)) < n_trials:
                if caught:
                    raise self._interrupted(study, n_trials, caught[0])
                study.sampler = _sampler(self.config.run.seed, len(study.get_trials(deepcopy=False)))
                trial = study.ask()
                study.sampler = _sampler(self.config.run.seed, trial.number)
                trial.set_user_attr("process", f"{platform.node()}:{os.getpid()}")
                changes = {key: dimension.suggest(trial, key) for key, dimension in self.space.space.items()}
                try:
                    outcome = self._try(study, trial, changes, reporter())
                except InterruptedRunError as error:
                    raise self._interrupted(study, n_trials, error.exit_code - 128) from None
                if outcome.best_number == trial.number:
                    self._write_best(study)
                tell(outcome)
        if _best(study) is not None:  # once more: a process may have ended between its trial and this
            self._write_best(study)
        return study

    def _interrupted(self, study: Study, n_trials: int, number: int) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped by {signal.Signals(number).name}: {len(_finished(study))} of {n_trials} trials are finished; "
            "the same command goes on",
            number,
        )

    def _try(self, study: Study, trial: Trial, changes: dict[str, Any], reporter: Reporter) -> Outcome:
        from optuna import TrialPruned
        from optuna.trial import TrialState

        watch, state, value, remark = _Watch(trial, self.config.run.select_by), "complete", None, ""
        try:
            config = self.with_changes(changes)
            train(config.build(), self.dataset, config.run, config=config, reporter=reporter, trackers=[watch])
            value = watch.best
            study.tell(trial, value)
        except TrialPruned:
            state = "pruned"
            study.tell(trial, state=TrialState.PRUNED)
        except (ConfigError, DivergedError) as error:  # options that are valid one by one and not together
            state, remark = "infeasible", str(error)
            trial.set_user_attr("infeasible", remark)
            study.tell(trial, state=TrialState.PRUNED)
        except BaseException as error:
            study.tell(trial, state=TrialState.FAIL)
            if isinstance(error, (InterruptedRunError, KeyboardInterrupt)):
                study.enqueue_trial(trial.params)
            raise
        best = _best(study)
        return Outcome(
            trial.number,
            state,
            value if state == "complete" else watch.best,
            watch.rounds,
            changes,
            best.value if best else None,
            best.number if best else None,
            len(_finished(study)),
            remark,
        )

    def _open(self) -> Study:
        """The study in the folder, which must be of the same configuration, space and data."""
        try:
            import optuna
        except ImportError:
            raise ConfigError("perfedrec tune needs Optuna; expected the extra: pip install perfedrec[tune]") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.output.mkdir(parents=True, exist_ok=True)
        with open(self.output / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes may make the study at the same time
            study = self._create(optuna)
        for stale in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if _dead(stale.user_attrs.get("process", "")):
                study.tell(stale.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(stale.params)
        return study

    def _create(self, optuna: Any) -> Study:
        base, path = self.output / "base.toml", self.output / "study.db"
        new = not base.exists()
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=self.config.run.rounds // 5)
        study: Study = optuna.create_study(
            study_name="perfedrec", storage=storage, direction="maximize", load_if_exists=True, pruner=pruner
        )
        mark = {
            "data": self.dataset.fingerprint,
            "space": self.space.model_dump(mode="json", include={"space"})["space"],
        }
        if new:
            write_atomic(base, self.config.to_toml().encode())
            for name, value in mark.items():
                study.set_user_attr(name, value)
        else:
            changed = differences(check(tomllib.loads(base.read_text(encoding="utf-8")), str(base)), self.config)
            changed += [f"the {name} is another" for name, value in mark.items() if study.user_attrs.get(name) != value]
            if changed:
                what = "; ".join(changed)
                raise ConfigError(
                    f"{self.output} holds another study: {what}; expected the same command, or another --output"
                )
        return study

    def _write_best(self, study: Study) -> None:
        """The best configuration as a file for ``--config``."""
        import tomli_w

        best = study.best_trial
        config = self.with_changes(best.params)
        tree = config.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"data": True, "run": {"seed", "threads", "device"}}
        )
        about = (
            f"# The best of {len(_finished(study))} trials on {self.dataset.name}: "
            f"validation {config.run.select_by} {best.value:.4f} (trial {best.number}, seed {config.run.seed}).\n"
        )
        write_atomic(self.output / BEST, (about + tomli_w.dumps(tree)).encode())


class _Watch:
    """Reports a trial's validation curve, and ends it where it is behind."""

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric, self.rounds, self.trained = trial, metric, 0, 0
        self.best: float | None = None

    def start(self, config: Config, done: int) -> None:
        pass

    def entry(self, entry: Entry) -> None:
        from optuna import TrialPruned

        self.rounds += 1
        self.trained += entry.report.phase == "train"
        if entry.valid is None:
            return
        value = entry.valid[self.metric]
        self.best = value if self.best is None else max(self.best, value)
        if self.trained:
            self.trial.report(self.best, self.trained)
            if self.trial.should_prune():
                raise TrialPruned

    def stop(self, result: Result | None) -> None:
        pass


def _sampler(seed: int, number: int) -> Any:
    from optuna.samplers import TPESampler

    return TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _finished(study: Study) -> Sequence[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _best(study: Study) -> FrozenTrial | None:
    from optuna.trial import TrialState

    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def _dead(process: str) -> bool:
    """Whether a process of this machine has ended; of other machines nothing is known."""
    node, _, pid = process.rpartition(":")
    if node != platform.node():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
