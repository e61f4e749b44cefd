"""How records travel: as Flower records with few arrays, and without pickle.

Flower moves every array as an object of its own, named by a hash of its content. So the tensors of a record are
concatenated into one array per type of number, whose key says what it holds (``float32 items:100,8 degrees:100``).
Tensors that several nodes receive are packed once, and separately from those of a single node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from math import isfinite, prod
from typing import Any, Generic, cast

import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import EVALUATE, Algorithm, B, S
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.records import Scalar, flatten, unflatten

SERVING = "serve"
"""The phase in which nodes receive the model that they recommend with."""


class UploadError(PerfedrecError):
    """A message that a node or the coordinator refuses; ``reason`` is its kind, in one or two words (one of
    :data:`REASONS`)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = (
    *("away", "bundle", "catalogue", "code", "configuration", "failed", "keys", "late", "limit", "malformed"),
    *(
        "noise",
        "not finite",
        "phase",
        "policy",
        "range",
        "refused",
        "sealed",
        "service",
        "shape",
        "size",
        "unasked",
        "users",
    ),
    *("unvouched", "version", "other"),
)
"""All reasons for which an answer is refused or missing, as they are counted. "code" is an error code of Flower."""


def counted(reason: str) -> str:
    """The one of :data:`REASONS` as which a ``reason`` from another process is counted. So a process that invents
    reasons creates no counters."""
    kind = "code" if reason.startswith("code ") else reason
    return kind if kind in REASONS else "other"


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """One flat array per type of number, keyed by that type and the names and shapes of the tensors in it.

    Numbers travel in 4 bytes instead of 8 where that loses nothing. It never does for the part of a single user in a
    sum, which is a float32 in fixed point.
    """
    kinds: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.dtype, []).append(name)
    record = ArrayRecord()
    for kind, names in kinds.items():
        flat = torch.cat([tensors[name].detach().reshape(-1).cpu() for name in names])
        if kind in _NARROW and torch.equal(narrow := flat.to(_NARROW[kind]).to(kind), flat):
            flat = narrow.to(_NARROW[kind])
        layout = (f"{name}:{','.join(map(str, tensors[name].shape))}" for name in names)
        record[" ".join((str(kind).removeprefix("torch."), *layout))] = Array(flat.numpy())
    return record


_NARROW = {torch.float64: torch.float32, torch.int64: torch.int32}
_KINDS = {str(kind).removeprefix("torch."): kind for kind in (torch.float64, torch.float32, torch.int64, torch.int32)}
_KINDS |= {"bool": torch.bool, "uint8": torch.uint8, "float16": torch.float16, "int8": torch.int8, "int16": torch.int16}


