"""Tuning: an Optuna study of a method's options on validation data, in an SQLite file that several processes may share.

The test part of the data is removed, so that no trial can use it. A trial is stopped early (pruned) when its best
validation figure falls below the median of the other trials at the same round. The values that a trial tries depend on
the seed and on the number of the trial.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from perfedrec.core.dotted import flat, put
from perfedrec.core.dotted import keys as keys_of
from perfedrec.core.errors import ConfigError, DivergedError, reason
from perfedrec.core.extras import needed_by
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.core.settings import Settings
from perfedrec.data import Dataset
from perfedrec.runs.checkpoint import check_writable, write_atomic
from perfedrec.runs.config import Config, check, differences
from perfedrec.runs.folder import Entry
from perfedrec.runs.progress import Quiet, Reporter
from perfedrec.runs.result import Result
from perfedrec.runs.signals import InterruptedRunError, signals
from perfedrec.runs.training import train

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial

Value = bool | int | float | str
"""A value of an option that can be searched."""

BASE, BEST, STUDY, LOCK = "base.toml", "best.toml", "study.db", ".lock"
"""Files in the folder of a study."""

START = "start"
"""The mark of the trial that tries the configuration that the study starts from."""

STARTUP = 5
"""The number of complete trials that are needed before a trial may be pruned: there must be some to compare with."""


EXAMPLE = 'expected [space] with lines such as "run.rounds" = { low = 10, high = 100, log = true }'
"""What a file with a space looks like, for messages."""


class Dimension(Settings):
    """The values that one option may take.

    Either a range from ``low`` to ``high`` (of whole numbers where both ends are whole numbers), or a list of
    ``choices``.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()

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

    def ends(self) -> tuple[Value | None, ...]:
        """The values to check: if these are valid, all others are."""
        return self.choices or (self.low, self.high)

    def takes(self, value: Value | None) -> bool:
        """Whether a trial can try a ``value``."""
        if self.choices:
            return any(value == each and type(value) is type(each) for each in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None and self.high is not None
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return self.low <= value <= self.high and (value == int(value) or not whole)

    def suggest(self, trial: Trial, key: str) -> Value | None:
        """The value that a trial tries for the option ``key``."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


class Space(Settings):
    """The options to search, by name; ``methods`` are the methods that a space of this package is meant for, and
    ``when`` are values of options, by dotted key, without which it is not."""

    methods: tuple[str, ...] = ()
    when: dict[str, Value] = Field({}, description="values of other options")
    space: dict[str, Dimension] = Field(min_length=1)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    ``state`` is complete, pruned or infeasible (its options are not possible together, or training diverged; then
    ``remark`` says why). ``value`` is the trial's best validation figure, ``rounds`` the number of rounds it played,
    ``changes`` the options that it tried. ``best_value`` and ``best_number`` are those of the best trial so far, and
    ``finished`` is the number of finished trials of the study. ``as_configured`` marks the trial that tries the
    configuration that the study starts from.
    """

    number: int
    state: str
    value: float | None
    rounds: int
    changes: dict[str, Value | None]
    best_value: float | None
    best_number: int | None
    finished: int
    remark: str = ""
    as_configured: bool = False


def check_output(output: Path) -> None:
    """Raise :class:`ConfigError` where a folder can hold no study, or Optuna is not installed."""
    with needed_by("tuning"):
        import optuna  # noqa: F401
    check_writable(output)
    if output.exists() and not (output / BASE).exists():
        left = {BASE, LOCK, STUDY, f"{STUDY}-journal"}  # by a process that was killed while it made the study
        if any(each.name not in left for each in output.iterdir()):
            raise ConfigError(f"{output} is not empty; expected a new folder, or that of a study to continue it")


def ready_made(algorithm: str, values: Mapping[str, Any] | None = None) -> Space:
    """The search space of a method that comes with the package. Where there are several, it is the one for the
    ``values`` of a configuration, by dotted key. Raises :class:`ConfigError` where there is none."""
    found: Space | None = None
    for entry in sorted((resources.files("perfedrec.compare") / "spaces").iterdir(), key=lambda each: each.name):
        if entry.name.endswith(".toml"):
            space = _space(entry.read_text(encoding="utf-8"), f"space {entry.name}")
            meant = all((values or {}).get(key) == value for key, value in space.when.items())
            if algorithm in space.methods and meant and (found is None or space.when):
                found = space
    if found is None:
        raise ConfigError(f"perfedrec has no search space for {algorithm}; expected --space FILE (see docs/tune.md)")
    return found


def read_space(path: Path) -> Space:
    """A search space from a TOML file. Raises :class:`ConfigError`, which names the file and the mistake."""
    try:
        return _space(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({reason(error)}); expected a TOML file with a table [space]"
        ) from None


def _space(text: str, where: str) -> Space:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: this is not valid TOML: {error}; expected a table [space] of options") from None
    if not isinstance(options := tree.get("space"), dict) or not options:
        problem = "there is no table [space] of options to search"
        raise ConfigError(f"{where}: {problem if 'space' not in tree else 'space names no option'}; {EXAMPLE}")
    for name, given in options.items():
        if isinstance(given, dict) and any(isinstance(each, dict) for each in given.values()):
            raise ConfigError(f"{where}: space.{name}: names of options stand in quotes, with their dots; {EXAMPLE}")
    try:
        return Space.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + explain(error.errors(), Space)) from None


