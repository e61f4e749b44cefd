"""What a coordinator opens in a round, as a record that can be kept in a run's folder and audited later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perfedrec.core.aggregate import BASIS_GRID, Aggregate, from_fixed
from perfedrec.core.algorithm import AnyAlgorithm, RoundState
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.core.types import Plan
from perfedrec.runs.checkpoint import save_tensors

FOLDER = "opened"
"""The folder of a run in which a coordinator keeps what it opened."""


@dataclass(frozen=True)
class Opened:
    """What was opened in a round: the tables ``sums`` [G, r, d] with a row per item, or per column of the basis
    ``lift`` [m, r] that gives back a row per item. ``number`` counts rounds of training from 1; rounds before training
    have 0 or less. ``cohort`` [c] are the users who took part, ``n_models`` the number of tables that are changes of
    models (the others are neighbour sums)."""

    number: int
    phase: str
    cohort: Tensor
    sums: Tensor
    n_models: int
    lift: Tensor | None = None

    @staticmethod
    def of(algorithm: AnyAlgorithm, state: RoundState, plan: Plan, total: Aggregate) -> Opened | None:
        """What a coordinator with a ``state`` sees in a sum ``total``; ``None`` if there are no tables in it."""
        if not total.clients or not total.sums.shape[1]:
            return None
        basis, n_items = getattr(state, "basis", None), int(state.items.shape[0])
        if plan.phase == "spectral":  # the rows of some items, which need no basis
            total = algorithm.lift(state, plan.phase, total)
        table = torch.zeros(total.weights.numel() * total.n_items, total.sums.shape[1])
        table.index_copy_(0, total.keys.cpu(), from_fixed(total.sums).cpu())
        lift = None
        if total.n_items != n_items and basis is not None:
            lift = basis.cpu().to(torch.float32) / BASIS_GRID
        n_models = int(getattr(algorithm, "n_models", lambda state: 1)(state))
        rows = n_items if lift is None else lift.shape[1]
        number = state.round - len(algorithm.phases) + 1
        return Opened(number, plan.phase, plan.cohort, table.view(-1, rows, table.shape[1]), n_models, lift)

    def tables(self) -> Iterator[tuple[str, int, Tensor]]:
        """The kind and number of each table, and its rows by item [m, d]."""
        names = {"spectral": "passes", "clusters": "cluster passes"}
        for place, table in enumerate(self.sums):
            named = names.get(self.phase, "training" if self.phase == "train" else self.phase)
            beyond = self.phase == "train" and place >= self.n_models
            kind = "neighbour sums" if beyond or self.phase == "join" else named
            yield kind, place, table if self.lift is None else self.lift @ table


def write(folder: Path, number: int, opened: Opened, identities: Tensor) -> None:
    """Keep what was opened in the round ``number`` of a run in its ``folder``. Users are kept by their ``identities``
    [n], and a basis once, because all rounds share it."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    basis = place / "basis.safetensors"
    if opened.lift is not None and (opened.phase != "train" or not basis.exists()):  # a pass may have been repeated
        save_tensors({"lift": opened.lift.contiguous()}, basis)
    about = {"number": opened.number, "phase": opened.phase, "n_models": opened.n_models}
    tensors = {"sums": opened.sums.contiguous(), "cohort": identities[opened.cohort]}
    where = place / f"round-{number:06d}.safetensors"
    save_tensors(tensors, where, {"about": json.dumps(about | {"lifted": opened.lift is not None})})


def read(folder: Path) -> list[Opened]:
    """What a coordinator kept in a run's ``folder``, in the order of the rounds, with users by their identities.

    Raises :class:`CheckpointError` if there is nothing, or a file is damaged.
    """
    place = folder / FOLDER
    paths = sorted(place.glob("round-*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder}: this federation kept no sums; expected a run of serve or federation up with --keep-sums"
        )
    try:
        basis = place / "basis.safetensors"
        lift = _tensors(basis)[0]["lift"] if basis.exists() else None
        found = []
        for path in paths:
            tensors, about = _tensors(path)
            lifted = lift if about.pop("lifted") else None
            found.append(Opened(**about, cohort=tensors["cohort"], sums=tensors["sums"], lift=lifted))
        return found
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{place}: damaged record of opened sums: {reason(error)}") from None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118  # not a dict
