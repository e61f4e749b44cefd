"""Which rounds of a run are evaluated, which one is the best, and when a run ends early."""

from __future__ import annotations

from perfedrec.evaluation.sample import ERROR
from perfedrec.runs.progress import Progress
from perfedrec.runs.run_settings import RunSettings


class Selection:
    """Selects the best round of a run by its validation figures, and notes it in the ``progress``."""

    def __init__(self, run: RunSettings, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.best_valid: dict[str, float] = {}

    @property
    def trained(self) -> int:
        """Rounds of training played; 0 and below before training."""
        return self.progress.trained

    @property
    def best_round(self) -> int:
        """The best round, counted in rounds of training; the last one where there are no validation figures."""
        best = self.progress.best_round
        return self.trained if best is None else best

    @property
    def is_due(self) -> bool:
        """Whether the last round is evaluated. Rounds before training are few, and one of them may be the best: all of
        them are."""
        return self.trained <= 0 or self._is_one_of_every() or self.progress.over

    def is_better(self, valid: dict[str, float]) -> bool:
        """Note the validation figures of the last round, and return whether it is the best so far. The last round of
        all is the best where there are no figures."""
        value = valid.get(self.run.select_by)
        self.progress.value, self.progress.error = value, valid.get(ERROR)
        if value is None and (not self.progress.over or self.progress.best is not None):
            return False
        if value is not None and self.progress.best is not None and value <= self.progress.best:
            return False
        self.progress.best, self.progress.best_round, self.best_valid = value, self.trained, valid
        return True

    def end_early(self) -> None:
        """Make the last round the last one of all, if the best one was ``patience`` rounds ago."""
        best, patience = self.progress.best_round, self.run.patience
        if patience and self._is_one_of_every() and best is not None and self.trained - max(best, 0) >= patience:
            self.progress.total = self.progress.done

    def _is_one_of_every(self) -> bool:
        """Whether the last round of training is one of every ``evaluate_every``."""
        return self.trained % self.run.evaluate_every == 0
