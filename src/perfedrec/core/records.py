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
    """The record that :func:`flatten` took apart; a field with no entry becomes ``None``."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(typing.cast(Any, cls)):
        name = prefix + field.name
        inner = next(
            (kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if is_dataclass(kind)), None
        )
        if inner is not None:
            present = any(key.startswith(name + ".") for key in (*tensors, *scalars))
            made = present or hints[field.name] is inner  # one that may not be None is made of what there is
            values[field.name] = unflatten(typing.cast(type, inner), tensors, scalars, name + ".") if made else None
        else:
            values[field.name] = tensors.get(name, scalars.get(name))
    return cls(**values)


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
