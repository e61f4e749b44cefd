"""The parts of a federation's rounds on the coordinator's disk: what each node sent, where sums are in the clear and
``run.keep_uploads`` asks for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.runs.checkpoint import save_tensors
from perfedrec.runs.uploads import FOLDER, drop, drop_after

_SUMS = ("sums", "weights", "dense")
"""Whole numbers as float64. They are stored as float32 where it holds all of them exactly, as they travel."""


@dataclass(frozen=True)
class Part:
    """What a ``node`` sent in a round: the sum over its ``users`` (identities [b]) of the cohort."""

    node: str
    users: Tensor
    total: Aggregate


class Parts:
    """The kept parts of the run in a ``folder``: a file for each node and round."""

    def __init__(self, folder: Path) -> None:
        self.place, self._round = folder / FOLDER, -1

    def keep(self, number: int, part: Part) -> None:
        """Store a part of a round. The first one replaces what was stored of the round."""
        if number != self._round:
            self._round = number
            drop(self.place, number)
        self.place.mkdir(exist_ok=True)
        values = {each.name: getattr(part.total, each.name) for each in fields(Aggregate)}
        tensors = {name: _compact(name, each) for name, each in values.items() if isinstance(each, Tensor)}
        about = {"node": part.node, "n_items": part.total.n_items, "clients": part.total.clients}
        where = self.place / f"round-{number:06d}-{part.node}.safetensors"
        save_tensors({**tensors, "users": part.users}, where, {"about": json.dumps(about)})

    def round(self, number: int) -> list[Part]:
        """The parts of a round, by name of the node. Raises :class:`CheckpointError` for a damaged file."""
        return [_read(path) for path in sorted(self.place.glob(f"round-{number:06d}-*"))]

    def all(self) -> Iterator[Part]:
        """All parts, in the order of the rounds. Raises :class:`CheckpointError` for a damaged file."""
        return map(_read, sorted(self.place.glob("round-*")))

    def nodes(self) -> list[str]:
        """The names of the nodes of which there is a part."""
        return sorted({path.stem.split("-", 2)[2] for path in self.place.glob("round-*")})

    def forget_after(self, rounds: int) -> None:
        """Remove what is stored of all rounds but the first ``rounds``: they are played again."""
        drop_after(self.place, rounds)

    def give(self, other: Parts, gone: Callable[[Part], bool]) -> None:
        """Give another folder all parts but those that are ``gone``: the same files, where the disk has hard links."""
        other.place.mkdir(exist_ok=True)
        for path in sorted(self.place.glob("round-*")):
            if not gone(_read(path)):
                try:
                    os.link(path, other.place / path.name)
                except OSError:  # a disk without hard links
                    shutil.copyfile(path, other.place / path.name)


def _read(path: Path) -> Part:
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        users, node = tensors.pop("users"), about.pop("node")
        tensors |= {name: tensors[name].to(torch.float64) for name in _SUMS if name in tensors}
        return Part(node, users, Aggregate(**about, **tensors))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged record of a node's part: {reason(error)}") from None


def _compact(name: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    short = value.to(torch.float32)
    return short if name in _SUMS and torch.equal(short.to(torch.float64), value) else value
