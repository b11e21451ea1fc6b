"""A check of configurations that pydantic does not make."""

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


def refuse_booleans(model: type[BaseModel], given: Any) -> Any:
    """Raise ValueError for a boolean in the place of a number: pydantic reads true as 1. Returns `given`."""
    for key, value in given.items() if isinstance(given, dict) else ():
        field = model.model_fields.get(key)
        if isinstance(value, bool) and field is not None:
            kind = field.annotation
            kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            if bool not in kinds and {int, float} & set(kinds):
                raise ValueError(f"{key}: expected a number, not {value}")
    return given
