"""Build Megatron's TransformerConfig, and check that the layout divides the model."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import ModelSection, ParallelSection
from megatron_srpo.distributed.device import model_dtype, uses_transformer_engine
from megatron_srpo.distributed.megatron import TransformerConfig
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


# A micro-batch's balance loss is not a sum over tokens, and Megatron scales router losses by token counts.
_SPLIT_DEPENDENT = "is not supported: it would depend on how the batch is split"
_ROUTER_LOSSES = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff")
_ROTARY = ("rotary_interleaved", "no_rope_freq")
_CONTEXT = ("hybrid_context_parallel", "hierarchical_context_parallel_sizes")  # need other process groups
_REFUSED = {
    **dict.fromkeys(_ROUTER_LOSSES, f"(router losses) {_SPLIT_DEPENDENT}"),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), f"(dropout) {_SPLIT_DEPENDENT}"),
    **dict.fromkeys(_ROTARY, "is not supported: no model of these families has it"),
    **dict.fromkeys(_CONTEXT, "is not supported; parallel.context_parallel_size splits every sequence"),
}


def transformer_config(
    architecture: Architecture, model: ModelSection, parallel: ParallelSection, megatron: Mapping[str, Any]
) -> TransformerConfig:
    """Build the run's TransformerConfig; raise ConfigError for unknown or forbidden names in `megatron:`."""
    derived = architecture.transformer_settings() | _run_settings(model, parallel)
    if architecture.num_experts:
        derived["moe_grouped_gemm"] = uses_transformer_engine(model)
    for key, value in megatron.items():
        if (refusal := _refusal(key, value, model, derived)) is not None:
            raise ConfigError(f"megatron.{key}: {refusal}")
    defaults = _default_settings(interleaved=parallel.virtual_pipeline_model_parallel_size is not None)
    try:
        return TransformerConfig(**derived, **(defaults | dict(megatron)))
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"megatron: TransformerConfig rejects these settings: {error}") from None


def _run_settings(model: ModelSection, parallel: ParallelSection) -> dict[str, Any]:
    """Return the arguments that follow from the sections model and parallel."""
    dtype = model_dtype(model)
    return dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # The loss is divided by the batch's common denominator already: Megatron must not divide again.
        calculate_per_token_loss=True,
    )


def _default_settings(interleaved: bool) -> dict[str, Any]:
    """Return the arguments that `megatron:` may override."""
    on_gpu = torch.cuda.is_available()
    return dict(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=not on_gpu,
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # Interleaved 1F1B gives wrong gradients with batched point-to-point calls.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        moe_token_dispatcher_type="alltoall",
    )


def _refusal(key: str, value: Any, model: ModelSection, derived: Mapping[str, Any]) -> str | None:
    """Return the reason why `megatron.<key>` must not be `value`, or None."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        return "TransformerConfig has no such field" + (f"; did you mean {near[0]}?" if near else "")
    if "cuda_graph" in key:
        return "Megatron's CUDA graphs do not support packed sequences, and long rows do not need them"
    if key == "cp_comm_type" and not uses_transformer_engine(model):
        return "is for Transformer Engine's attention; local layers gather keys and values"
    if key == "apply_rope_fusion" and value and not uses_transformer_engine(model):
        return "is for Transformer Engine's layers"
    if key in _REFUSED and value:
        return _REFUSED[key]
    return "comes from config.json or another section and cannot be set here" if key in derived else None
