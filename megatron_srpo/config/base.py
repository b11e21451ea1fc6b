"""What all sections of the configuration share."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The configuration cannot be run; the message names key, place, what was expected and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
