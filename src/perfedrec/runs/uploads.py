"""The uploads of a run on disk, round by round: what left each client, from which a round can be summed again without
some of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perfedrec.core.errors import CheckpointError, reason
from perfedrec.core.types import Update
from perfedrec.runs.checkpoint import save_tensors
from perfedrec.runtimes.round import RoundTask

FOLDER = "uploads"
"""The folder of a run in which uploads are kept."""

_SMALL = ("segments", "items", "tables", "edges")
"""Whole numbers below 2^31, which are stored as int32."""


class Uploads:
    """The kept uploads of a run in its ``folder``: a file for each block of clients of a round.

    Numbers are stored as they left the clients, so that the sum of all of them is that of the round, bit for bit. A
    round of c clients with r rows of d numbers each takes about ``4 c r (d + 2)`` bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.place, self._round, self._block = folder / FOLDER, -1, 0

    def keep(self, task: RoundTask[Any], update: Update) -> None:
        """Store what a block of clients sent in a round. The first block replaces what was stored of the round."""
        if task.number != self._round:
            self._round, self._block = task.number, 0
            self.drop(task.number)
        self.place.mkdir(exist_ok=True)
        tensors = {each.name: getattr(update, each.name) for each in fields(update)}
        stored = {name: _compact(name, value) for name, value in tensors.items() if value is not None}
        about = {"phase": task.phase, "n_groups": task.n_groups}
        save_tensors(stored, self.place / f"round-{task.number:06d}-{self._block:04d}.safetensors", _text(about))
        self._block += 1

    def drop(self, number: int) -> None:
        """Remove what is stored of a round."""
        drop(self.place, number)

    def forget_after(self, rounds: int) -> None:
        """Remove what is stored of all rounds but the first ``rounds``: their model is not used."""
        drop_after(self.place, rounds)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.place, ignore_errors=True)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.place.glob("round-*"))

    def round(self, number: int) -> Iterator[tuple[str, int, Update]]:
        """The phase, the number of tables and the update of each block of a round, in order; nothing for a round
        without clients. Raises :class:`CheckpointError` for a damaged file."""
        for path in sorted(self.place.glob(f"round-{number:06d}-*")):
            try:
                with safe_open(path, "pt") as file:
                    about = json.loads((file.metadata() or {})["about"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
                whole = {name: value.to(torch.int64) for name, value in tensors.items() if name in _SMALL}
                yield about["phase"], about["n_groups"], Update(**(tensors | whole))
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                raise CheckpointError(f"{path}: damaged record of uploads: {reason(error)}") from None


def drop(place: Path, number: int) -> None:
    """Remove the files of a round from a folder."""
    for path in place.glob(f"round-{number:06d}-*"):
        path.unlink()


def drop_after(place: Path, rounds: int) -> None:
    """Remove the files of all rounds but the first ``rounds`` from a folder."""
    for path in place.glob("round-*"):
        if int(path.name.split("-")[1]) >= rounds:
            path.unlink()


def without(update: Update, gone: Tensor) -> Update:
    """What a block of clients sent, but for the users ``gone`` [k]: they are not among the users, and nothing of them
    is left."""
    kept = ~torch.isin(update.users, gone)
    return update if bool(kept.all()) else update.part(kept)


def _compact(name: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.to(torch.int32) if name in _SMALL else value


def _text(about: dict[str, Any]) -> dict[str, str]:
    return {"about": json.dumps(about)}
