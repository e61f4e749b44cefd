"""Forgetting in a federation whose sums are in the clear: the coordinator plays its own part of all rounds again, from
the kept parts of the nodes without those that a user is in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import Algorithm, RoundState
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.nearest import listing
from perfedrec.core.records import flatten, unflatten
from perfedrec.federation.agreement import federated
from perfedrec.federation.hosts import NAME as HOSTS
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.parts import Part, Parts
from perfedrec.federation.run import Participants
from perfedrec.runs.checkpoint import Loaded
from perfedrec.runs.config import Config
from perfedrec.runs.files import HISTORY, ITEMS, REJECTIONS
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.forget_log import NAME as LOG
from perfedrec.runs.forget_log import Log
from perfedrec.runs.shared_model import STATE, USERS
from perfedrec.runtimes.flower import Federation
from perfedrec.runtimes.round import round_key

REPLAYED = "replayed"
"""The event in the log of a run that was made without users."""


@dataclass(frozen=True)
class Replayed:
    """A run that was made without somebody: ``left_out`` of ``parts`` are not in it, in which ``others`` (by how often
    they took part in them) are too; ``rounds`` were summed again, which took ``seconds``."""

    parts: int
    left_out: int
    others: int
    rounds: int
    seconds: float


class Replay:
    """The run in a ``folder`` of a coordinator, of which a run without somebody is made in the new folder ``output``.

    Raises :class:`ConfigError` for a method, or a run, that cannot be summed again, and where ``output`` is not empty;
    and :class:`CheckpointError` where the parts of the nodes were not kept.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self.run, self.output, self.parts = RunFolder(folder), RunFolder(output), Parts(folder)
        self.run.name()  # that of a coordinator
        self.output.check_free(resumable=False)
        self.config: Config = self.run.config()
        self.algorithm: Algorithm[Any, Any, Any] = federated(self.config)
        if self.algorithm.protection.secure:
            raise ConfigError(f"{folder}: has secure aggregation: nobody has parts to leave out; expected a new run")
        if self.algorithm.needs_service or self.algorithm.needs_degrees:
            raise ConfigError(
                f"{folder}: {self.config.algorithm} also needs sums that a neighbourhood service or all nodes have "
                "made, in which everybody stays; expected a new run without the user (--new-run)"
            )
        if not self.parts.place.is_dir():
            raise CheckpointError(
                f"{folder}: no parts of nodes were kept, so there is nothing to sum again; expected a new run without "
                "the user (a run with --set run.keep_uploads=true keeps them)"
            )
        loaded = self.run.newest_checkpoint({})
        if loaded is None:
            raise CheckpointError(f"{folder}: there is no checkpoint; expected a run that has played a round")
        self.loaded: Loaded = loaded
        if self.algorithm.chosen_options(self._stored):
            raise ConfigError(
                f"{folder}: held-out items have chosen options of the model; expected a new run without the user"
            )

    def without(self, gone: Callable[[Part], bool], users: Tensor) -> Replayed:
        """Write the run without the parts that are ``gone``, which are those of the ``users`` [k], to the new folder.

        All others keep their places, and so their random numbers. Before that, the run is summed again with all parts:
        unless that is the run itself, bit for bit, :class:`CheckpointError` is raised and nothing is written.
        """
        start = time.perf_counter()
        if not _same(self._summed(lambda part: False), self._stored):
            raise CheckpointError(
                f"{self.parts.place}: is not what the run was made of: summed again it is another model; expected all "
                "parts of a run that was played with this version of perfedrec"
            )
        parts = left_out = others = 0

        def counted(part: Part) -> bool:
            nonlocal parts, left_out, others
            leaves = gone(part)
            parts, left_out = parts + 1, left_out + leaves
            others += int((~torch.isin(part.users, users)).sum()) if leaves else 0
            return leaves

        self._write(self._summed(counted), gone, users)
        return Replayed(parts, left_out, others, self.rounds, round(time.perf_counter() - start, 3))

    def users_of(self, node: str) -> Tensor:
        """The identities [k] of all users of a ``node`` who were asked in a round. Raises :class:`ConfigError` for a
        node without a part."""
        found, names = [self.users[:0]], set[str]()
        for number in range(self.rounds):
            for part in self.parts.round(number):
                names.add(part.node)
                found += [part.users] if part.node == node else []
        if node not in names:
            raise ConfigError(f"{self.run.path}: has no part of node {node}; expected one of {listing(sorted(names))}")
        together: Tensor = torch.cat(found).unique()
        return together

    @property
    def rounds(self) -> int:
        """The rounds that the run has played, phases before training included."""
        return int(self.loaded.extra["standing"]["done"])

    @property
    def users(self) -> Tensor:
        """The identities [n] of the users of the run, ascending."""
        found: Tensor = self.loaded.records[USERS][0]["users"]
        return found

    def _first(self) -> RoundState:
        """The state before the first round."""
        catalogue = self.run.catalogue(self.loaded.belongs["catalogue"])
        items, n_items = catalogue.item_attributes, len(catalogue.item_ids)
        federation = Federation[Any, Any, Any](
            self.algorithm,
            n_items,
            self.config.run.seed,
            item_attributes=None if items is None else torch.tensor(items.values),
            n_user_attributes=catalogue.n_user_attributes,
        )
        first: RoundState = federation.first(self.users.numel(), torch.ones(n_items))
        return first

    @cached_property
    def _stored(self) -> RoundState:
        """The state after the last round, as the run has it."""
        return unflatten(type(self._first()), *self.loaded.records[STATE])

    def _summed(self, gone: Callable[[Part], bool]) -> RoundState:
        """The state after all rounds, without the parts that are ``gone``."""
        algorithm, state = self.algorithm, self._first()
        for number in range(self.rounds):
            key = round_key(self.config.run.seed, number)
            plan = algorithm.plan(state, key.fold("plan"))
            parts = [each.total for each in self.parts.round(number) if not gone(each)]
            empty = Aggregate.empty(state.items.shape[0], algorithm.n_groups(state))
            total = algorithm.aggregator.combine(plan.phase, parts, empty)
            if algorithm.protection.aborted(plan.phase, total.clients, plan.cohort.numel()):
                total = empty
            state = algorithm.server(state, plan.phase, total, key.fold("server"))
        return state

    def _write(self, state: RoundState, gone: Callable[[Part], bool], users: Tensor) -> None:
        """Write the new run: with the name, the history and the log of this one, and without a best round. Its log says
        that it is without the ``users`` [k]."""
        old, new, belongs = self.run, self.output, self.loaded.belongs
        new.claim()
        try:
            new.write_settings(self.config)
            new.write_catalogue(old.catalogue(belongs["catalogue"]))
            for name in (HISTORY, REJECTIONS, HOSTS, LOG):
                if (old.path / name).exists():
                    new.write(name, (old.path / name).read_bytes())
            Log(new.path).add(REPLAYED, users=[str(each) for each in users.tolist()], run=str(old.path))
            self.parts.give(Parts(new.path), gone)
            records = {STATE: state, USERS: Participants(self.users)}
            unknown = dict.fromkeys(("best", "best_round", "value", "error"))
            standing = self.loaded.extra["standing"] | unknown
            new.save_checkpoint(self.rounds, records, belongs, {"standing": standing, "best_valid": {}})
            new.write_name(old.name())
        except BaseException:
            new.withdraw()
            raise


def left_out(folder: Path) -> set[int]:
    """The users (identities) without whom the run in a folder was made."""
    lines = Log(folder).lines()
    return {int(each) for line in lines if line["event"] == REPLAYED for each in line["users"]}


def going_on(folder: Path, share: float) -> dict[str, Any]:
    """The options of ``perfedrec serve --resume`` with which a run that was made without somebody goes on: the
    catalogue in its folder, all nodes that are left, and a ``share`` more rounds of training."""
    rounds, nodes = RunFolder(folder).config().run.rounds, Hosts(folder).nodes(left_out(folder))
    more = max(math.ceil(share * rounds), 1)
    return {"output": folder, "catalogue": folder / ITEMS, "min-nodes": len(nodes), "rounds": rounds + more}


def _same(state: RoundState, other: RoundState) -> bool:
    """Whether two states are the same, bit for bit."""
    (tensors, scalars), (others, theirs) = flatten(state), flatten(other)
    alike = tensors.keys() == others.keys() and scalars == theirs
    return alike and all(torch.equal(each, others[name]) for name, each in tensors.items())
