"""Dotted keys, as ``client.learning_rate``: of a class of options, and in a tree of sections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from perfedrec.core.errors import ConfigError


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of a class of options with its field, for help texts and for finding the nearest name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        label = prefix + (field.alias or name)
        if is_section(field.annotation):
            found |= keys(field.annotation, label + ".")
        else:
            found[label] = field
    return found


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether the type of a field is a class of options, so that the field is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree of sections by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def as_text(value: object) -> str:
    """A value as ``--set`` takes it: ``off`` for no value."""
    if value is None:
        return "off"
    return value if isinstance(value, str) and value else json.dumps(value)


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in a tree of sections.

    Raises :class:`ConfigError` where a part of the key that should be a section has a value.
    """
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted} is not a key: {section} has a value, and is not a section")
    tree[key] = value


def merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Set all values of another tree in ``tree``."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value
