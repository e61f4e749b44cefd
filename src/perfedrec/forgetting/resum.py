"""Forgetting by summing again: the server's part of a run, from kept uploads without those of the forgotten users, and
a few rounds in which the remaining clients adapt to the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.algorithm import Algorithm, AnyAlgorithm, B, C, S
from perfedrec.core.errors import CheckpointError
from perfedrec.data import Dataset
from perfedrec.forgetting.simulated import Played, Trained, adopt, chosen_as, rounds, simulated
from perfedrec.runs.config import RunSettings
from perfedrec.runs.uploads import Uploads, without
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import RoundTask, Tally, client_parts, play_with


def check_kept(folder: Path) -> None:
    """Raise :class:`CheckpointError` where the run in a folder has no uploads."""
    if not Uploads(folder).n_bytes:
        raise CheckpointError(
            f"{folder}: no uploads were kept, so there is nothing to sum again; expected --method exact (a run with "
            "--set run.keep_uploads=true would keep them)"
        )


@dataclass(frozen=True)
class FromUploads(Generic[S, B, C]):
    """Clients who are not asked: what they once sent in a round comes from the kept ``uploads``, without that of the
    users ``gone`` [k]."""

    algorithm: Algorithm[S, B, C]
    population: Population[C]
    uploads: Uploads
    gone: Tensor

    def parts(self, task: RoundTask[B], users: Tensor, tally: Tally) -> Iterator[Aggregate]:
        """See :class:`perfedrec.runtimes.round.Clients`. All remaining clients of the round count, also where the new
        model would have asked other ``users``."""
        n_items = self.population.n_items
        for _, _, update in self.uploads.round(task.number) if users.numel() else ():
            rest = without(update, self.gone)
            if self.algorithm.aggregator.separate:
                yield from (part for _, part in client_parts(self.algorithm, task, rest, n_items))
            else:
                yield reduce(rest, n_items, task.n_groups)

    def close(self) -> None:
        """Nothing has to be ended here."""


def resum(
    algorithm: AnyAlgorithm,
    left: Dataset,
    run: RunSettings,
    folder: Path,
    before: Trained,
    played: int,
    calibration: int,
) -> Played:
    """The model after ``played`` rounds of the run in ``folder`` (phases before training included), as the server makes
    it of the kept uploads without those of the users whom the data ``left`` leave out; and after ``calibration`` more
    rounds of the remaining clients, who start from their states in the model ``before``.

    FedEraser (Liu et al., IWQoS 2021) and, for recommenders, FRU (Yuan et al., WSDM 2023) store clients' updates, and
    replay the rounds with updates whose length is the stored one and whose direction is that of a few new local steps.
    Departs from the papers: all stored updates are used as they are, because they are there, and so every sum is
    exactly that of the remaining clients' uploads; what they would have sent without the forgotten users is made good
    by full rounds at the end instead of a correction in every round. Raises :class:`CheckpointError` where the uploads
    were not kept.
    """
    start, uploads = time.perf_counter(), Uploads(folder)
    check_kept(folder)
    simulator = simulated(algorithm, left, run)
    clients = FromUploads(algorithm, simulator.population, uploads, torch.tensor(left.forgotten, dtype=torch.int64))
    for _ in range(played):
        simulator.state, _ = play_with(
            clients, algorithm, simulator.state, run.seed, run.dropout_rate, absent=simulator.absent
        )
    simulator.state = chosen_as(simulator.state, before.state)
    adopt(simulator.population, before, simulator.absent)
    entries = rounds(simulator, calibration)
    return Played(simulator.recommender(), entries, time.perf_counter() - start)
