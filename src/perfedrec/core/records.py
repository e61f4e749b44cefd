"""Records: frozen dataclasses of tensors, scalars and other records, and their flat form.

Server states, broadcasts, client states and updates are records. The flat form of a record is two mappings, from dotted
names to tensors and from dotted names to scalars. Checkpoints store it, messages carry it, and bytes are counted from
it, so that the three always agree.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from perfedrec.core import mapped

Scalar = int | float | str | bool
R = TypeVar("R")


@dataclass(eq=False)
class Segment:
    """What was written of a large record in a part of the time: ``tensors``, which never change. Several segments, one
    after the other, are the record. It is stored once: ``file`` is where, with the ``digest`` of its content."""

    tensors: Mapping[str, Tensor]
    file: Path | None = None
    digest: str = ""


def flatten(record: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """The flat form of a record: its tensors and its scalars, each by dotted name.

    Fields that are ``None`` are left out. ``prefix`` is put in front of all names.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for field in fields(record):
        value, name = getattr(record, field.name), prefix + field.name
        if value is None:
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif is_dataclass(value):
            inner_tensors, inner_scalars = flatten(value, name + ".")
            tensors |= inner_tensors
            scalars |= inner_scalars
        else:
            scalars[name] = value
    return tensors, scalars


def unflatten(cls: type[R], tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar], prefix: str = "") -> R:
    """The record of type ``cls`` with this flat form: the reverse of :func:`flatten`.

    A field without an entry becomes ``None``. Records that an older version has stored can be read too. For this, the
    metadata of a field have its old name (``was``, counted from the root of the stored record), and a function of the
    stored tensors that gives its value where there is no entry (``missing``).
    """
    hints = _hints(typing.cast(Any, cls))
    values: dict[str, Any] = {}
    for field in fields(typing.cast(Any, cls)):
        kinds = (hints[field.name], *typing.get_args(hints[field.name]))
        inner = next((kind for kind in kinds if is_dataclass(kind)), None)
        names = [prefix + field.name, *([field.metadata["was"]] if "was" in field.metadata else [])]
        if inner is not None:
            present = [name for name in names if any(key.startswith(name + ".") for key in (*tensors, *scalars))]
            made = present or ([names[0]] if hints[field.name] is inner else [])  # one that may not be None is made
            values[field.name] = unflatten(typing.cast(type, inner), tensors, scalars, made[0] + ".") if made else None
            continue
        entries = (tensors.get(name, scalars.get(name)) for name in names)
        value = next((each for each in entries if each is not None), None)
        if value is None and "missing" in field.metadata:
            value = field.metadata["missing"](tensors)
        values[field.name] = value
    return cls(**values)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a record's fields."""
    return typing.get_type_hints(cls)


def old_names(cls: type[Any]) -> dict[str, str]:
    """The fields of a record ``cls`` that an older version named differently: old names to present names."""
    return {field.metadata["was"]: field.name for field in fields(cls) if "was" in field.metadata}


def nbytes(record: Any) -> int:
    """The number of bytes of all tensors of a record, as in a message (scalars are not counted)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flatten(record)[0].values())


def copied(record: R, device: Any = None, copy: Callable[[Tensor], Tensor] = torch.clone) -> R:
    """A copy of the record that shares no memory with it, on ``device``. Without a device it stays on its own, its
    tensors are those that ``copy`` makes, and it shares the fields whose metadata say that they are ``constant``: their
    tensors are never changed in place."""
    changes: dict[str, Any] = {}
    for field in fields(typing.cast(Any, record)):
        value = getattr(record, field.name)
        if device is None and field.metadata.get("constant"):
            continue
        if isinstance(value, Tensor):
            changes[field.name] = copy(value) if device is None else value.to(device, copy=True)
        elif is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = copied(value, device, copy)
    return typing.cast(R, replace(typing.cast(Any, record), **changes))


def set_aside(record: R) -> R:
    """A copy of the record, as :func:`copied`, for what is rarely read: large tensors are in files, and take memory
    while they are read. Raises :class:`ConfigError` where the disk has no room."""
    return copied(record, copy=partial(mapped.set_aside, what="tables of a model"))
