"""The base class of all configuration records."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

STEEPEST = 2.0
"""The largest exponent of a degree in a walk on the graph; with 1 a step has the probability 1 / degree. With this one
in all three steps the scores are still normal numbers of float32, up to degrees of two million."""


class Settings(BaseModel):
    """A configuration record. It cannot be changed; unknown keys and numbers that are not finite are errors,
    and so are ``true`` and ``false`` for a number.

    Defaults are written in the subclass only, and are validated like given values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        """Add the options to the docstring, where ``help`` and the API reference show them."""
        super().__pydantic_init_subclass__(**more)
        options = [
            f"- ``{field.alias or name}`` ({field.default!r}): {field.description}"
            if field.description
            else f"- section ``{field.alias or name}``: see :class:`{type(field.default).__name__}`"
            for name, field in cls.model_fields.items()
        ]
        if cls.__doc__ and options:
            cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Options, with their defaults:", "", *options])

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` and ``false`` for a number, also in a list: pydantic would take them as 1 and 0."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if {int, float} & kinds and bool not in kinds and _has_truth(value):
            raise PydanticKnownError("float_type" if float in kinds else "int_type")
        return value

    def idle(self) -> dict[str, str]:
        """The options that change nothing with the values of others, by dotted key, each with such a value, as in
        ``optimizer = sgd``. A record overrides this for its own options."""
        found: dict[str, str] = {}
        for name, field in type(self).model_fields.items():
            if isinstance(section := getattr(self, name), Settings):
                label = field.alias or name
                found |= {f"{label}.{key}": f"{label}.{why}" for key, why in section.idle().items()}
        return found

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What differs from the defaults, for a short ``repr``."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                yield name, value


def _kinds(annotation: Any) -> set[Any]:
    """A type, and all types that it is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if get_args(annotation) else {annotation}


def _has_truth(value: Any) -> bool:
    """Whether a value is ``true`` or ``false``, or a list that has one of them."""
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_truth, value)))
