"""Base classes of all sections of the configuration."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The configuration cannot be run; the message names place, key, the expected value and what to do."""


class Section(BaseModel):
    """A section of the configuration: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
