"""Check that the layout divides the model, and pad its vocabulary."""

from collections.abc import Mapping
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.model.architecture import Architecture


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Round the vocabulary up so that every tensor-parallel rank holds the same number of rows."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def check_layout(architecture: Architecture, parallel: ParallelSection, megatron: Mapping[str, Any]) -> None:
    """Raise ConfigError if heads, feed-forward width, experts or layers do not divide over the ranks."""
    tensor = "tensor_model_parallel_size", parallel.tensor_model_parallel_size
    divided: dict[str, tuple[str, int]] = {"num_attention_heads": tensor, "num_key_value_heads": tensor}
    if architecture.num_experts:
        divided["num_experts"] = "expert_model_parallel_size", parallel.expert_model_parallel_size
        divided["moe_intermediate_size"] = "expert_tensor_parallel_size", parallel.expert_tensor_size
        if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
            needs = "a mixture-of-experts model with tensor_model_parallel_size > 1 needs it: set it to true"
            raise ConfigError(f"parallel.sequence_parallel: {needs}")
    else:
        divided["intermediate_size"] = tensor
        if (size := parallel.expert_model_parallel_size) > 1:
            hint = "but the model has no experts: set it to 1"
            raise ConfigError(f"parallel.expert_model_parallel_size: {size}, {hint}")
    for name, (key, size) in divided.items():
        if (value := getattr(architecture, name)) % size:
            raise ConfigError(
                f"parallel.{key}: {size} does not divide the model's {name} ({value}); expected a divisor"
            )
    layers = architecture.num_hidden_layers
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    uneven = any("pipeline" in key for key in megatron)  # Megatron's own keys may distribute layers unevenly
    if layers % stages and not uneven:
        fault = f"{layers} layers do not divide into {stages} stages (pipeline × virtual pipeline)"
        raise ConfigError(f"parallel.pipeline_model_parallel_size: the model's {fault}")