class Tuning:
    """A study in a folder: ``study.db``, ``base.toml`` (the configuration that trials change) and ``best.toml``.

    Options of the space that change nothing, whatever one other option of it is, are not searched, nor are those that
    are ``fixed``, each for a reason. Raises :class:`ConfigError` where the data have no validation part, where the
    space names an option that the method does not have or a value that the option does not take, or where no option is
    left to search; the message begins with ``where`` the space comes from.
    """

    def __init__(
        self,
        config: Config,
        space: Space,
        dataset: Dataset,
        output: Path,
        *,
        fixed: Mapping[str, str] | None = None,
        where: str = "space",
    ) -> None:
        self.config, self.output = config, output
        self.dataset = dataset.without_test()
        self.base = config.model_dump(mode="json", by_alias=True)
        if not self.dataset.valid.n_interactions:
            raise ConfigError(
                f"{dataset.name}: tuning needs validation data; expected a data set with a validation part"
            )
        self.left_out = {key: why for key, why in (fixed or {}).items() if key in space.space}
        known, found = keys_of(type(config)), [config]
        for key, dimension in space.space.items():
            if key not in known or key.startswith(("data.", "run.seed")):
                raise ConfigError(f"{where}: there is no option {key} of {config.algorithm}{nearest(key, known)}")
            for value in dimension.ends() if key not in self.left_out else ():
                found.append(self.with_changes({key: value}, f"{where}, {key} = {value}"))
        idle = [each.idle() for each in found]
        for key in space.space:
            if all(key in each for each in idle):
                self.left_out.setdefault(key, f"without effect with {idle[0][key]}")
        self.space = space.model_copy(
            update={"space": {key: each for key, each in space.space.items() if key not in self.left_out}}
        )
        if not self.space.space:
            raise ConfigError(f"{where}: {self.what_is_left_out()[0]}; expected at least one option that has an effect")

    def what_is_left_out(self) -> list[str]:
        """The options of the space that are not searched, each with the reason, as text."""
        return [f"{key} is not searched: {why}" for key, why in self.left_out.items()]

    def with_changes(self, changes: Mapping[str, Value | None], where: str = "") -> Config:
        """The configuration of a trial: the base with ``changes``. ``where`` names it in an error message."""
        tree = json.loads(json.dumps(self.base))
        for key, value in changes.items():
            put(tree, key, value)
        return check(tree, where)

    def play(
        self, n_trials: int, after_trial: Callable[[Outcome], None], reporter: Callable[[], Reporter] = Quiet
    ) -> Study:
        """Play trials until the study has ``n_trials`` finished ones, pruned and infeasible trials included.

        ``after_trial`` is called after each trial, and ``reporter`` makes what shows the rounds of a trial. On SIGINT
        or SIGTERM the current trial stops after its current round, and :class:`InterruptedRunError` is raised; the
        trial is played again when the study is continued.
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
                tried = self._start() if START in trial.user_attrs else self.space.space
                changes = {key: self.space.space[key].suggest(trial, key) for key in tried}
                try:
                    outcome = self._try(study, trial, changes, reporter())
                except InterruptedRunError as error:
                    raise self._interrupted(study, n_trials, error.exit_code - 128) from None
                if outcome.best_number == trial.number:
                    self._write_best(study)
                after_trial(outcome)
        if _best(study) is not None:  # again: another process may have ended after its trial and before writing this
            self._write_best(study)
        return study

    def _start(self) -> dict[str, Value | None]:
        """The options of the space with the values of the configuration that the study starts from. An option whose
        value is outside of the space is left out, and keeps its value in the first trial."""
        values = flat(self.base)
        return {key: values[key] for key, dimension in self.space.space.items() if dimension.takes(values[key])}

    def _interrupted(self, study: Study, n_trials: int, number: int) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped by {signal.Signals(number).name}: {len(_finished(study))} of {n_trials} trials are finished; "
            "run the same command again to continue",
            number,
        )

    def _try(self, study: Study, trial: Trial, changes: dict[str, Value | None], reporter: Reporter) -> Outcome:
        from optuna import TrialPruned
        from optuna.trial import TrialState

        watch, state, value, remark = _Watch(trial, self.config.run.select_by), "complete", None, ""
        try:
            config = self.with_changes(changes)
            train(config, self.dataset, progress=reporter, callbacks=[watch])
            value = watch.best
            study.tell(trial, value)
        except TrialPruned:
            state = "pruned"
            study.tell(trial, state=TrialState.PRUNED)
        except (ConfigError, DivergedError) as error:  # each option is valid, but not all of them together
            state, remark = "infeasible", str(error)
            trial.set_user_attr("infeasible", remark)
            study.tell(trial, state=TrialState.PRUNED)
        except BaseException as error:
            study.tell(trial, state=TrialState.FAIL)
            if isinstance(error, (InterruptedRunError, KeyboardInterrupt)):
                _put_back(study, trial)
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
            START in trial.user_attrs,
        )

    def _open(self) -> Study:
        """The study in the folder; it must have the same configuration, space and data.

        Trials whose process has ended without a result are put back, to be played again.
        """
        check_output(self.output)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.output.mkdir(parents=True, exist_ok=True)
        with open(self.output / LOCK, "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes may start at the same time, and only one makes the study
            study = self._create()
        for stale in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if _dead(stale.user_attrs.get("process", "")):
                study.tell(stale.number, state=optuna.trial.TrialState.FAIL)
                _put_back(study, stale)
        return study

    def _create(self) -> Study:
        import optuna

        base, path = self.output / BASE, self.output / STUDY
        new = not base.exists()
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=self.config.run.rounds // 5)
        study = optuna.create_study(
            study_name="perfedrec", storage=storage, direction="maximize", load_if_exists=True, pruner=pruner
        )
        mark = {
            "data": self.dataset.fingerprint,
            "space": self.space.model_dump(mode="json", include={"space"})["space"],
        }
        if new:
            study.enqueue_trial(self._start(), user_attrs={START: True}, skip_if_exists=True)
            write_atomic(base, self.config.to_toml().encode())
            for name, value in mark.items():
                study.set_user_attr(name, value)
        else:
            changed = differences(check(tomllib.loads(base.read_text(encoding="utf-8")), str(base)), self.config)
            changed += [f"the {name} differs" for name, value in mark.items() if study.user_attrs.get(name) != value]
            if changed:
                what = "; ".join(changed)
                raise ConfigError(
                    f"{self.output} holds a study that differs from this one: {what}; expected the same command as "
                    "before, or another --output"
                )
        return study

    def _write_best(self, study: Study) -> None:
        """Write the best configuration as a file for ``--config``."""
        import tomli_w

        best = study.best_trial
        config = self.with_changes(best.params)
        tree = config.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"data": {"path", "train", "valid", "test"}, "run": {"seed", "threads", "device"}},
        )
        about = (
            f"# The best of {len(_finished(study))} trials on {self.dataset.name}: "
            f"validation {config.run.select_by} {best.value:.4f} (trial {best.number}, seed {config.run.seed}).\n"
        )
        write_atomic(self.output / BEST, (about + tomli_w.dumps(tree)).encode())


class _Watch:
    """Sends the validation curve of a trial to Optuna, and stops the trial where Optuna prunes it."""

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


def _sampler(seed: int, number: int) -> TPESampler:
    from optuna.samplers import TPESampler

    # Written out, because versions of Optuna differ in what they assume. A running trial counts as a bad one, so that
    # processes try different values. Options are drawn one by one, because a trial may not have all of them.
    return TPESampler(
        seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]), constant_liar=True, multivariate=False
    )


def _put_back(study: Study, trial: Trial | FrozenTrial) -> None:
    """Let a trial that ended without a result be played again."""
    study.enqueue_trial(trial.params, user_attrs={START: True} if START in trial.user_attrs else None)


def _finished(study: Study) -> Sequence[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _best(study: Study) -> FrozenTrial | None:
    from optuna.trial import TrialState

    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def _dead(process: str) -> bool:
    """Whether a process (``host:pid``) has ended; False for a process of another machine, which cannot be checked."""
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
