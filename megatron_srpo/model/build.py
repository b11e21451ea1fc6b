"""Qwen3 and its relatives on megatron-core: config.json → TransformerConfig, layer specs, model chunks of
this rank.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.distributed.megatron import (
    GPTModel,
    ModuleSpec,
    PackedSeqParams,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
    tensor_parallel,
)
from megatron_srpo.model.hf_folder import Architecture
from megatron_srpo.model.layers import PackedAttention, RMSNorm
from megatron_srpo.vocab_parallel.shard import VocabShard


def model_dtype(config: Config) -> torch.dtype:
    """The dtype weights and activations have: model.dtype, or bfloat16 on CUDA and float32 on CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.model.dtype)


def uses_transformer_engine(config: Config) -> bool:
    """Whether layers come from Transformer Engine.

    Raises ConfigError when it was asked for and is not there.
    """
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if config.model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl: transformer_engine needs CUDA and its package installed; use auto or local"
        )
    return available and config.model.transformer_impl != "local"


def padded_vocab_size(architecture: Architecture, config: Config) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-architecture.vocab_size // multiple) * multiple


def check_layout(architecture: Architecture, config: Config) -> None:
    """Raises ConfigError when heads, feed-forward width, experts or layers do not divide over the ranks."""
    parallel = config.parallel
    tensor = "tensor_model_parallel_size", parallel.tensor_model_parallel_size
    divided = {"num_attention_heads": tensor, "num_key_value_heads": tensor}
    if architecture.num_experts:
        divided["num_experts"] = "expert_model_parallel_size", parallel.expert_model_parallel_size
        divided["moe_intermediate_size"] = "expert_tensor_parallel_size", parallel.expert_tensor_size
        if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
            raise ConfigError(
                "parallel.sequence_parallel: a mixture-of-experts model with tensor_model_parallel_size > 1 needs it: set it to true"
            )
    else:
        divided["intermediate_size"] = tensor
        if parallel.expert_model_parallel_size > 1:
            raise ConfigError(
                f"parallel.expert_model_parallel_size: {parallel.expert_model_parallel_size}, but the model has no experts: set it to 1"
            )
    for name, (key, size) in divided.items():
        if (value := getattr(architecture, name)) % size:
            raise ConfigError(f"parallel.{key}: {size} does not divide the model's {name} ({value})")
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    uneven = any("pipeline" in key for key in config.megatron)  # Megatron's own keys place layers otherwise
    if architecture.num_hidden_layers % stages and not uneven:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size: the model's {architecture.num_hidden_layers} layers cannot be divided evenly"
            f" into {stages} stages (pipeline × virtual pipeline)"
        )


# Balance within a micro-batch is no sum over tokens; besides, Megatron scales these losses by the tokens that
# it divides by later.
_SPLIT_DEPENDENT = "is not supported: it would depend on how the batch is split"
_REFUSED = {
    **dict.fromkeys(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
        f"(router losses) {_SPLIT_DEPENDENT}",
    ),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), f"(dropout) {_SPLIT_DEPENDENT}"),
    # Both would need process groups that `runtime.parallel` does not make.
    **dict.fromkeys(
        ("hybrid_context_parallel", "hierarchical_context_parallel_sizes"),
        "is not supported; parallel.context_parallel_size shares every sequence among as many ranks",
    ),
}


