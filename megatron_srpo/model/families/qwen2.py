"""Qwen2 and Qwen2.5."""

from typing import Any, ClassVar

from megatron_srpo.model.families.llama import Decoder


class Qwen2(Decoder, model_type="qwen2"):
    """Llama with biases for queries, keys and values."""

    qkv_bias = True
    only: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}
