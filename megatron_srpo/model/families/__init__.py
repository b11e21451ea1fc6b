"""Model families, one module each in this folder.

A family defines its model_type, TransformerConfig arguments, and the HF tensors of each Megatron parameter.
No other module contains Hugging Face tensor names.
"""

import importlib
import pkgutil
from typing import Any

from megatron_srpo.model.architecture import Architecture, RopeScaling, UnsupportedModel


def families() -> dict[str, type[Architecture]]:
    """Import all modules of this folder, and return the families by model_type."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return Architecture.families


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Read config.json with the family of its model_type. Raises UnsupportedModel."""
    kind, known = config.get("model_type"), families()
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedModel(f"model_type is {kind!r}; supported: {', '.join(known)}")
    return known[kind].from_config(config)


def architecture_from_dict(values: dict[str, Any]) -> Architecture:
    """Invert `dataclasses.asdict`, also after JSON. Raises KeyError or TypeError for other keys."""
    if "model_type" not in values:
        values = _with_model_type(values)
    scaling = values["rope_scaling"]
    family = families()[values["model_type"]]
    return family(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})


def _with_model_type(values: dict[str, Any]) -> dict[str, Any]:
    """Read older run folders, which describe the layers instead of naming the family."""
    values = dict(values)
    has = values.pop("qk_norm"), values.pop("qkv_bias"), values["num_experts"] > 0
    for name, family in families().items():
        if (family.qk_norm, family.qkv_bias, family.has_experts) == has:
            return values | {"model_type": name}
    raise KeyError("model_type")