def _refusal(key: str, config: Config, derived: Mapping[str, Any]) -> str | None:
    """Why `megatron.<key>` may not be set, or None."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        return "TransformerConfig has no such field" + (f"; did you mean {near[0]}?" if near else "")
    if "cuda_graph" in key:
        return "Megatron's CUDA graphs take no packed sequences, and rows of thousands of tokens need none"
    if key == "cp_comm_type" and not uses_transformer_engine(config):
        return "is for Transformer Engine's attention; local layers gather keys and values"
    if key in _REFUSED and config.megatron[key]:
        return _REFUSED[key]
    return "comes from config.json or another section and cannot be set here" if key in derived else None


def transformer_config(architecture: Architecture, config: Config) -> TransformerConfig:
    """The TransformerConfig of this run.

    Raises ConfigError for unknown or forbidden names under `megatron:`.
    """
    dtype, parallel = model_dtype(config), config.parallel
    on_gpu = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    derived: dict[str, Any] = dict(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
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
        # The loss arrives already divided by the batch's one denominator: Megatron must not divide again.
        calculate_per_token_loss=True,
        **_experts(architecture, config),
    )
    chosen: dict[str, Any] = dict(
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
    for key in config.megatron:
        if (problem := _refusal(key, config, derived)) is not None:
            raise ConfigError(f"megatron.{key}: {problem}")
    try:
        return TransformerConfig(**derived, **(chosen | config.megatron))
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"megatron: TransformerConfig refuses these settings: {error}") from None


def _experts(architecture: Architecture, config: Config) -> dict[str, Any]:
    """What TransformerConfig must know of a mixture of experts, routed as transformers does; no token is
    dropped.
    """
    if not architecture.num_experts:
        return {}
    return dict(
        num_moe_experts=architecture.num_experts,
        moe_router_topk=architecture.num_experts_per_tok,
        moe_ffn_hidden_size=architecture.moe_intermediate_size,
        # A softmax over all experts, renormalised over the chosen ones, is a softmax over the chosen ones.
        moe_router_pre_softmax=not architecture.norm_topk_prob,
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=uses_transformer_engine(config),
    )


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns final hidden states: the loss computes logits itself, tile by tile.

    unpadded_vocab_size: the columns of the output matrix that are real tokens; set by `build_chunks`.
    """

    unpadded_vocab_size: int

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        # overlap_param_gather waits for a module's weights before its forward pass; this one's the loss reads
        if self.post_process:
            for wait in self.output_layer._forward_pre_hooks.values():
                wait(self.output_layer)
        return hidden_states

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary / TP, H] this rank's rows of the output matrix (last stage only)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def vocab_shard(self) -> VocabShard:
        """Which ids this rank's rows of `output_weight` stand for."""
        rank, group = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        return VocabShard.of_rank(rank, self.output_weight.shape[0], self.unpadded_vocab_size, group)

    def final_hidden(self, output: Tensor) -> Tensor:
        """The last stage's output [this rank's tokens, 1, H] as [T, H], identical on all tensor- and
        context-parallel ranks.

        Its backward sums the ranks' gradients (each rank's loss sees only its vocabulary shard), and with
        sequence parallelism hands each rank its own tokens: one gather forward, one reduce-scatter backward.
        So it is with context
        parallelism: T is the whole row, the ranks' parts one after another, of which each rank's loss sees
        other rows.
        """
        if self.config.sequence_parallel:
            output = tensor_parallel.gather_from_sequence_parallel_region(
                output, tensor_parallel_output_grad=True
            )
        else:
            output = tensor_parallel.copy_to_tensor_model_parallel_region(output)
        group = parallel_state.get_context_parallel_group()
        return tensor_parallel.gather_from_sequence_parallel_region(output, group=group)[:, 0]


def build_chunks(architecture: Architecture, config: Config, device: torch.device) -> list[PolicyModel]:
    """This rank's model chunks (one, or one per virtual stage) with unloaded weights."""
    core = transformer_config(architecture, config)
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else (None,):
        chunk = PolicyModel(
            core,
            _transformer_engine_spec(core) if uses_transformer_engine(config) else _local_spec(core, stage),
            vocab_size=padded_vocab_size(architecture, config),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=stage,
        )
        chunk.unpadded_vocab_size = architecture.vocab_size
        if (
            scaling := architecture.rope_scaling
        ) is not None:  # GPTModel takes the factor, but not the other three
            rotary = chunk.rotary_pos_emb
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **dataclasses.asdict(scaling))
        chunks.append(chunk.to(device))
    return chunks


def _transformer_engine_spec(core: TransformerConfig) -> ModuleSpec:
    experts = dict(num_experts=core.num_moe_experts, moe_grouped_gemm=core.moe_grouped_gemm)
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=core.qk_layernorm, **experts)


def _local_spec(core: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=core.num_moe_experts, qk_layernorm=core.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if core.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if (
        core.num_moe_experts
    ):  # Transformer Engine fuses this norm into dense layers only: its name in checkpoints
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention.core_attention = PackedAttention
    layers = get_num_layers_to_build(core, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def packed_params(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Megatron's description of packed documents: cu_seqlens is [documents + 1] int32, in tokens of the whole
    row.

    Transformer Engine's context parallelism wants padded bounds as well. Its flash kernels take no padding
    between documents: all of a document counts, and causality hides the padding at its end.
    """
    padded = cu_seqlens if parallel_state.get_context_parallel_world_size() > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
