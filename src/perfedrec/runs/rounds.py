"""The rounds of a training run, evaluated on validation data, and the best of them."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from perfedrec.core.memory import give_back
from perfedrec.data import Dataset
from perfedrec.evaluation import Recommender
from perfedrec.runs.checkpoint import Loaded
from perfedrec.runs.config import RunSettings
from perfedrec.runs.engine import Engine
from perfedrec.runs.folder import Entry
from perfedrec.runs.progress import Progress
from perfedrec.runs.selection import Selection
from perfedrec.runs.validation import Validation

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
        self.selection = Selection(run, self.progress)
        self.history: list[Entry] = []
        self.best: Recommender | None = None
        self._validation = Validation(dataset, run, engine.recommender().device)

    @property
    def trained(self) -> int:
        """Rounds of training played; 0 and below before training."""
        return self.progress.trained

    @property
    def best_round(self) -> int:
        """The best round: see :attr:`Selection.best_round`."""
        return self.selection.best_round

    @property
    def best_valid(self) -> dict[str, float]:
        """The validation metrics of the best round."""
        return self.selection.best_valid

    def play(self) -> Entry:
        """Play the next round, and evaluate it if that is due."""
        start = time.perf_counter()
        report = self.engine.play()
        seconds = time.perf_counter() - start
        self.progress.count(report, seconds)
        if self.trained <= 0:  # a phase before training may have taken much memory
            give_back()
        valid = None
        if self.selection.is_due:
            valid = self._evaluate()
            self.selection.end_early()
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
        give_back()
        valid = self._validation.evaluate(self.engine)
        if better := self.selection.is_better(valid):
            self.best = None  # its memory is given back first, like that of the evaluation
        give_back()
        if better:
            self.best = self.engine.recommender().frozen()
        self.progress.seconds += time.perf_counter() - start
        return valid

    def records(self) -> dict[str, Any]:
        """The records of a checkpoint: those of the engine, and those of the best round."""
        best = {} if self.best is None else self.best.kept()
        return self.engine.records() | {_BEST + name: record for name, record in best.items()}

    def extra(self) -> dict[str, Any]:
        """What else a checkpoint stores."""
        return {"standing": asdict(self.progress), "best_valid": self.best_valid}

    def restore(self, loaded: Loaded) -> None:
        """Continue from a checkpoint: afterwards the run is the one that was not interrupted."""
        self.progress = self.progress.resumed(loaded.extra["standing"])
        self.selection = Selection(self.run, self.progress)
        self.selection.end_early()
        self.selection.best_valid = loaded.extra["best_valid"]
        self.engine.restore(loaded.records, self.progress.done)
        best = {name.removeprefix(_BEST): each for name, each in loaded.records.items() if name.startswith(_BEST)}
        if best:
            self.best = self.engine.recommender().restored(best)

    def finish(self) -> Recommender:
        """The recommender of the best round, of the last one where no round was evaluated. Where none was played, it is
        the start, which is evaluated now. No round can be played afterwards: what only rounds need takes no memory
        beside the ranking of the test part."""
        if not self.progress.done:
            self._evaluate()
        if self.best is None:
            self.best, self.selection.best_valid = self.engine.recommender().frozen(), {}
        self.engine.let_go()
        give_back()
        return self.best
