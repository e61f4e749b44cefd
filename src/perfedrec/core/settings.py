"""The base class of all configuration records."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration record. It cannot be changed; unknown keys and numbers that are not finite are errors.

    Defaults are written in the subclass only, and are validated like given values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What differs from the defaults, for a short ``repr``."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                yield name, value
