"""Training: the loop of a run, with what happens before, between and after its rounds."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data import DataLike, Dataset
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import AnyMethod
from perfedrec.runs import checkpoint
from perfedrec.runs.checkpoint import Loaded
from perfedrec.runs.config import Config, RunSettings
from perfedrec.runs.engine import engine_of, spread
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.progress import Progress, Quiet, Reporter, Tracker, best_reporter
from perfedrec.runs.request import data_of, method_of
from perfedrec.runs.result import Result
from perfedrec.runs.rounds import Rounds
from perfedrec.runs.signals import InterruptedRunError, signals
from perfedrec.runs.uploads import Uploads
from perfedrec.runs.writer import NoWriter, RunWriter, belonging
from perfedrec.runtimes.simulator import Simulator


def train(
    method: str | Config | AnyMethod,
    data: DataLike | None = None,
    run: RunSettings | None = None,
    *,
    output: str | Path | None = None,
    resume: bool | str | Path = False,
    config: Config | None = None,
    progress: bool | Reporter = False,
    callbacks: Sequence[Tracker | Callable[[Entry], object]] = (),
    **options: Any,
) -> Result:
    """Train a method on data, and return the recommender of the best validation round.

    ``method`` is a name (:func:`perfedrec.list_methods`), a configuration (:func:`perfedrec.configure`) or a method. A
    name stands for the method's preset, with these changes: what is set in ``run``, and ``options``. An option is named
    as in :func:`perfedrec.configure` (``model__embedding_dim=32``, ``privacy="private"``); those of the section
    ``run`` need no section (``rounds=20``, ``seed=1``).

    ``data`` is anything that :func:`perfedrec.load` takes, or its result. Without it, the configuration names the data.

    With ``output`` the run is written to that folder (see ``docs/runs.md``), and can be continued: ``resume=True``
    continues from its newest checkpoint, a path from that checkpoint. Without ``output`` the test split is not ranked.
    ``config`` is the configuration that belongs to a method which was built from one.

    ``progress=True`` shows a bar on a terminal, a line in a notebook, and lines elsewhere. Each function among
    ``callbacks`` receives the :class:`Entry` of each round. If it returns a true value, the training ends after this
    round. A :class:`perfedrec.runs.progress.Tracker` receives the beginning and the end of the run as well.

    SIGINT and SIGTERM end the run after the current round, with a checkpoint and an :class:`InterruptedRunError`.
    Raises :class:`ConfigError` for a method, option or folder that cannot be used, and :class:`DataError` for data.
    """
    algorithm, config = method_of(method, run, config, options)
    config.check_here()
    folder = _folder(output, new=not resume)  # before the data are read
    dataset, config = data_of(data, config)
    run = config.run
    if run.threads:
        torch.set_num_threads(run.threads)
    belongs = belonging(algorithm, dataset, config)
    writer = NoWriter() if folder is None else RunWriter(folder, algorithm, dataset, config, belongs)
    start = _checkpoint(resume, folder)
    loaded = None if start is None else checkpoint.load(start, belongs)
    if loaded is not None and not isinstance(algorithm, Method):
        checkpoint.check_phases(loaded, algorithm)
    listeners = _Listeners(progress, callbacks)
    with closing(engine_of(algorithm, dataset, run)) as engine:
        spread(engine, run)
        if folder is not None and run.keep_uploads and isinstance(engine, Simulator):
            engine.keep(Uploads(folder.path).keep)
        return _trained(Rounds(engine, dataset, run), writer, loaded, listeners, dataset, folder, config)


def _trained(
    rounds: Rounds,
    writer: NoWriter,
    loaded: Loaded | None,
    listeners: _Listeners,
    dataset: Dataset,
    folder: RunFolder | None,
    config: Config,
) -> Result:
    """Play the rounds, from those in a checkpoint on where one is ``loaded``, and write and return the result."""
    if loaded is None:
        writer.claim()
    with nullcontext() if folder is None else folder.locked("trains this run"):
        if loaded is not None:
            rounds.restore(loaded)
            rounds.history = writer.resume(rounds.progress.done)
        result = None
        try:
            if loaded is None:
                writer.begin(rounds)
            listeners.start(config, rounds.progress)
            _play(rounds, writer, listeners)
            found = _result(rounds, dataset, folder, config)
            writer.finish(found, rounds.progress, rounds.n_phases)
            result = found
            return result
        finally:
            listeners.stop(rounds.progress, result)
            if result is None and loaded is None and not rounds.history:
                writer.withdraw()


def _folder(output: str | Path | None, new: bool) -> RunFolder | None:
    """The folder to write to. Raises :class:`ConfigError` where that of a ``new`` run is not free."""
    if output is None:
        return None
    folder = RunFolder(Path(output))
    if new:
        folder.check_free()
    return folder


class _Listeners:
    """All who are told of a run: the reporter, and the functions and trackers among the ``callbacks``."""

    def __init__(self, progress: bool | Reporter, callbacks: Sequence[Tracker | Callable[[Entry], object]]) -> None:
        shown = best_reporter() if progress is True else Quiet()
        self.reporter: Reporter = shown if isinstance(progress, bool) else progress
        self.functions = [each for each in callbacks if callable(each)]
        self.trackers = [each for each in callbacks if not callable(each)]
        self._started: list[Tracker] = []

    def start(self, config: Config, progress: Progress) -> None:
        self.reporter.start(progress)
        for tracker in self.trackers:
            tracker.start(config, progress.done)
            self._started.append(tracker)

    def asked_to_end(self, entry: Entry) -> bool:
        """Tell all functions of a round; whether one of them wants it to be the last one."""
        answers = [bool(function(entry)) for function in self.functions]
        return any(answers)

    def stop(self, progress: Progress, result: Result | None) -> None:
        self.reporter.stop(progress)
        for tracker in self._started:
            tracker.stop(result)


def _play(rounds: Rounds, writer: NoWriter, listeners: _Listeners) -> None:
    """All rounds that are left."""
    with signals() as caught:
        while not rounds.progress.over:
            entry = rounds.play()
            if listeners.asked_to_end(entry):
                entry = rounds.end()
            writer.add(entry, rounds)
            _report(listeners.reporter, rounds, writer)
            for tracker in listeners.trackers:
                tracker.entry(entry)
            if caught:
                raise _interrupted(caught[0], rounds, writer)


def _checkpoint(resume: bool | str | Path, folder: RunFolder | None) -> Path | None:
    """The folder of the checkpoint that a run continues from; ``None`` for a new run."""
    if not isinstance(resume, bool):
        return Path(resume)
    if resume and folder is None:
        raise ConfigError("resume=True continues the run in a folder; expected output=FOLDER")
    return folder.latest_checkpoint() if resume and folder is not None else None


def _result(rounds: Rounds, dataset: Dataset, folder: RunFolder | None, config: Config) -> Result:
    recommender, output = rounds.finish(), None if folder is None else folder.path
    return Result(recommender, dataset, rounds.best_round, rounds.best_valid, rounds.history, output, config=config)


def _report(reporter: Reporter, rounds: Rounds, writer: NoWriter) -> None:
    """Show the progress. If the output is a pipe that was closed, write a checkpoint before the error ends the run."""
    try:
        reporter.round(rounds.progress)
    except BrokenPipeError:
        writer.checkpoint(rounds)
        raise


def _interrupted(number: int, rounds: Rounds, writer: NoWriter) -> InterruptedRunError:
    """The error of a run that a signal ends, after a last checkpoint."""
    where = writer.checkpoint(rounds)
    hint = f"; a checkpoint is in {where}" if where else ""
    name = signal.Signals(number).name
    return InterruptedRunError(f"stopped by {name} after {rounds.progress.place}{hint}", number)
