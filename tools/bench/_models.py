"""Provide config.json of Qwen3 in the published sizes, for models with random weights."""

from __future__ import annotations

from typing import Any

SHARED = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
}
# size → (hidden size, feed-forward size, layers, attention heads)
SIZES = {
    "0.6b": (1024, 3072, 28, 16),
    "1.7b": (2048, 6144, 28, 16),
    "4b": (2560, 9728, 36, 32),
    "8b": (4096, 12_288, 36, 32),
}


def qwen3_config(size: str) -> dict[str, Any]:
    """Return the config.json of a size; embeddings are tied below 8b."""
    hidden, feed_forward, layers, heads = SIZES[size]
    return {
        **SHARED,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": size != "8b",
    }
