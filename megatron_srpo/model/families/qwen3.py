"""Qwen3, dense."""

from typing import Any, ClassVar

from megatron_srpo.model.families.llama import Decoder


class Qwen3(Decoder, model_type="qwen3"):
    """Llama with normalised queries and keys."""

    qk_norm = True
    only: ClassVar[dict[str, Any]] = {"hidden_act": "silu"} | dict.fromkeys(
        ("use_sliding_window", "attention_bias"), False
    )
    defaults: ClassVar[dict[str, Any]] = Decoder.defaults | {"head_dim": 128}
