"""The audit of a real federation: attacks on the sums that its coordinator opened, by its own records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from perfedrec.audit.audit import Audit, directions
from perfedrec.audit.opened import SumAttacks
from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.errors import ConfigError
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.opened import read
from perfedrec.runtimes.node import Store


def audit_records(folder: Path, lists: Mapping[int, Tensor], progress: Callable[[int, int], None]) -> Audit:
    """Attack the sums that the coordinator of a federation kept (``--keep-sums``), and write the result to
    ``audit.json`` in its ``folder``.

    ``lists`` are the items of users by identity, from the nodes' files, by which results are judged; without them
    groups of rows are counted only. Raises :class:`CheckpointError` if the federation kept no sums.
    """
    records = read(folder)
    identities = torch.cat([each.cohort for each in records]).unique()
    n_items = max(each.sums.shape[1] if each.lift is None else each.lift.shape[0] for each in records)
    truth = None
    if lists:
        own = [lists.get(user, torch.zeros(0, dtype=torch.int64)) for user in identities.tolist()]
        offsets = torch.tensor([0, *(each.numel() for each in own)]).cumsum(0)
        truth = offsets, torch.cat(own)
    degrees = torch.ones(n_items) if truth is None else torch.bincount(truth[1], minlength=n_items).to(torch.float32)
    method = cast(AnyAlgorithm, RunFolder(folder).config().build())
    attack = SumAttacks(degrees, truth, (1,), directions(method))
    for number, each in enumerate(records):
        attack.see(replace(each, cohort=torch.searchsorted(identities, each.cohort)))
        progress(number + 1, len(records))
    found = Audit(attack.findings())
    if truth is None:
        found.notes.append("item lists: without the nodes' files (--nodes) groups of rows are only counted")
    RunFolder(folder).write("audit.json", json.dumps(found.plain(), indent=1).encode())
    return found


def lists_of(folder: Path) -> dict[int, Tensor]:
    """The items [k] of all users in the nodes' files under a ``folder``, by the users' identities. Raises
    :class:`ConfigError` where there is no such file."""
    paths = sorted({*folder.rglob("store.db"), *folder.rglob("*.node")})
    if not paths:
        raise ConfigError(f"{folder}: has no nodes' files; expected a folder with store.db or *.node files in it")
    lists: dict[int, Tensor] = {}
    for path in paths:
        with Store.open(path) as store:
            users = store.everyone()
            rows, _ = store.rows(users)
            lists |= dict(zip(users.tolist(), rows.items.split(rows.counts.tolist()), strict=True))
    return lists
