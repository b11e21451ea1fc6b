"""Base classes of all sections of the configuration."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_srpo.data.validation import refuse_booleans
from megatron_srpo.data.visible import without_logins


class ConfigError(ValueError):
    """The configuration cannot be run; the message names place, key, the expected value and what to do."""

    def __init__(self, message: str):
        super().__init__(without_logins(message))


class Section(BaseModel):
    """A section of the configuration: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, given: Any) -> Any:
        return refuse_booleans(cls, given)
