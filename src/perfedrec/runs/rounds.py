"""The rounds of a training run, evaluated on validation data, and the best of them."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from perfedrec.data import Dataset
from perfedrec.evaluation import Recommender
from perfedrec.runs.checkpoint import Loaded
from perfedrec.runs.config import RunSettings
from perfedrec.runs.engine import Engine
from perfedrec.runs.folder import Entry
from perfedrec.runs.progress import Progress
from perfedrec.runs.result import held_out

_BEST = "best-"
"""Prefix of the records of the best round in a checkpoint."""


class Rounds:
    """Plays the rounds of an ``engine`` and keeps the recommender of the best validation round.

    Nothing here reads or writes a file, and nothing here can reach the test data.
    """

    def __init__(self, engine: Engine, dataset: Dataset, run: RunSettings) -> None:
        self.engine, self.run, self.n_phases = engine, run, engine.n_phases
        self.progress = Progress(
            run.rounds + self.n_phases, run.select_by, n_phases=self.n_phases, users=dataset.n_users
        )
        self.history: list[Entry] = []
        self.best: Recommender | None = None
        self.best_valid: dict[str, float] = {}
        self._valid = held_out(dataset.valid, engine.recommender().device)

    @property
    def trained(self) -> int:
        """Rounds of training played; 0 and below before training."""
        return self.progress.done - self.n_phases

    @property
    def best_round(self) -> int:
        """The best round, counted in rounds of training; the last one where there are no validation data."""
        best = self.progress.best_round
        return self.trained if best is None else best

    def play(self) -> Entry:
        """Play the next round, and evaluate it if that is due."""
        start = time.perf_counter()
        report = self.engine.play()
        seconds = time.perf_counter() - start
        self.progress.count(report, seconds)
        valid = None
        # Rounds before training are few, and one of them may be the best: all of them are evaluated.
        if self.trained <= 0 or self._is_evaluated() or self.progress.over:
            valid = self._evaluate()
            self._end_early()
        entry = Entry(report, seconds, valid)
        self.history.append(entry)
        return entry

    def end(self) -> Entry:
        """Make the last round the last one of all, evaluate it if it was not, and return its entry."""
        self.progress.total = self.progress.done
        if self.history[-1].valid is None:
            self.history[-1] = replace(self.history[-1], valid=self._evaluate())
        return self.history[-1]

    def _evaluate(self) -> dict[str, float]:
        """The validation metrics after the last round, whose recommender is kept if it is the best so far."""
        start = time.perf_counter()
        valid = self.engine.recommender().evaluate(self._valid, self.run.cutoffs)
        self._compare(valid)
        self.progress.seconds += time.perf_counter() - start
        return valid

    def _is_evaluated(self) -> bool:
        """Whether the last round of training is one of every ``evaluate_every``."""
        return self.trained % self.run.evaluate_every == 0

    def _compare(self, valid: dict[str, float]) -> None:
        """Keep the last round's recommender if it is the best so far."""
        value = valid.get(self.run.select_by)
        self.progress.value = value
        if value is None and not self.progress.over:
            return  # there are no validation data: the last round is taken
        if value is None or self.progress.best is None or value > self.progress.best:
            self.progress.best, self.progress.best_round = value, self.trained
            self.best, self.best_valid = self.engine.recommender().frozen(), valid

    def _end_early(self) -> None:
        """Make the last round the last one of all, if the best one was ``patience`` rounds ago."""
        best, patience = self.progress.best_round, self.run.patience
        if patience and self._is_evaluated() and best is not None and self.trained - max(best, 0) >= patience:
            self.progress.total = self.progress.done

    def records(self) -> dict[str, Any]:
        """The records of a checkpoint: those of the engine, and those of the best round."""
        best = {} if self.best is None else self.best.records()
        return self.engine.records() | {_BEST + name: record for name, record in best.items()}

    def extra(self) -> dict[str, Any]:
        """What else a checkpoint stores."""
        return {"standing": asdict(self.progress), "best_valid": self.best_valid}

    def restore(self, loaded: Loaded) -> None:
        """Continue from a checkpoint: afterwards the run is the one that was not interrupted."""
        self.progress = self.progress.resumed(loaded.extra["standing"])
        self._end_early()
        self.best_valid = loaded.extra["best_valid"]
        self.engine.restore(loaded.records, self.progress.done)
        best = {name.removeprefix(_BEST): each for name, each in loaded.records.items() if name.startswith(_BEST)}
        if best:
            self.best = self.engine.recommender().restored(best)

    def finish(self) -> Recommender:
        """The recommender of the best round, of the last one where no round was evaluated."""
        if self.best is None:
            self.best, self.best_valid = self.engine.recommender().frozen(), {}
        return self.best
