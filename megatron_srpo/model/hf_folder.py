"""A Hugging Face model folder: its architecture, its tensors' places, its tokenizer.

Read once, checked before anything starts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from megatron_srpo.config.schema import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies (rope type llama3); names as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """What config.json says of the model; names as there. `num_experts` is 0 in dense models.

    qk_norm (each head's queries and keys are normalised) and qkv_bias follow from the model type.
    """

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
    qk_norm: bool
    qkv_bias: bool
    rope_scaling: RopeScaling | None
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of `dataclasses.asdict`, after JSON too. Raises TypeError for other keys."""
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the folder must hold."""
        shapes = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        layer = self._attention_shapes() | self._mlp_shapes()
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, head = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        shapes = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        if self.qkv_bias:
            shapes |= {
                "self_attn.q_proj.bias": (queries,),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.bias": (keys,),
            }
        return shapes

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
            into, out = (width, self.hidden_size), (self.hidden_size, width)
            return {
                f"{prefix}.gate_proj.weight": into,
                f"{prefix}.up_proj.weight": into,
                f"{prefix}.down_proj.weight": out,
            }

        if not self.num_experts:
            return mlp("mlp", self.intermediate_size)
        shapes = {"mlp.gate.weight": (self.num_experts, self.hidden_size)}
        for expert in range(self.num_experts):
            shapes |= mlp(f"mlp.experts.{expert}", self.moe_intermediate_size)
        return shapes


@dataclass(frozen=True)
class _Family:
    """A model_type: what its layers have, and the only values of some keys that our layers compute
    (transformers' defaults).
    """

    qk_norm: bool
    qkv_bias: bool
    only: dict[str, Any]
    head_dim: int | None = None  # transformers' default; None: hidden_size / num_attention_heads
    experts: bool = False


_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")  # 0 in dense models
_FULL_ATTENTION = {"hidden_act": "silu", "use_sliding_window": False}
_FAMILIES = {
    "qwen3": _Family(
        qk_norm=True, qkv_bias=False, only={**_FULL_ATTENTION, "attention_bias": False}, head_dim=128
    ),
    "qwen3_moe": _Family(
        qk_norm=True,
        qkv_bias=False,
        only={**_FULL_ATTENTION, "attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
        experts=True,
    ),
    "qwen2": _Family(qk_norm=False, qkv_bias=True, only=_FULL_ATTENTION),
    "llama": _Family(
        qk_norm=False, qkv_bias=False, only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    ),
}


class HFFolder:
    """The folder at `path`. Every method raises ConfigError that names the file and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(
                f"model.hf_path: {self.path.resolve()} is not a folder; expected a Hugging Face model folder"
            )

    def _json(self, name: str) -> dict:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            return content
        except FileNotFoundError:
            raise ConfigError(
                f"model.hf_path: {file} is missing; is this a Hugging Face model folder?"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.hf_path: {file} cannot be read: {error}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is."""
        return self._json("config.json")

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture in config.json. Refuses what our layers do not compute."""
        config = self.config
        if not isinstance(kind := config.get("model_type"), str) or kind not in _FAMILIES:
            raise self._refusal(f"model_type is {kind!r}; supported: {', '.join(_FAMILIES)}")
        family = _FAMILIES[kind]
        for key, only in family.only.items():
            if (given := config.get(key)) is not None and given != only:
                raise self._refusal(f"{key} is {given!r}; only {only!r} is supported")
        if not isinstance(layers := config.get("layer_types") or [], list) or set(map(str, layers)) - {
            "full_attention"
        }:
            raise self._refusal("layer_types: only 'full_attention' is supported")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self._refusal(f"rope_parameters or rope_scaling is {rope!r}, expected an object")
        if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
            raise self._refusal(f"partial_rotary_factor is {partial!r}; only 1.0 is supported")
        values = {key: value for key, value in config.items() if value is not None}
        values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        values["rope_scaling"] = self._rope_scaling(rope)
        values.setdefault("rms_norm_eps", 1e-6)
        values.setdefault("tie_word_embeddings", False)
        if kind == "llama":
            values.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        if family.head_dim is not None:
            values.setdefault("head_dim", family.head_dim)
        elif isinstance(hidden := values.get("hidden_size"), int) and isinstance(
            heads := values.get("num_attention_heads"), int
        ):
            values.setdefault("head_dim", hidden // max(heads, 1))
        if family.experts:
            values.setdefault("num_experts", config.get("num_local_experts"))  # as transformers 5 writes it
            values.setdefault("norm_topk_prob", False)
        else:
            values |= dict.fromkeys(_OF_EXPERTS, 0) | {"norm_topk_prob": False}
        made = self._checked(Architecture, {**values, "qk_norm": family.qk_norm, "qkv_bias": family.qkv_bias})
        if made.num_attention_heads % made.num_key_value_heads:
            of = f"num_attention_heads ({made.num_attention_heads})"
            raise self._refusal(
                f"num_key_value_heads is {made.num_key_value_heads}, expected a divisor of {of}"
            )
        if made.head_dim % 2:
            raise self._refusal(
                f"head_dim is {made.head_dim}, expected an even number: rotary embeddings turn pairs"
            )
        if made.num_experts_per_tok > made.num_experts:
            raise self._refusal(
                f"num_experts_per_tok is {made.num_experts_per_tok}, but num_experts is {made.num_experts}"
            )
        return made

    def _refusal(self, message: str) -> ConfigError:
        return ConfigError(f"model.hf_path: {self.path / 'config.json'}: {message}")

    def _rope_scaling(self, rope: dict[str, Any]) -> RopeScaling | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise self._refusal(f"rope type {kind!r} is not supported, only 'default' and 'llama3'")
        return None if kind == "default" else self._checked(RopeScaling, rope)

    def _checked(self, kind: type, values: dict[str, Any]) -> Any:
        """A `kind` made of `values`, all of them there and of the declared type."""
        types = {"int": int, "float": (int, float), "bool": bool}
        fields = kind.__dataclass_fields__
        if missing := [
            name for name, field in fields.items() if field.type in types and values.get(name) is None
        ]:
            raise self._refusal(f"missing {', '.join(missing)}")
        for name, field in fields.items():
            if field.type not in types:  # RopeScaling, checked on its own
                continue
            if not isinstance(values[name], types[field.type]) or (
                isinstance(values[name], bool) and field.type != "bool"
            ):
                raise self._refusal(f"{name} is {values[name]!r}, expected {field.type}")
            if (
                field.type != "bool"
                and not 0 < values[name] < math.inf
                and (values[name] != 0 or name not in _OF_EXPERTS)
            ):
                raise self._refusal(f"{name} is {values[name]!r}, expected a number above 0")
        return kind(**{name: values[name] for name in fields})

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The safetensors file of every tensor.

        Checks names and shapes of all of them, reading headers only.
        """
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = self._json(index.name).get("weight_map", {})
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise ConfigError(
                    f"model.hf_path: {index}: weight_map is not an object of tensors' names and their files'"
                )
            files = sorted(set(weight_map.values()))
        else:
            files = ["model.safetensors"]
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for name in files:
            file = self.path / name
            if not file.is_file():
                raise ConfigError(
                    f"model.hf_path: {file} is missing"
                    + (f" ({index.name} lists it)" if index.exists() else "")
                )
            try:
                with safe_open(file, framework="pt") as tensors:
                    found |= {
                        key: (file, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()
                    }  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"model.hf_path: {file} is damaged or no safetensors file: {error}"
                ) from None
        expected = self.architecture.tensor_shapes()
        for key, shape in expected.items():
            if key not in found:
                raise ConfigError(f"model.hf_path: {self.path}: tensor {key} is missing")
            if found[key][1] != shape:
                file, wrong = found[key]
                raise ConfigError(
                    f"model.hf_path: {file}: {key} has shape {list(wrong)}, config.json implies {list(shape)}"
                )
        allowed = {"lm_head.weight"} if self.architecture.tie_word_embeddings else set()
        if unexpected := sorted(set(found) - set(expected) - allowed):
            raise ConfigError(
                f"model.hf_path: {found[unexpected[0]][0]}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all)"
            )
        return {key: found[key][0] for key in expected}

    @cached_property
    def tokenizer(self):
        """The folder's tokenizer, with a chat template and no token beyond the embedding."""
        from transformers import AutoTokenizer

        if not (self.path / "tokenizer.json").is_file() and not (self.path / "vocab.json").is_file():
            raise ConfigError(f"model.hf_path: {self.path}: tokenizer.json is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # the libraries raise whatever a damaged file makes them trip over
            raise ConfigError(f"model.hf_path: {self.path}: no tokenizer can be loaded: {error}") from None
        if len(tokenizer) > self.architecture.vocab_size:
            rows = self.architecture.vocab_size
            raise ConfigError(
                f"model.hf_path: {self.path}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows}"
            )
        if tokenizer.chat_template is None:
            raise ConfigError(f"model.hf_path: {self.path}: the tokenizer has no chat template")
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.hf_path: {self.path}: the tokenizer has no end-of-sequence token")
        return tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: eos_token_id of generation_config.json and of the tokenizer."""
        ids = {self.tokenizer.eos_token_id}
        if (self.path / "generation_config.json").exists():
            given = self._json("generation_config.json").get("eos_token_id")
            ids |= set(given if isinstance(given, list) else [given]) - {None}
        return tuple(sorted(ids))

    def encode(self, messages: list[dict[str, str]], enable_thinking: bool = False) -> list[int]:
        """Token ids of chat messages with the assistant's generation header.

        Raises ConfigError when the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
            )
        except TemplateError as error:
            raise ConfigError(
                f"model.hf_path: {self.path}: the chat template cannot be applied: {error}"
            ) from None
        return self.tokenizer(text, add_special_tokens=False).input_ids
