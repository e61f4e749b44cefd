"""Forgetting by summing again: the server's part of a run, from kept uploads without those of the forgotten users, and
a few rounds in which the remaining clients adapt to the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.errors import CheckpointError
from perfedrec.data import Dataset
from perfedrec.forgetting.simulated import Played, Trained, adopt, chosen_as, rounds, simulated
from perfedrec.runs.config import RunSettings
from perfedrec.runs.uploads import Uploads, without
from perfedrec.runtimes.round import round_key


def check_kept(folder: Path) -> None:
    """Raise :class:`CheckpointError` where the run in a folder has no uploads."""
    if not Uploads(folder).n_bytes:
        raise CheckpointError(
            f"{folder}: no uploads were kept, so there is nothing to sum again; expected --method exact (a run with "
            "--set run.keep_uploads=true would keep them)"
        )


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
    gone = torch.tensor(left.forgotten, dtype=torch.int64)
    for number in range(played):
        simulator.state = _server(algorithm, simulator.state, uploads, number, gone, run.seed, left.n_items)
    simulator.state = chosen_as(simulator.state, before.state)
    adopt(simulator.population, before, simulator.absent)
    entries = rounds(simulator, calibration)
    return Played(simulator.recommender(), entries, time.perf_counter() - start)


def _server(
    algorithm: AnyAlgorithm, state: Any, uploads: Uploads, number: int, gone: Tensor, seed: int, n_items: int
) -> Any:
    """The server's part of a round, as :func:`perfedrec.runtimes.round.play_with` plays it."""
    key = round_key(seed, number)
    plan = algorithm.plan(state, key.fold("plan"))
    n_groups = algorithm.n_groups(state)
    parts, separate = [], algorithm.aggregator.separate
    for _, _, update in uploads.round(number):
        rest = without(update, gone)
        blocks = [rest.of_user(place) for place in range(rest.users.numel())] if separate else [rest]
        parts += [reduce(each, n_items, n_groups) for each in blocks]
    total = algorithm.aggregator.combine(plan.phase, parts, Aggregate.empty(n_items, n_groups))
    if not separate:
        total = algorithm.compress(algorithm.broadcast(state, plan.cohort[:0]), plan.phase, total)
        total = algorithm.protection.add_noise(plan.phase, total, plan.cohort.numel(), key.fold("release"))
    return algorithm.server(state, plan.phase, total, key.fold("server"))
