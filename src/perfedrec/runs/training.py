"""Training: the loop of a run, with what happens before, between and after its rounds."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from perfedrec.data import Dataset
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import AnyMethod
from perfedrec.runs import checkpoint
from perfedrec.runs.config import Config, RunSettings, config_of
from perfedrec.runs.engine import engine_of
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Quiet, Reporter, Tracker
from perfedrec.runs.result import Result
from perfedrec.runs.rounds import Rounds
from perfedrec.runs.signals import InterruptedRunError, signals
from perfedrec.runs.writer import NoWriter, RunWriter, belonging


def train(
    algorithm: AnyMethod,
    dataset: Dataset,
    run: RunSettings | None = None,
    *,
    reporter: Reporter | None = None,
    trackers: Sequence[Tracker] = (),
    output: Path | None = None,
    config: Config | None = None,
    resume: Path | None = None,
) -> Result:
    """Train a method on a data set and return the recommender of the best validation round.

    With ``output`` the run is written to that folder (see ``docs/runs.md``), and can be resumed: ``resume`` is the
    folder of a checkpoint. SIGINT and SIGTERM end the run after the current round, with a checkpoint and an
    :class:`InterruptedRunError`. Without ``output`` the test split is not ranked.
    """
    run, reporter = run or RunSettings(), reporter or Quiet()
    config = config or config_of(algorithm, run)
    if run.threads:
        torch.set_num_threads(run.threads)
    rounds, belongs = Rounds(engine_of(algorithm, dataset, run), dataset, run), belonging(algorithm, dataset, config)
    writer = NoWriter() if output is None else RunWriter(RunFolder(output), algorithm, dataset, config, belongs)
    if resume is None:
        writer.claim()
    else:
        loaded = checkpoint.load(resume, belongs)
        if not isinstance(algorithm, Method):
            checkpoint.check_phases(loaded, algorithm)
        rounds.restore(loaded)
        rounds.history = writer.resume(rounds.progress.done)
    result, started = None, list[Tracker]()
    reporter.start(rounds.progress)
    try:
        if resume is None:
            writer.begin(rounds)
        for tracker in trackers:
            tracker.start(config, rounds.progress.done)
            started.append(tracker)
        with signals() as caught:
            while not rounds.progress.over:
                entry = rounds.play()
                writer.add(entry, rounds)
                _report(reporter, rounds, writer)
                for tracker in trackers:
                    tracker.entry(entry)
                if caught:
                    raise _interrupted(caught[0], rounds, writer)
        found = Result(rounds.finish(), dataset, rounds.best_round, rounds.best_valid, rounds.history, output)
        writer.finish(found, rounds)
        result = found
        return result
    finally:
        reporter.stop(rounds.progress)
        for tracker in started:
            tracker.stop(result)
        if result is None and resume is None and not rounds.history:
            writer.withdraw()


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
    hint = f"; a checkpoint is in {where}, continue with --resume" if where else ""
    name = signal.Signals(number).name
    return InterruptedRunError(f"stopped by {name} after round {rounds.progress.done}{hint}", number)
