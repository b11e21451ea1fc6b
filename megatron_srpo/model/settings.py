"""Build Megatron's TransformerConfig."""

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
