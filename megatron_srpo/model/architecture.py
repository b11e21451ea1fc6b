"""Read config.json, and derive tensor shapes and the HF ↔ Megatron mapping from it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from megatron_srpo.model.mapping import ParamLocation, TensorMapping

EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")  # 0 in dense models
# Transformer Engine fuses a norm into the following matrix product, which then holds the norm's weight.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Local layers have a module for each expert; Transformer Engine has one with all experts' matrices, numbered.
_EXPERT = re.compile(r"(mlp\.experts\.)(?:local_experts\.(\d+)\.)?(linear_fc[12]\.weight)(\d*)")
_MOST_LAYERS = 100_000  # times experts; the largest published models have some 25,000
_Made = TypeVar("_Made", "Architecture", "RopeScaling")


class UnsupportedModel(ValueError):
    """config.json is incomplete or describes an unsupported model; the message names the key."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (rope type llama3); names as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model, named as in config.json; a subclass for each family (`model/families/`)."""

    families: ClassVar[dict[str, type[Architecture]]] = {}  # by model_type, as their modules are imported
    qk_norm: ClassVar[bool] = False  # each head's queries and keys are normalised
    qkv_bias: ClassVar[bool] = False
    has_experts: ClassVar[bool] = False
    only: ClassVar[dict[str, Any]] = {}  # the only supported values of some keys
    defaults: ClassVar[dict[str, Any]] = {  # transformers' defaults for absent keys
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    def __init_subclass__(cls, model_type: str | None = None) -> None:
        if model_type is not None:
            Architecture.families[model_type] = cls

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Architecture:
        """Read config.json. Raises UnsupportedModel."""
        cls.check_config(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        given = {key: value for key, value in config.items() if value is not None}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        values = cls.complete(cls.defaults | given)
        values["rope_scaling"] = _rope_scaling(rope)
        made = _checked(cls, values)
        heads, groups, chosen = made.num_attention_heads, made.num_key_value_heads, made.num_experts_per_tok
        if made.num_hidden_layers * max(made.num_experts, 1) > _MOST_LAYERS:
            given = f"num_hidden_layers is {made.num_hidden_layers}, num_experts {made.num_experts}"
            raise UnsupportedModel(f"{given}; expected at most {_MOST_LAYERS} layers × experts")
        if heads % groups:
            expected = f"expected a divisor of num_attention_heads ({heads})"
            raise UnsupportedModel(f"num_key_value_heads is {groups}, {expected}")
        if made.head_dim % 2:
            raise UnsupportedModel(f"head_dim is {made.head_dim}, expected an even number (rotary pairs)")
        if chosen > made.num_experts:
            raise UnsupportedModel(f"num_experts_per_tok is {chosen}, but num_experts is {made.num_experts}")
        return made

    @classmethod
    def check_config(cls, config: dict[str, Any]) -> None:
        """Raise UnsupportedModel for values that our layers do not support."""
        for key, only in cls.only.items():
            if (given := config.get(key)) is not None and given != only:
                raise UnsupportedModel(f"{key} is {given!r}; only {only!r} is supported")
        for key in ("quantization_config", "compression_config"):
            if config.get(key):
                raise UnsupportedModel(f"{key}: quantised weights cannot be read; use the unquantised model")
        if name := config.get("transformers_weights"):
            raise UnsupportedModel(f"transformers_weights is {name!r}; only model.safetensors is supported")
        both = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
        if len(both) == 2 and both[0] != both[1]:
            fault = f"rope_scaling is {both[1]!r}, but rope_parameters {both[0]!r}; keep the right one"
            raise UnsupportedModel(f"{fault} (transformers uses rope_scaling)")
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
            raise UnsupportedModel("layer_types: only 'full_attention' is supported")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UnsupportedModel(f"rope_parameters or rope_scaling is {rope!r}, expected an object")
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise UnsupportedModel(f"partial_rotary_factor is {partial!r}; only 1.0 is supported")

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add values implied by other keys: head_dim, and zeros for the expert sizes of a dense model."""
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int):
            values.setdefault("head_dim", hidden // max(heads, 1))
        if not cls.has_experts:
            values |= dict.fromkeys(EXPERT_SIZES, 0) | {"norm_topk_prob": False}
        return values

    def transformer_settings(self) -> dict[str, Any]:
        """Return the arguments of Megatron's TransformerConfig that the architecture defines."""
        raise NotImplementedError

    def table(self) -> Iterator[TensorMapping]:
        """Yield a mapping for each kind of parameter."""
        raise NotImplementedError

    def stored_tensors(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as stored in HF folders from a parameter of transformers' module."""
        yield name, parameter

    @cached_property
    def mappings(self) -> tuple[TensorMapping, ...]:
        """The mappings of `table`."""
        return tuple(self.table())

    @cached_property
    def end_mappings(self) -> dict[str, TensorMapping]:
        """Mappings of parameters outside the layers, by Megatron name."""
        return {mapping.megatron: mapping for mapping in self.mappings if not mapping.in_layer}

    @cached_property
    def layer_mappings(self) -> dict[str, TensorMapping]:
        """Mappings of a layer's parameters, by Megatron name inside the layer."""
        return {mapping.megatron: mapping for mapping in self.mappings if mapping.in_layer}

    def locations(self) -> Iterator[ParamLocation]:
        """Yield every parameter of the model once: first those outside the layers, then layer by layer."""
        layer = self.layer_mappings.values()
        for mapping in self.end_mappings.values():
            if mapping.tied_to is None:
                yield ParamLocation(mapping)
        for number in range(self.num_hidden_layers):
            yield from (ParamLocation(mapping, number) for mapping in layer if not mapping.is_expert)
            for expert in range(self.num_experts):
                yield from (ParamLocation(mapping, number, expert) for mapping in layer if mapping.is_expert)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the model's folder must contain."""
        shapes: dict[str, tuple[int, ...]] = {}
        for location in self.locations():
            shapes |= zip(location.names, location.mapping.tensors.values(), strict=True)
        return shapes

    def locate(self, name: str, layer_offset: int = 0, expert_offset: int = 0) -> ParamLocation:
        """Find the parameter `name` of a chunk's `named_parameters()`. Raises KeyError if unknown.

        layer_offset and expert_offset: numbers of the chunk's first layer and the rank's first expert.
        """
        if not name.startswith("decoder.layers."):
            return ParamLocation(self.end_mappings[name])
        layer, inner = name.removeprefix("decoder.layers.").split(".", 1)
        expert = 0
        if match := _EXPERT.fullmatch(inner):
            stem, module, matrix, number = match.groups()
            inner, expert = stem + matrix, int(module or number) + expert_offset
        mapping = self.layer_mappings[FUSED_NORMS.get(inner, inner)]
        return ParamLocation(mapping, int(layer) + layer_offset, expert)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedModel(f"rope type {kind!r} is not supported, only 'default' and 'llama3'")
    return None if kind == "default" else _checked(RopeScaling, rope)


def _checked(kind: type[_Made], values: dict[str, Any]) -> _Made:
    """Construct a `kind` from `values`; raise UnsupportedModel if one is missing or of the wrong type."""
    types = {"int": int, "float": (int, float), "bool": bool}
    fields = {field.name: field.type for field in dataclasses.fields(kind) if field.type in types}
    if missing := [name for name in fields if values.get(name) is None]:
        raise UnsupportedModel(f"missing {', '.join(missing)}")
    for name, declared in fields.items():
        value = values[name]
        if not isinstance(value, types[declared]) or isinstance(value, bool) != (declared == "bool"):
            raise UnsupportedModel(f"{name} is {value!r}, expected {declared}")
        may_be_zero = declared == "bool" or name in EXPERT_SIZES
        if not 0 < value < math.inf and not (value == 0 and may_be_zero):
            raise UnsupportedModel(f"{name} is {value!r}, expected a number above 0")
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
