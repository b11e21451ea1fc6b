"""Bytes on one rank, by part: parameters and their states, and the activations that autograd keeps."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.layout import padded_vocab_size
from megatron_srpo.plan.machine import Machine, Workload, planned_dtype
from megatron_srpo.vocab_parallel.fused import MEMORY


class Parameters(NamedTuple):
    """Elements on one rank; experts are replicated over fewer ranks than dense parameters."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.dense + self.experts


@functools.cache
def total_parameters(architecture: Architecture) -> int:
    """Count the elements of all stored tensors: a tied matrix once, without padding."""
    return sum(math.prod(shape) for shape in architecture.tensor_shapes().values())


def layer_parameters(architecture: Architecture, config: Config) -> Parameters:
    """Count the elements of one layer on one rank."""
    parallel, dense, experts = config.parallel, 0, 0
    for mapping in architecture.layer_mappings.values():
        if mapping.is_expert:
            experts += mapping.numel * architecture.num_experts // parallel.expert_tensor_size
        else:
            dense += mapping.numel // (1 if mapping.dim is None else parallel.tensor_model_parallel_size)
    return Parameters(dense, experts // parallel.expert_model_parallel_size)


def stage_parameters(architecture: Architecture, config: Config, stage: int) -> Parameters:
    """Count the elements on a rank of `stage`, padding included; a tied matrix is on first and last stage."""
    parallel = config.parallel
    stages, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    if key := next((key for key in config.megatron if "pipeline" in key), None):
        raise ConfigError(f"megatron.{key}: the planner supports only evenly divided layers")
    layers = architecture.num_hidden_layers // stages
    layer, is_last = layer_parameters(architecture, config), stage == stages - 1
    matrix = padded_rows(architecture, config) // tensor * architecture.hidden_size
    matrices = int(stage == 0) + int(is_last and not (architecture.tie_word_embeddings and stage == 0))
    ends = matrix * matrices + architecture.hidden_size * is_last
    return Parameters(layers * layer.dense + ends, layers * layer.experts)


def padded_rows(architecture: Architecture, config: Config) -> int:
    """Return the rows of the embedding and the output matrix on all tensor-parallel ranks."""
    divisible_by = config.model.make_vocab_size_divisible_by
    tensor = config.parallel.tensor_model_parallel_size
    return padded_vocab_size(architecture.vocab_size, divisible_by, tensor)


def replicas(config: Config, gpus: int) -> tuple[int, int]:
    """Return the number of ranks with the same dense parameters, and of those with the same experts."""
    parallel = config.parallel
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    experts *= parallel.pipeline_model_parallel_size
    return data_parallel_size(parallel, gpus) * parallel.context_parallel_size, gpus // experts


class Batch(NamedTuple):
    """Tokens and response tokens of a rank's micro-batch, and distilled response tokens of its step."""

    tokens: int
    responses: int
    distilled: int

    @classmethod
    def worst(cls, config: Config, gpus: int, workload: Workload) -> Batch:
        """Return the fullest micro-batch (budget or longest sequence), assuming only response tokens."""
        rollout, size = config.rollout, data_parallel_size(config.parallel, gpus)
        context = config.parallel.context_parallel_size
        longest = math.ceil((rollout.max_prompt_tokens + rollout.max_response_tokens) / context)
        samples = rollout.prompts_per_step * rollout.samples_per_prompt
        distilled = math.ceil(samples / size) * workload.response_tokens * workload.distilled_share / context
        tokens = max(config.train.micro_batch_tokens, longest)
        return cls(tokens, tokens, math.ceil(distilled))


def memory(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, batch: Batch
) -> dict[str, float]:
    """Return bytes by part on the fullest rank during training.

    In addition to `state_bytes`, `activation_bytes` and `loss_bytes`: the hidden states that the teacher
    keeps for the loss, [distilled, H] per model; and the batch's ids, positions, targets and weights (8 + 8 +
    8 + 5·4 bytes per token).
    """
    stages = range(config.parallel.pipeline_model_parallel_size)
    parts = [_of_stage(architecture, config, machine, gpus, batch, stage) for stage in stages]
    return max(parts, key=lambda of_stage: sum(of_stage.values()))


def _of_stage(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, batch: Batch, stage: int
) -> dict[str, float]:
    size, parallel = planned_dtype(config, machine).itemsize, config.parallel
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    tiles, rows = loss_bytes(architecture, config, machine, batch) if is_last else (0.0, 0.0)
    kept, transient = activation_bytes(architecture, config, machine, batch, stage)
    parts = state_bytes(architecture, config, machine, gpus, stage)
    visitors = 0.0
    if config.optimizer.optimizer_cpu_offload:
        visitors = parts.pop("optimizer") + parts.pop("EMA", 0.0)
    # The tiles are freed before the backward pass begins.
    parts["activations"] = kept + rows + max(0.0, transient - tiles)
    parts["loss tiles"] = tiles
    if config.algorithm.uses_teacher and is_last:
        models = 2 if config.teacher.kind == "trust_region" else 1
        parts["teacher's hidden states"] = models * batch.distilled * (architecture.hidden_size * size + 4)
    parts["packed batch"] = batch.tokens * 44
    if visitors:  # they are onloaded after activations and tiles are freed
        beyond = visitors - parts["activations"] - tiles
        parts["optimizer during updates, beyond activations"] = max(0.0, beyond)
    parts["reserve"] = machine.reserve
    return parts


def state_bytes(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, stage: int
) -> dict[str, float]:
    """Return the bytes that a rank of `stage` holds throughout the run.

    With P elements of b bytes on the rank and D replicas of each: weights b·P; gradients 4·P
    (`grad_reduce_in_fp32`); Adam's two moments 8·P, and 4·P for the fp32 masters of bf16 weights, both
    divided by D with the distributed optimizer (Rajbhandari et al., arXiv 1910.02054, P_os); b·P for the copy
    with which a teacher scores, and 4·P/D for an EMA's fp32 share. The embedded engine holds the complete
    model, b bytes per parameter, on every rank; on a CPU in fp32, up to twice (`OneDNNLinear`).
    """
    size, parallel = planned_dtype(config, machine).itemsize, config.parallel
    own = stage_parameters(architecture, config, stage)
    share = sum(count / ranks for count, ranks in zip(own, replicas(config, gpus), strict=True))
    optimizer = (8 + (4 if size < 4 else 0)) * (share if parallel.use_distributed_optimizer else own.total)
    parts = {"weights": own.total * size, "gradients": own.total * 4, "optimizer": optimizer}
    if config.algorithm.uses_teacher and config.teacher.kind != "live":
        parts["teacher"] = own.total * size
        if config.teacher.kind == "ema":
            parts["EMA"] = 4 * share
    if config.rollout.engine_settings.in_process and config.rollout.replay is None:
        copies = 2 if size == 4 and not machine.is_gpu else 1
        parts["embedded engine"] = copies * total_parameters(architecture) * size
    return parts


def activation_bytes(
    architecture: Architecture, config: Config, machine: Machine, batch: Batch, stage: int
) -> tuple[float, float]:
    """Return (bytes kept from forward to backward, maximum that backward adds to them) on a rank of `stage`.

    A stage of 1F1B keeps as many micro-batches as there are stages from it to the last. Interleaved, stage s
    of p keeps (v - 1)·p + 2·(p - s - 1) + 1 micro-batches of its v chunks (Narayanan et al., arXiv
    2104.04473, §2.2; Megatron's warm-up). Full recompute keeps the input of each `recompute_num_layers`-th
    layer, and one such group completely while it is recomputed. Selective recompute, which only saves, is
    ignored.
    """
    parallel, size = config.parallel, planned_dtype(config, machine).itemsize
    stages = parallel.pipeline_model_parallel_size
    layers = architecture.num_hidden_layers // stages
    in_flight = float(stages - stage)
    if virtual := parallel.virtual_pipeline_model_parallel_size:
        in_flight = ((virtual - 1) * stages + 2 * (stages - stage - 1) + 1) / virtual
    layer, transient = layer_bytes(architecture, config, machine, batch)
    width = architecture.hidden_size * size * batch.tokens / _sequence_shards(config)
    if config.megatron.get("recompute_granularity") == "full":
        group = config.megatron.get("recompute_num_layers") or 1
        if config.megatron.get("recompute_method", "uniform") == "uniform":
            return in_flight * math.ceil(layers / group) * width, group * layer + transient
        whole = max(0, layers - group)  # block: the first `group` layers are recomputed, the others kept
        return in_flight * (min(group, layers) * width + whole * layer), layer + transient
    return in_flight * layers * layer, transient


def _sequence_shards(config: Config) -> int:
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def layer_bytes(
    architecture: Architecture, config: Config, machine: Machine, batch: Batch
) -> tuple[float, float]:
    """Return (bytes that autograd keeps of one layer per micro-batch, bytes that backward adds) on one rank.

    In numbers per token, with A = query heads · d, K = key heads · d and F the feed-forward width, all
    divided by TP, and H divided by TP only with sequence parallelism. Each tensor is counted once, where it
    is first kept (cf. Korthikanti et al., arXiv 2205.05198, eq. 2, for a different layer):

    Local layers: two norms, each with input, normalised input and output, 6H (bf16: the input in fp32, so
    8H); query-key-value product A + 2K; queries copied out of it and normalised, keys normalised, 2A + K
    (bf16: inputs in fp32, 3A + 3K); rotated A + K; attention's output and the projection's input 2A;
    feed-forward: both halves 2F, silu(first) F, second + offset F, product F; the fused kernel on a GPU
    keeps 2F + F. In fp32: 4 bytes per norm and query head, for scale and log-sum-exp.
    Transformer Engine: norms keep input and output, 4H; A + 2K, queries 2A, keys K, output A, cosines and
    sines 4d; 3F.

    Experts: for each of a token's k experts (evenly loaded), its input H, a feed-forward network as above and
    F for its weight; 5 bytes per expert for the router's map, 24 per chosen expert. Backward: gradients of
    the feed-forward's tensors, 4F, and of the residual stream, 2H. Local, with C context-parallel ranks: keys
    and values of all ranks, 2K·C, instead of the rotated keys; in backward as many gradients. (Transformer
    Engine sends keys and values around instead.) On a CPU, documents of similar length are padded to one.
    """
    a, size = architecture, planned_dtype(config, machine).itemsize
    tensor = config.parallel.tensor_model_parallel_size
    is_local, is_wide = config.model.transformer_impl == "local" or not machine.is_gpu, size > 2
    heads, key_heads, head = a.num_attention_heads / tensor, a.num_key_value_heads / tensor, a.head_dim
    queries, keys, hidden = heads * head, key_heads * head, a.hidden_size / _sequence_shards(config)
    if is_local:
        norms = (6 if is_wide else 8) * hidden
        qk_norm = (2 * queries + keys if is_wide else 3 * queries + 3 * keys) if a.qk_norm else queries
        numbers = norms + qk_norm + (queries + 2 * keys) + (queries + keys) + 2 * queries
    else:
        numbers = 4 * hidden + 4 * queries + 3 * keys + 4 * head
    kept = numbers * size + 4 * (2 + 2 * heads + key_heads)
    feed = 3 if machine.is_gpu else 5
    if a.num_experts:
        width, chosen = a.moe_intermediate_size / config.parallel.expert_tensor_size, a.num_experts_per_tok
        each = a.hidden_size + (feed + (not machine.is_gpu)) * width
        kept += chosen * each * size + 5 * a.num_experts + 24 * chosen
        transient = (chosen * (4 * width + a.hidden_size) + 2 * hidden) * size
    else:
        kept += feed * a.intermediate_size / tensor * size
        transient = (4 * a.intermediate_size / tensor + 2 * hidden) * size
    if is_local and (context := config.parallel.context_parallel_size) > 1:
        kept += (2 * context - 1) * keys * size
        transient = max(transient, 2 * keys * context * size + 2 * hidden * size)
    return batch.tokens * kept, batch.tokens * transient


def loss_bytes(
    architecture: Architecture, config: Config, machine: Machine, batch: Batch
) -> tuple[float, float]:
    """Return (bytes of the tiles of logits, other bytes that the last stage keeps for the loss).

    Tiles: at most `train.logits_memory_mib`, and at most the response tokens' need: two in fp32 (one without
    a teacher), and on a GPU one in the model's dtype. Others: the final norm's three [T, H], the hidden
    states [T, H] of all context-parallel ranks, and [R, H] of the responses, their gradient and the teacher.
    """
    size, has_teacher = planned_dtype(config, machine).itemsize, config.algorithm.uses_teacher
    limit = (config.train.logits_memory_mib or 0) * 2**20 or MEMORY["cuda" if machine.is_gpu else "cpu"]
    width = padded_rows(architecture, config) // config.parallel.tensor_model_parallel_size
    sized = 8 + (size if machine.is_gpu else 0)  # bytes per number that decide a tile's size
    used = (8 if has_teacher else 4) + (size if machine.is_gpu else 0)
    tile_tokens = min(max(16, limit // (sized * width)), batch.responses)
    rows = (3 + config.parallel.context_parallel_size) * batch.tokens
    rows += (3 if has_teacher else 2) * batch.responses
    return tile_tokens * used * width, rows * architecture.hidden_size * size
