"""The base class of all configuration records."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration record. It cannot be changed; unknown keys and numbers that are not finite are errors.

    Defaults are written in the subclass only, and are validated like given values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
