"""How records travel: as Flower records with few arrays, and without pickle.

Flower moves every array as an object of its own, named by a hash of its content. So the tensors of a record are laid
end to end in one array per type of number, whose key tells what it holds (``items:100,8 degrees:100``), and what
several nodes receive is packed once and apart from what is a node's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.records import flatten, unflatten
from perfedrec.core.types import Aggregate, Algorithm


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """One flat array per type of number, keyed by the names and shapes of the tensors in it."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.dtype, []).append(name)
    record = ArrayRecord()
    for names in kinds.values():
        flat = torch.cat([tensors[name].detach().reshape(-1).cpu() for name in names])
        record[" ".join(f"{name}:{','.join(map(str, tensors[name].shape))}" for name in names)] = Array(flat.numpy())
    return record


def unpack(record: ArrayRecord, device: Any = None) -> dict[str, Tensor]:
    """The tensors that :func:`pack` laid together. Raises :class:`PerfedrecError` where an array is not what its key
    says."""
    tensors: dict[str, Tensor] = {}
    for key, array in record.items():
        try:
            flat = torch.from_numpy(array.numpy()).to(device)
            pairs = [part.split(":") for part in key.split()]
            shapes = {name: [int(size) for size in shape.split(",") if size] for name, shape in pairs}
            pieces = flat.split([prod(shape) for shape in shapes.values()])
            tensors |= {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        except (RuntimeError, TypeError, ValueError) as error:
            raise PerfedrecError(f"array '{key}' cannot be read, expected what its name says: {error}") from error
    return tensors


def array_bytes(content: RecordDict) -> int:
    """Bytes of the arrays of a message, each with numpy's header of 128 bytes."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


@dataclass(frozen=True)
class ViewLayout:
    """How the views of an algorithm, records of class ``cls``, travel.

    ``shared`` names the fields that are the same for everybody, ``per_group`` those with one block of rows per group,
    of which a node receives its users' groups alone, and ``groups`` the field [B] with the users' groups. Every other
    field is taken for the users' own and goes to their node only.
    """

    cls: type[Any]
    shared: tuple[str, ...] = ()
    per_group: tuple[str, ...] = ()
    groups: str = "groups"


class Instructions:
    """What the server tells the nodes in one round."""

    def __init__(
        self, algorithm: Algorithm[Any, Any, Any], state: Any, phase: str, asked: int, layout: ViewLayout
    ) -> None:
        self.algorithm, self.state, self.phase, self.asked, self.layout = algorithm, state, phase, asked, layout
        self.n_groups = algorithm.n_groups(state)
        self._packed: dict[str, ArrayRecord] = {}

    def content(self, users: Tensor) -> RecordDict:
        """The message for the node of ``users`` [B]: what their view gives them, and nothing else.

        The users' groups are numbered anew, to point into the blocks that come along; ``present`` [k] names these.
        """
        tensors, scalars = flatten(self.algorithm.view(self.state, users), "view.")
        present, places = tensors[f"view.{self.layout.groups}"].unique(return_inverse=True)
        everybodys, groups = self.layout.shared, self.layout.per_group
        if self.algorithm.dense_uploads:  # which group a user has is its own affair: it receives all of them
            everybodys, groups = everybodys + groups, ()
        shared = {name: tensors.pop(name) for each in everybodys if (name := f"view.{each}") in tensors}
        blocks = {name: tensors.pop(name) for each in groups if (name := f"view.{each}") in tensors}
        task: dict[str, Any] = {"phase": self.phase, "round": self.state.round, "n_groups": self.n_groups}
        task |= {"asked": self.asked, **scalars}
        own = tensors | {f"view.{self.layout.groups}": places, "users": users, "present": present}
        content = RecordDict({"task": ConfigRecord(task), "own": pack(own), "shared": self._once("shared", shared)})
        for group in present.tolist():
            part = {name: block.chunk(self.n_groups)[group] for name, block in blocks.items()}
            content[f"group {group}"] = self._once(f"group {group}", part)
        return content

    def _once(self, name: str, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        if name not in self._packed:
            self._packed[name] = pack(tensors)
        return self._packed[name]


@dataclass(frozen=True)
class Task:
    """An instruction as a node reads it: ``view`` for ``users`` [B], with groups numbered as in ``present`` [k], in a
    round that ``asked`` so many clients."""

    phase: str
    round: int
    n_groups: int
    asked: int
    users: Tensor
    present: Tensor
    view: Any

    @staticmethod
    def read(content: RecordDict, layout: ViewLayout, device: Any) -> Task:
        """Raises :class:`PerfedrecError` when something is missing."""
        try:
            tensors = unpack(content.array_records["own"], device) | unpack(content.array_records["shared"], device)
            users, present = tensors.pop("users"), tensors.pop("present")
            blocks = [unpack(content.array_records[f"group {group}"], device) for group in present.tolist()]
            tensors |= {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
            values: dict[str, Any] = dict(content.config_records["task"].items())
            view = unflatten(layout.cls, tensors, values, "view.")
            return Task(values["phase"], values["round"], values["n_groups"], values["asked"], users, present, view)
        except KeyError as error:
            raise PerfedrecError(f"an instruction came without {error}: server and node must be alike") from error


def reply(aggregate: Aggregate) -> RecordDict:
    """What a node answers."""
    tensors, scalars = flatten(aggregate)
    return RecordDict({"sums": pack(tensors), "counts": ConfigRecord(dict(scalars))})


def read_reply(content: RecordDict, users: Tensor, like: Aggregate) -> Aggregate:
    """The sum over ``users`` [B] in a reply, if it has the fields, types and shapes of ``like`` and can be true.

    Raises :class:`PerfedrecError` otherwise.
    """
    if content.keys() != {"sums", "counts"}:
        raise PerfedrecError(f"expected the records sums and counts, got {sorted(content)}")
    wanted, tensors = flatten(like)[0], unpack(content.array_records["sums"], users.device)
    check_alike(tensors, wanted)
    counts: dict[str, Any] = dict(content.config_records["counts"].items())
    total = unflatten(Aggregate, tensors, counts)
    keys, n_items = total.keys, like.n_items
    if (total.clients, total.n_items) != (users.numel(), n_items):
        raise PerfedrecError(f"expected {users.numel()} clients and {n_items} items, got {counts}")
    known = _within(keys, like.weights.numel() * n_items) and bool((keys.diff() > 0).all())
    if not known or keys.numel() != total.sums.shape[0]:
        raise PerfedrecError("array keys: expected ascending keys of known items, one per row of sums")
    check_reports(tensors, users, n_items)
    return total


def check_alike(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises :class:`PerfedrecError` where ``tensors`` have not the names, types and shapes of those ``wanted``, in
    which all but ``weights`` and ``dense`` may have any number of rows, or hold numbers that are no sums."""
    if tensors.keys() != wanted.keys():
        raise PerfedrecError(f"expected the arrays {sorted(wanted)}, got {sorted(tensors)}")
    for name, expected in wanted.items():
        got, first = tensors[name], 0 if name in ("weights", "dense") else 1  # all others have any number of rows
        if got.dtype != expected.dtype or got.dim() != expected.dim() or got.shape[first:] != expected.shape[first:]:
            shape = ["any", *expected.shape[1:]] if first else list(expected.shape)
            raise PerfedrecError(f"array {name}: expected {expected.dtype} {shape}, got {got.dtype} {list(got.shape)}")
        if not bool(got.isfinite().all()):
            raise PerfedrecError(f"array {name} holds numbers that are not finite")
        if got.dtype == torch.float64 and not (torch.equal(got, got.round()) and bool((got.abs() < 2.0**53).all())):
            raise PerfedrecError(f"array {name} is not in fixed point: expected whole numbers below 2^53")


def check_reports(tensors: Mapping[str, Tensor], users: Tensor, n_items: int) -> None:
    """Raises :class:`PerfedrecError` where reports or edges among the ``tensors`` are not those of ``users`` [B]."""
    own, edges = users.sort().values, tensors.get("edges")
    if "reports" in tensors:
        reporting = tensors["report_users"].sort().values
        if not torch.equal(reporting, own) or tensors["reports"].shape[0] != own.numel():
            raise PerfedrecError("array reports: expected one report of each user asked")
    if edges is not None and not (bool(torch.isin(edges[:, 1], own).all()) and _within(edges[:, 2], n_items)):
        raise PerfedrecError("array edges: expected edges of the users asked with known items")


def _within(values: Tensor, size: int) -> bool:
    return bool(((values >= 0) & (values < size)).all())
