"""The base of every configuration record: typed, frozen, and strict about names."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen component configuration. Unknown keys and numbers that are not finite are refused; defaults are written
    once, in the subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
