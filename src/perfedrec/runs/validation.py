"""The validation of a run: by the held-out items of all users or, where there are many, of a sample."""

from __future__ import annotations

import torch

from perfedrec.data import Dataset
from perfedrec.evaluation import Held
from perfedrec.evaluation.sample import ERROR, of_sample, sample_of, share_of
from perfedrec.runs.engine import Engine
from perfedrec.runs.run_settings import RunSettings


class Validation:
    """The validation items of a data set, for runs with certain settings."""

    def __init__(self, dataset: Dataset, run: RunSettings, device: torch.device) -> None:
        self.run, self.share = run, share_of(dataset.n_users, run.evaluate_users)
        held = Held.of(dataset.valid.offsets, dataset.valid.items, device)
        if self.share < 1:
            held = of_sample(held, sample_of(dataset.train.user_ids, self.share).to(device))
        self.held = held

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """The metrics of an engine's model after its last round. Those of a sample have a standard error."""
        totals, metric = engine.evaluate(self.held, self.run.cutoffs, self.run.select_by), self.run.select_by
        figures = totals.means()
        if self.share < 1 and totals.users:
            figures[ERROR] = totals.standard_error(metric, self.share)
        return figures
