"""Build this rank's chunks of the policy on megatron-core, with Transformer Engine's layers or local ones."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.config.schema import ModelSection, ParallelSection
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.distributed.device import uses_transformer_engine
from megatron_srpo.distributed.megatron import (
    GPTModel,
    ModuleSpec,
    PackedSeqParams,
    RotaryEmbedding,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
    tensor_parallel,
)
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.layers import PackedAttention, PackedRow, RMSNorm
from megatron_srpo.model.layout import padded_vocab_size
from megatron_srpo.model.packed_row import Documents
from megatron_srpo.model.settings import transformer_config
from megatron_srpo.vocab_parallel.shard import VocabShard


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns final hidden states: the loss computes logits tile by tile."""

    unpadded_vocab_size: int  # rows of the output matrix that are real tokens; set by `build_chunks`
    uses_local_layers: bool  # instead of Transformer Engine's; set by `build_chunks`

    @override
    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        # overlap_param_gather waits for weights in a hook of their module's forward, which the loss bypasses.
        if self.post_process:
            for wait in self.output_layer._forward_pre_hooks.values():
                wait(self.output_layer)
        return hidden_states

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [padded vocabulary / TP, H], on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None
        return weight

    @property
    def vocab_shard(self) -> VocabShard:
        """This rank's slice of the vocabulary."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard.of_rank(rank, self.output_weight.shape[0], self.unpadded_vocab_size, group)

    def packed_row(self, documents: Documents, positions: Tensor) -> PackedSeqParams:
        """Describe a packed row to the layers; `positions` [t] are those of this rank's tokens.

        Transformer Engine's context parallelism needs padded bounds as well. Its flash kernels allow no
        padding between documents, so each document includes its padding, which the causal mask hides at its
        end.

        Raises:
            ValueError: A document continues another one, which Transformer Engine's layers do not support.
        """
        if self.uses_local_layers:
            group = parallel_state.get_context_parallel_group()
            context = ContextParallel(group.rank(), group.size())
            rotary = self.rotary_pos_emb
            assert isinstance(rotary, RotaryEmbedding)
            return PackedRow.of(documents, context, positions, rotary, self.config.params_dtype)
        if any(prefix >= 0 for prefix in documents.prefixes):
            raise ValueError("a document continues another one: Transformer Engine's layers cannot share it")
        bounds = torch.tensor(documents.bounds, dtype=torch.int32, device=positions.device)
        padded: Any = bounds if parallel_state.get_context_parallel_world_size() > 1 else None
        longest = max(end - start for start, end in itertools.pairwise(documents.bounds))
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def final_hidden(self, output: Tensor) -> Tensor:
        """Gather the last stage's output, [this rank's tokens, 1, H], to [T, H] on all TP and CP ranks.

        Backward sums the ranks' gradients, because each rank's loss covers only its vocabulary shard and,
        with context parallelism, its rows of T (the concatenated parts of the CP ranks). With sequence
        parallelism: one all-gather forward, one reduce-scatter backward.
        """
        gather = tensor_parallel.gather_from_sequence_parallel_region
        if self.config.sequence_parallel:
            output = gather(output, tensor_parallel_output_grad=True)
        else:
            output = tensor_parallel.copy_to_tensor_model_parallel_region(output)
        return gather(output, group=parallel_state.get_context_parallel_group())[:, 0]


def build_chunks(
    architecture: Architecture,
    model: ModelSection,
    parallel: ParallelSection,
    megatron: Mapping[str, Any],
    device: torch.device,
) -> list[PolicyModel]:
    """Build this rank's model chunks (one, or one per virtual stage); the weights are not loaded yet."""
    core = transformer_config(architecture, model, parallel, megatron)
    use_transformer_engine = uses_transformer_engine(model)
    multiple, tensor_size = model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    vocab_size = padded_vocab_size(architecture.vocab_size, multiple, tensor_size)
    virtual = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else (None,):
        spec: Any = _transformer_engine_spec(core) if use_transformer_engine else _local_spec(core, stage)
        chunk = PolicyModel(
            core,
            spec,
            vocab_size=vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope" if use_transformer_engine else "none",  # see PackedAttention
            rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]  (a float, too)
            vp_stage=stage,
        )
        chunk.unpadded_vocab_size = architecture.vocab_size
        chunk.uses_local_layers = not use_transformer_engine
        if chunk.uses_local_layers:
            chunk.rotary_pos_emb = RotaryEmbedding(
                core.kv_channels or 0,
                rotary_percent=1.0,
                rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]
                use_cpu_initialization=core.use_cpu_initialization,
            )
        if architecture.rope_scaling is not None:  # GPTModel accepts the factor, but not the other three
            scaling = dataclasses.asdict(architecture.rope_scaling)
            rotary: Any = chunk.rotary_pos_emb
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
        chunks.append(chunk.to(device))
    return chunks


def _transformer_engine_spec(core: TransformerConfig) -> ModuleSpec:
    experts, grouped, qk_norm = core.num_moe_experts, core.moe_grouped_gemm, core.qk_layernorm
    return get_gpt_layer_with_transformer_engine_spec(experts, moe_grouped_gemm=grouped, qk_layernorm=qk_norm)


def _local_spec(core: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    layer: Any = get_gpt_layer_local_spec(
        num_experts=core.num_moe_experts, qk_layernorm=core.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if core.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if core.num_moe_experts:
        # Transformer Engine fuses this norm only into dense layers, so checkpoints use its name here.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention.core_attention = PackedAttention
    layers = get_num_layers_to_build(core, vp_stage=stage)
    norm: Any = RMSNorm  # Megatron's annotation is its own class
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