def unpack(record: ArrayRecord, device: torch.device | None = None) -> dict[str, Tensor]:
    """The tensors in a record that :func:`pack` made. Raises :class:`UploadError` where an array is not what its key
    says."""
    tensors: dict[str, Tensor] = {}
    for key, array in record.items():
        try:
            kind, *parts = key.split(" ")
            flat = torch.from_numpy(array.numpy()).to(device)
            if flat.dtype != _KINDS[kind] and flat.dtype != _NARROW.get(_KINDS[kind]):
                raise ValueError(f"numbers of type {flat.dtype}")
            pairs = [part.split(":") for part in parts]
            shapes = {name: [int(size) for size in shape.split(",") if size] for name, shape in pairs}
            pieces = flat.to(_KINDS[kind]).split([prod(shape) for shape in shapes.values()])
            tensors |= {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            message = f"array '{key}' cannot be read ({error}); expected the type and sizes in its name"
            raise UploadError("malformed", message) from error
    return tensors


def array_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message, each with numpy's header of 128 bytes."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def digest(content: RecordDict, without: str) -> bytes:
    """The SHA-256 hash of all records but the one named ``without``. (Flower's own hash copies the content several
    times.)"""
    found = sha256()
    for name, record in sorted(content.items()):
        if isinstance(record, ArrayRecord):
            parts = [(repr((key, each.dtype, each.shape)), each.data) for key, each in sorted(record.items())]
        else:
            parts = [("", record.deflate())]
        for key, data in parts if name != without else ():
            found.update(repr((name, key, len(data))).encode())
            found.update(data)
    return found.digest()


@dataclass(frozen=True)
class Setup:
    """What coordinator and nodes have to agree on: the unique name of the ``run``, the method and its options as a
    ``configuration`` in TOML, the fingerprint of the ``catalogue`` of items, and the ``version`` of this package."""

    run: str
    configuration: str
    catalogue: str
    version: str

    @staticmethod
    def read(content: RecordDict) -> Setup:
        """The setup in a message. Raises :class:`UploadError` where it is missing."""
        try:
            record = content.config_records["setup"]
            return Setup(**{name: str(record[name]) for name in Setup.__dataclass_fields__})
        except KeyError as error:
            raise UploadError(
                "version", f"a message came without {error}; expected it: use the same version on both sides"
            ) from error

    def record(self) -> ConfigRecord:
        """The setup as a record of a message."""
        return ConfigRecord(asdict(self))


@dataclass(frozen=True)
class BroadcastLayout(Generic[B]):
    """How the broadcasts of an algorithm, records of class ``cls``, travel.

    ``shared`` names the fields that are the same for all nodes. ``per_group`` names those with one block of rows per
    group, of which a node receives the blocks of its users' groups only. ``groups`` is the field [B] with the users'
    groups. Every other field has one row per user, which goes to that user's node only.
    """

    cls: type[B]
    shared: tuple[str, ...] = ()
    per_group: tuple[str, ...] = ()
    groups: str = "groups"

    @staticmethod
    def of(algorithm: Algorithm[Any, B, Any]) -> BroadcastLayout[B]:
        """The layout that an algorithm's broadcast declares in the metadata of its fields."""
        per: dict[str | None, list[str]] = {}
        for field in fields(algorithm.broadcast_type):
            per.setdefault(field.metadata.get("per"), []).append(field.name)
        return BroadcastLayout(algorithm.broadcast_type, tuple(per.get(None, ())), tuple(per.get("group", ())))


class Instructions(Generic[S]):
    """What the coordinator sends to the nodes in a round that asks ``asked`` clients, or, in phase :data:`SERVING`, the
    model that they recommend with.

    ``identities`` [n] are the names by which nodes know the users.
    """

    def __init__(
        self,
        algorithm: Algorithm[S, Any, Any],
        state: S,
        phase: str,
        asked: int,
        identities: Tensor,
        setup: Setup | None = None,
    ) -> None:
        self.algorithm, self.state, self.phase, self.asked = algorithm, state, phase, asked
        self.identities, self.setup = identities, setup
        self.layout, self.n_groups = BroadcastLayout.of(algorithm), algorithm.n_groups(state)
        # All groups keep their numbers where uploads are dense, because then only the client may know a user's group;
        # to recommend with, because the group of a new user is not known yet; and where nothing is sent by groups.
        self.all_groups = phase in (SERVING, EVALUATE.name) or algorithm.protection.sums or not self.layout.per_group
        # Where clients choose their groups themselves, their numbers are those of all groups as well.
        self.chosen = not self.all_groups and bool(
            (algorithm.groups(state, torch.zeros_like(identities[:1])) < 0).any()
        )
        self.all_groups |= self.chosen
        self._packed: dict[str, ArrayRecord] = {}

    def content(self, users: Tensor) -> RecordDict:
        """The message for the node of ``users`` [B]: what their broadcast gives them, and nothing else.

        ``present`` [k] in it names the groups whose blocks are sent; the users' groups are places in that list.
        """
        tensors, scalars = flatten(self.algorithm.broadcast(self.state, users), "broadcast.")
        groups = tensors.pop(f"broadcast.{self.layout.groups}", None)
        own, present = {"users": self._identities_of(users)}, torch.zeros(1, dtype=torch.int64, device=users.device)
        if self.chosen:
            present = torch.arange(self.n_groups, device=users.device)
        if groups is not None:
            if not self.all_groups:
                present, groups = groups.unique(return_inverse=True)
            own[f"broadcast.{self.layout.groups}"] = groups
        of_all, per_group = self.layout.shared, self.layout.per_group
        if self.all_groups:
            of_all, per_group = of_all + per_group, ()
        shared = {name: tensors.pop(name) for each in of_all if (name := f"broadcast.{each}") in tensors}
        blocks = {name: tensors.pop(name) for each in per_group if (name := f"broadcast.{each}") in tensors}
        task: dict[str, Scalar] = {"phase": self.phase, "round": self.state.round, "n_groups": self.n_groups}
        task |= {"asked": self.asked, **scalars}
        own |= tensors | {"present": present}
        content = RecordDict({"task": ConfigRecord(dict(task)), "own": pack(own)})
        content["shared"] = self._pack_once("shared", shared)
        if self.setup is not None:
            content["setup"] = self.setup.record()
        for group in present.tolist():
            part = {name: block.chunk(self.n_groups)[group] for name, block in blocks.items()}
            content[f"group {group}"] = self._pack_once(f"group {group}", part)
        return content

    def _identities_of(self, users: Tensor) -> Tensor:
        """[B] the identities of ``users``; a negative number, which stands for new users, stays as it is."""
        return torch.where(users < 0, users, self.identities[users.clamp(min=0)])

    def _pack_once(self, name: str, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        if name not in self._packed:
            self._packed[name] = pack(tensors)
        return self._packed[name]


@dataclass(frozen=True)
class Task(Generic[B]):
    """An instruction as a node reads it: the ``broadcast`` for ``users`` [B], whose groups are places in ``present``
    [k]. ``asked`` is the number of clients that are asked in the round, on all nodes."""

    phase: str
    round: int
    n_groups: int
    asked: int
    users: Tensor
    present: Tensor
    broadcast: B

    def of(self, kept: Tensor) -> Task[B]:
        """The task for the users for whom ``kept`` [B] is true."""
        per_user = [each.name for each in fields(cast(Any, self.broadcast)) if each.metadata.get("per") == "user"]
        own = {name: value[kept] for name in per_user if (value := getattr(self.broadcast, name)) is not None}
        return replace(self, users=self.users[kept], broadcast=replace(cast(Any, self.broadcast), **own))

    @staticmethod
    def round_of(content: RecordDict) -> int:
        """The number of the round."""
        return int(cast(int, content.config_records["task"]["round"]))

    @staticmethod
    def read(content: RecordDict, layout: BroadcastLayout[B], device: torch.device | None) -> Task[B]:
        """The task in a message. Raises :class:`PerfedrecError` where something is missing."""
        try:
            tensors = unpack(content.array_records["own"], device) | unpack(content.array_records["shared"], device)
            users, present = tensors.pop("users"), tensors.pop("present")
            blocks = [unpack(content.array_records[f"group {group}"], device) for group in present.tolist()]
            tensors |= {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
            values: dict[str, Any] = dict(content.config_records["task"].items())
            broadcast = unflatten(layout.cls, tensors, values, "broadcast.")
            return Task(
                values["phase"], values["round"], values["n_groups"], values["asked"], users, present, broadcast
            )
        except KeyError as error:
            raise PerfedrecError(
                f"an instruction came without {error}; expected it: use the same version on both sides"
            ) from error


def most_bytes(like: Aggregate, users: int) -> int:
    """The most bytes that the reply of a number of ``users`` can have: every row of every table, and all edges."""
    tables = like.weights.numel() * like.n_items * (8 + 8 * like.sums.shape[1]) + 8 * like.weights.numel()
    dense = 0 if like.dense is None else 8 * like.dense.numel()
    reports = 0 if like.reports is None else users * (8 + 4 * like.reports[0].numel())
    edges = 0 if like.edges is None else 2 * 24 * users * like.n_items
    return tables + dense + reports + edges + 8 * 128


def dump(aggregate: Aggregate) -> bytes:
    """An aggregate as bytes, in the format of safetensors."""
    tensors, scalars = flatten(aggregate)
    names = {name: str(value) for name, value in scalars.items()}
    return safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}, names)


def load(content: bytes) -> Aggregate:
    """The aggregate that :func:`dump` wrote."""
    size = int.from_bytes(content[:8], "little")
    scalars = {name: int(value) for name, value in json.loads(content[8 : 8 + size])["__metadata__"].items()}
    return unflatten(Aggregate, safetensors.torch.load(content), scalars)


def reply(aggregate: Aggregate) -> RecordDict:
    """The answer of a node."""
    tensors, scalars = flatten(aggregate)
    return RecordDict({"sums": pack(tensors), "counts": ConfigRecord(dict(scalars))})


def read_reply(content: RecordDict, users: Tensor, like: Aggregate) -> Aggregate:
    """The sum over ``users`` [B] in a reply, or over those of them who are still on the node.

    Raises :class:`UploadError` where it has not the fields, types and shapes of ``like``, or cannot be the sum of such
    users.
    """
    if content.array_records.keys() != {"sums"} or content.config_records.keys() != {"counts"}:
        raise UploadError("shape", f"expected the records sums and counts, got {sorted(content)}")
    if array_bytes(content) > most_bytes(like, users.numel()):
        raise UploadError("size", f"{array_bytes(content)} bytes, more than all rows of all tables")
    wanted, tensors = flatten(like)[0], unpack(content.array_records["sums"], users.device)
    check_alike(tensors, wanted)
    counts: dict[str, Any] = dict(content.config_records["counts"].items())
    total = unflatten(Aggregate, tensors, counts)
    keys, n_items = total.keys, like.n_items
    if not 0 <= total.clients <= users.numel() or total.n_items != n_items:
        raise UploadError("users", f"expected at most {users.numel()} clients and {n_items} items, got {counts}")
    known = _within(keys, like.weights.numel() * n_items) and bool((keys.diff() > 0).all())
    if not known or keys.numel() != total.sums.shape[0]:
        raise UploadError("keys", "array keys: expected ascending keys of known items, one per row of sums")
    check_reports(tensors, users, n_items, total.clients)
    return total


def check_alike(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises :class:`UploadError` where ``tensors`` have not the names, types and shapes of those ``wanted``, or hold
    numbers that cannot be sums. All but ``weights`` and ``dense`` may have any number of rows."""
    if tensors.keys() != wanted.keys():
        raise UploadError("shape", f"expected the arrays {sorted(wanted)}, got {sorted(tensors)}")
    for name, expected in wanted.items():
        got, first = tensors[name], 0 if name in ("weights", "dense") else 1
        if got.dtype != expected.dtype or got.dim() != expected.dim() or got.shape[first:] != expected.shape[first:]:
            shape = ["any", *expected.shape[1:]] if first else list(expected.shape)
            raise UploadError(
                "shape", f"array {name}: expected {expected.dtype} {shape}, got {got.dtype} {list(got.shape)}"
            )
        low, high = map(float, got.aminmax()) if got.numel() else (0.0, 0.0)  # NaN where there is a NaN
        if not isfinite(low) or not isfinite(high):
            raise UploadError("not finite", f"array {name} holds numbers that are not finite")
        if got.dtype == torch.float64 and not (max(-low, high) < 2.0**53 and torch.equal(got, got.round())):
            raise UploadError("range", f"array {name} is not in fixed point: expected whole numbers below 2^53")


def check_reports(tensors: Mapping[str, Tensor], users: Tensor, n_items: int, clients: int | None = None) -> None:
    """Raises :class:`UploadError` where reports or edges among the ``tensors`` are not those of ``users`` [B], or not
    of the number of ``clients`` among them that answered, where it is known."""
    own, edges = users.sort().values, tensors.get("edges")
    if "reports" in tensors:
        reporting = tensors["report_users"]
        known = bool(torch.isin(reporting, own).all()) and reporting.unique().numel() == reporting.numel()
        counts = {reporting.numel(), tensors["reports"].shape[0]} | ({clients} if clients is not None else set())
        if not known or len(counts) > 1:
            raise UploadError("users", "array reports: expected one report of each user who was asked and answered")
    if edges is not None and not (bool(torch.isin(edges[:, 1], own).all()) and _within(edges[:, 2], n_items)):
        raise UploadError("users", "array edges: expected edges of the users asked with known items")


def _within(values: Tensor, size: int) -> bool:
    return bool(((values >= 0) & (values < size)).all())
