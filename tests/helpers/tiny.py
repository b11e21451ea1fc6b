"""Make tiny model folders for tests, with random weights, a byte-level tokenizer and ChatML.

The weights are large enough that every layer matters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and the three specials: 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# family → (transformers' model, its configuration beyond what all share); each differs from the others where
# it can
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, dict(head_dim=16)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        dict(
            head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True
        ),
    ),
    "qwen2": (Qwen2ForCausalLM, {}),
    "llama": (LlamaForCausalLM, dict(rope_parameters={**LLAMA3, "rope_theta": 1e4})),
    "mistral": (MistralForCausalLM, dict(head_dim=24, sliding_window=None)),
}


def make_model(
    family: str = "qwen3", tied: bool = True, vocab_size: int = 270, layers: int = 4, seed: int = 0, **more
) -> PreTrainedModel:
    """Return an fp32 model of hidden size 64 with 8 query heads on 4 key-value heads, so TP up to 4.

    Norms differ from 1, biases are large enough to matter, routers are far from ties.
    """
    kind, options = FAMILIES[family]
    shared = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = kind(kind.config_class(**{**shared, **options, **more}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.4 if name.endswith((".bias", "mlp.gate.weight")) else 0.08
            parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return model.float()


def save_folder(path: Path, model: PreTrainedModel | None = None, **options) -> Path:
    """Write a complete HF folder at `path`."""
    (model or make_model(**options)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
