"""A Hugging Face model folder: its architecture, its tensors' places, its tokenizer. Read once, checked before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_srpo.config import ConfigError


@dataclass(frozen=True)
class Architecture:
    """What config.json says of a dense Qwen3; names as there."""

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

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the folder must hold."""
        hidden, ffn, head = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        shapes = {"model.embed_tokens.weight": (self.vocab_size, hidden), "model.norm.weight": (hidden,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return shapes


class HFFolder:
    """The folder at `path`. Every method raises ConfigError that names the file and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(f"model.hf_path: {self.path.resolve()} is not a folder; expected a Hugging Face model folder")

    def _json(self, name: str) -> dict:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            return content
        except FileNotFoundError:
            raise ConfigError(f"model.hf_path: {file} is missing; is this a Hugging Face model folder?") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.hf_path: {file} cannot be read: {error}") from None

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture in config.json. Refuses anything but dense Qwen3 as our layers compute it."""
        config = self._json("config.json")
        file = self.path / "config.json"
        if (kind := config.get("model_type")) != "qwen3":
            raise ConfigError(f"model.hf_path: {file}: model_type is {kind!r}; only dense 'qwen3' models are supported")
        if config.get("attention_bias") or config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"model.hf_path: {file}: attention_bias, use_sliding_window and hidden_act other than silu are not supported")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"model.hf_path: {file}: rope type {rope_type!r} is not supported, only the default")
        values = {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}
        values.setdefault("head_dim", 128)  # transformers' defaults of Qwen3Config
        values.setdefault("rms_norm_eps", 1e-6)
        values.setdefault("tie_word_embeddings", False)
        names = list(Architecture.__dataclass_fields__)
        if missing := [name for name in names if values.get(name) is None]:
            raise ConfigError(f"model.hf_path: {file}: missing {', '.join(missing)}")
        for name, field in Architecture.__dataclass_fields__.items():
            wanted = {"int": int, "float": (int, float), "bool": bool}[field.type]
            if not isinstance(values[name], wanted) or (isinstance(values[name], bool) and field.type != "bool"):
                raise ConfigError(f"model.hf_path: {file}: {name} is {values[name]!r}, expected {field.type}")
        return Architecture(**{name: values[name] for name in names})

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The safetensors file of every tensor. Checks names and shapes of all of them, reading headers only."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = self._json(index.name).get("weight_map", {})
            files = sorted(set(weight_map.values()))
        else:
            files = ["model.safetensors"]
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for name in files:
            file = self.path / name
            if not file.is_file():
                raise ConfigError(f"model.hf_path: {file} is missing" + (f" ({index.name} lists it)" if index.exists() else ""))
            try:
                with safe_open(file, framework="pt") as tensors:
                    found |= {key: (file, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"model.hf_path: {file} is damaged or no safetensors file: {error}") from None
        expected = self.architecture.tensor_shapes()
        for key, shape in expected.items():
            if key not in found:
                raise ConfigError(f"model.hf_path: {self.path}: tensor {key} is missing")
            if found[key][1] != shape:
                file, wrong = found[key]
                raise ConfigError(f"model.hf_path: {file}: {key} has shape {list(wrong)}, config.json implies {list(shape)}")
        allowed = {"lm_head.weight"} if self.architecture.tie_word_embeddings else set()
        if unexpected := sorted(set(found) - set(expected) - allowed):
            raise ConfigError(f"model.hf_path: {found[unexpected[0]][0]}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all)")
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
            raise ConfigError(f"model.hf_path: {self.path}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows}")
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
        """Token ids of chat messages with the assistant's generation header."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking)
        return self.tokenizer(text, add_special_tokens=False).input_ids
