"""Records: frozen dataclasses of tensors, scalars and other records, and their flat form.

States, views, memories and contributions are all records. Their flat form, a mapping from dotted names to tensors and
one from dotted names to scalars, is what a checkpoint stores, what a message carries and what byte counts are read
from, so that the three can never disagree.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Scalar = int | float | str | bool
R = TypeVar("R")


def flatten(record: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Dotted names to tensors and to scalars. A field that is ``None`` is left out."""
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
    """The record that :func:`flatten` took apart; a field with no entry becomes ``None``.

    Records that an older version stored are read as well: the metadata of a field name what it ``was`` called, from the
    root of the stored record on, and what it is where it is ``missing``, a function of the stored tensors.
    """
    hints = typing.get_type_hints(cls)
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


def old_names(cls: type[Any]) -> dict[str, str]:
    """What fields of a record ``cls`` were called by an older version, with their names of today."""
    return {field.metadata["was"]: field.name for field in fields(cls) if "was" in field.metadata}


def nbytes(record: Any) -> int:
    """Bytes of all tensors of a record, as a message would carry them (scalars are not counted)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flatten(record)[0].values())


def copied(record: R, device: Any = None) -> R:
    """A copy of the record with storage of its own, on ``device`` (``None``: where it is)."""
    changes: dict[str, Any] = {}
    for field in fields(typing.cast(Any, record)):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device or value.device, copy=True)
        elif is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = copied(value, device)
    return typing.cast(R, replace(typing.cast(Any, record), **changes))
