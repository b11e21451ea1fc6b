"""Seconds and transferred bytes of one training step, by part: a model for choosing layouts."""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_srpo.config.rollout_section import WAVE_BATCHES
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.plan.machine import Machine, Workload, planned_dtype
from megatron_srpo.plan.memory import Parameters, replicas, stage_parameters, state_bytes, total_parameters

LINE_BYTES = (8, 12)  # per prompt and per response token of a long sample in rollouts/: ids, log-prob, text
TOKEN_BYTES = (4, 12)  # the same in the exchange between ranks: ids, log-prob
OUTLINE_BYTES = 100  # of a sample
# To send and read a token; to read and plan an outline. On one core of a busy x86 machine, 2026-11-29
TOKEN_SECONDS, OUTLINE_SECONDS = 1.2e-7, 5e-5
LATENCY = 1e-5  # minimum seconds of a collective per doubling of its ranks; assumed
LONGEST = 4  # longest response of a step over the mean one, up to rollout.max_response_tokens; assumed
DECODING = 0.6  # share of the memory bandwidth that a server reaches; assumed
EMBEDDED_SECONDS = 1e-3  # of Python, per layer and token of transformers' loop; assumed


def active_parameters(architecture: Architecture) -> int:
    """Count the elements of the layers' matrices that each token uses: only its chosen experts."""
    active = 0
    for mapping in architecture.layer_mappings.values():
        if len(mapping.shape) == 2:
            active += mapping.numel * (architecture.num_experts_per_tok if mapping.is_expert else 1)
    return architecture.num_hidden_layers * active


def forward_flops(architecture: Architecture, tokens: float, document: float) -> float:
    """Return the FLOP of `tokens` through all layers, in documents of `document` tokens.

    Two per parameter and token; for attention 4·A per pair of query and key (scores and values, A = heads ·
    d), with document²/2 pairs due to the causal mask (Chowdhery et al., arXiv 2204.02311, appendix B).
    """
    width = architecture.num_attention_heads * architecture.head_dim
    attention = 2 * width * document * architecture.num_hidden_layers
    return tokens * (2 * active_parameters(architecture) + attention)


def step_flops(architecture: Architecture, config: Config, workload: Workload) -> dict[str, float]:
    """Return the model FLOP of a training step on all ranks, by phase; recomputation is not counted.

    update: forward, and backward with twice as much; for the output matrix, only on response tokens, three
    products and for distilled tokens the teacher's (`vocab_parallel.fused`). scoring: log-probs of the old
    policy, if there are several optimizer steps. teacher: forward and one product for entropies, on distilled
    samples.
    """
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    head = 2.0 * architecture.hidden_size * architecture.vocab_size
    responses, share = samples * workload.response_tokens, workload.distilled_share
    forward = forward_flops(architecture, samples * workload.document, workload.document)
    flops = {"update": 3 * forward + (3 + share) * responses * head}
    if config.mini_batch_prompts < config.rollout.prompts_per_step:
        flops["scoring"] = forward + responses * head
    if config.algorithm.uses_teacher and share:
        document = workload.teacher_document(config)
        flops["teacher"] = forward_flops(architecture, share * samples * document, document)
        flops["teacher"] += share * responses * head
    return flops


class Transfer(NamedTuple):
    """Bytes that one rank sends per step, in `calls` collectives of `ranks`, at `bandwidth` bytes/s."""

    bytes: float
    calls: float
    ranks: int
    bandwidth: float

    @property
    def seconds(self) -> float:
        """Seconds without overlap (on GPUs, gradients are reduced during backward passes)."""
        return self.bytes / self.bandwidth + self.calls * LATENCY * math.log2(max(2, self.ranks))


def traffic(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> dict[str, Transfer]:
    """Return the transfers of a rank of the fullest stage, by purpose.

    A ring over n ranks sends (n - 1)/n of the gathered or scattered bytes, twice that in an all-reduce
    (Patarasuk & Yuan 2009). t: tokens that pass the rank forward, shared with its tensor-parallel ranks.

    tensor: two all-reduces of [t, H] per layer, forward and backward (Shoeybi et al., arXiv 1909.08053; the
    same bytes with sequence parallelism, and two more gathers backward, arXiv 2205.05198). experts: dispatch
    and combine of k·[t, H] per layer, forward and backward. pipeline: [t, H] forward and backward. context:
    keys and values of [t, K], C - 1 times per layer, and as often their gradients backward (when Transformer
    Engine also sends keys and values again); the same for the last hidden states. gradients: reduce-scatter
    in fp32 and all-gather of weights (all-reduce without the distributed optimizer), per optimizer step.
    host: offloaded tensors, in both directions. teacher: `Teacher.follow`, one all-reduce per parameter.
    samples: see `exchanged_bytes`. export: every rank receives every tensor.
    """
    a, parallel, rollout = architecture, config.parallel, config.rollout
    size, tensor = planned_dtype(config, machine).itemsize, parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    context, samples = parallel.context_parallel_size, rollout.prompts_per_step * rollout.samples_per_prompt
    ranks = data_parallel_size(parallel, gpus) * context  # ranks with different tokens
    shards = tensor if parallel.sequence_parallel else 1
    trained = samples * workload.document / ranks
    taught = 0.0
    if config.algorithm.uses_teacher:
        taught = samples * workload.distilled_share * workload.teacher_document(config) / ranks
    scored = trained if config.mini_batch_prompts < rollout.prompts_per_step else 0
    recomputed = trained if config.megatron.get("recompute_granularity") == "full" else 0
    passes = 2 * trained + (taught + scored) + recomputed
    layers, width = a.num_hidden_layers / stages, a.hidden_size * size
    micro_batches = micro_batch_count(config, gpus, workload)
    found: dict[str, Transfer] = {}
    if tensor > 1:
        volume = 4 * passes + (2 * trained if shards > 1 else 0)
        sent = volume * layers * width * (tensor - 1) / tensor
        found["tensor"] = Transfer(sent, 4 * layers * micro_batches, tensor, machine.bandwidth(tensor))
    if (experts := parallel.expert_model_parallel_size) > 1:
        sent = 2 * passes * layers * a.num_experts_per_tok * width / tensor * (experts - 1) / experts
        ranks = experts * parallel.expert_tensor_size
        found["experts"] = Transfer(sent, 4 * layers * micro_batches, experts, machine.bandwidth(ranks))
    if context > 1:
        again = 0 if config.model.transformer_impl == "local" or not machine.is_gpu else trained
        keys = 2 * a.num_key_value_heads * a.head_dim * size / tensor
        sent = (context - 1) * ((passes + again) * layers * keys + passes * width)
        bandwidth = machine.bandwidth(tensor * context, abreast=tensor)
        found["context"] = Transfer(sent, 2 * (layers + 1) * micro_batches, context, bandwidth)
    if stages > 1:
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        sent = passes * chunks * width / shards
        found["pipeline"] = Transfer(sent, 2 * chunks * micro_batches, 2, machine.network_bandwidth)
    own = max((stage_parameters(a, config, stage) for stage in range(stages)), key=lambda own: own.total)
    found |= _replication(a, config, machine, gpus, own, size)
    if moved := _host_bytes(architecture, config, machine, gpus):
        found["host"] = Transfer(moved, 2, 1, machine.host_bandwidth)
    found["samples"] = Transfer(exchanged_bytes(config, gpus, workload), 5, gpus, machine.network_bandwidth)
    if tensor * stages * experts > 1:
        sent = total_parameters(a) * size
        found["export"] = Transfer(sent, _layer_tensors(a), tensor * stages, machine.network_bandwidth)
    return found


def _layer_tensors(a: Architecture) -> int:
    """Return the number of Hugging Face tensors of all layers."""
    mappings = a.layer_mappings.values()
    in_layer = sum(len(m.tensors) * (a.num_experts if m.is_expert else 1) for m in mappings)
    return in_layer * a.num_hidden_layers


def _replication(
    a: Architecture, config: Config, machine: Machine, gpus: int, own: Parameters, size: int
) -> dict[str, Transfer]:
    """Return the transfers that keep a parameter's replicas identical."""
    parallel, copies = config.parallel, replicas(config, gpus)
    shares = [(count, ranks) for count, ranks in zip(own, copies, strict=True) if count and ranks > 1]
    if not shares:
        return {}
    updates = config.rollout.prompts_per_step // config.mini_batch_prompts
    moved = sum(count * (ranks - 1) / ranks for count, ranks in shares)
    tensor = parallel.tensor_model_parallel_size
    bandwidth = machine.bandwidth(tensor * copies[0], abreast=tensor)
    buckets = math.ceil(own.total / max(40e6, 1e6 * copies[0]))  # Megatron's default bucket size
    each = (4 + size) if parallel.use_distributed_optimizer else 8
    found = {"gradients": Transfer(updates * each * moved, 2 * updates * buckets, copies[0], bandwidth)}
    if config.algorithm.uses_teacher and config.teacher.kind == "ema":
        layers = a.num_hidden_layers // parallel.pipeline_model_parallel_size
        matrices = 8 + 2 * a.num_experts // parallel.expert_model_parallel_size
        found["teacher"] = Transfer(2 * size * moved, layers * matrices, copies[0], bandwidth)
    return found


def _host_bytes(architecture: Architecture, config: Config, machine: Machine, gpus: int) -> float:
    """Return the bytes sent to the host plus those sent back in a step, which do not overlap."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    parts = [state_bytes(architecture, config, machine, gpus, stage) for stage in stages]
    states = max(parts, key=lambda of_stage: sum(of_stage.values()))
    updates = config.rollout.prompts_per_step // config.mini_batch_prompts
    stays = updates if config.optimizer.optimizer_cpu_offload else int(config.rollout.colocated)
    moved = stays * (states["optimizer"] + states.get("EMA", 0.0))
    return 2 * (moved + config.rollout.colocated * states.get("teacher", 0.0))


def exchanged_bytes(config: Config, gpus: int, workload: Workload) -> float:
    """Return the bytes of a step's samples that the first rank receives (`rollout.exchange`).

    Outlines of all samples (an all-reduce sends them twice), the tokens that it trains, and the lines of all
    samples for rollouts/.
    """
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    lengths = workload.prompt_tokens, workload.response_tokens
    trained = samples / data_parallel_size(config.parallel, gpus)
    tokens = sum(size * length for size, length in zip(TOKEN_BYTES, lengths, strict=True))
    if config.algorithm.uses_teacher:
        prompt = workload.teacher_document(config) - workload.response_tokens
        tokens += TOKEN_BYTES[0] * workload.distilled_share * prompt
    lines = sum(size * length for size, length in zip(LINE_BYTES, lengths, strict=True))
    received = 2 * OUTLINE_BYTES * samples + trained * tokens
    return received + (samples * lines if config.logging.rollouts else 0.0)


def micro_batch_count(config: Config, gpus: int, workload: Workload) -> int:
    """Count a rank's micro-batches of complete samples in one step, the same number on every rank."""
    data, mini = data_parallel_size(config.parallel, gpus), config.mini_batch_prompts
    each = math.ceil(mini * config.rollout.samples_per_prompt / data)
    budget = config.train.micro_batch_tokens * config.parallel.context_parallel_size
    per_row = max(1, budget // workload.document)
    return math.ceil(each / per_row) * (config.rollout.prompts_per_step // mini)


def step_seconds(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> dict[str, float]:
    """Return the seconds of a step by part; see `total`.

    sampling: `sampling_seconds`. update, scoring, teacher: FLOP divided by ranks, peak and MFU; full
    recompute repeats the update's forward pass. idle: a rank trains complete samples, ⌈n/D⌉ of an optimizer
    batch's n. bubble: (p - 1)/(v·m) of the computation, for p stages and m micro-batches (arXiv 2104.04473,
    §2.2). Then `traffic`, and the time to plan the step and to read the samples on a CPU.
    """
    rate, rollout = machine.peak * machine.mfu * gpus, config.rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    sampled = rollout.prompts_per_step, rollout.samples_per_prompt
    parts = {"sampling": sampling_seconds(architecture, config, machine, gpus, workload, *sampled)}
    compute = {phase: flops / rate for phase, flops in step_flops(architecture, config, workload).items()}
    if config.megatron.get("recompute_granularity") == "full":
        again = forward_flops(architecture, samples * workload.document, workload.document)
        compute["recompute"] = again / rate
    data, n = (
        data_parallel_size(config.parallel, gpus),
        config.mini_batch_prompts * rollout.samples_per_prompt,
    )
    busy = sum(compute.values())
    parts |= compute
    parts["idle"] = busy * (math.ceil(n / data) * data / n - 1)
    stages = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size or 1
    updates = rollout.prompts_per_step // config.mini_batch_prompts
    row_count = micro_batch_count(config, gpus, workload) / updates
    parts["bubble"] = (busy + parts["idle"]) * (stages - 1) / (virtual * max(row_count, 1))
    for name, transfer in traffic(architecture, config, machine, gpus, workload).items():
        parts[f"traffic: {name}"] = transfer.seconds
    if gpus > 1:
        trained = samples / data
        parts["reading samples"] = samples * OUTLINE_SECONDS + trained * workload.document * TOKEN_SECONDS
    return {name: seconds for name, seconds in parts.items() if seconds}


def total(parts: dict[str, float], config: Config) -> float:
    """Return a step's seconds; with `rollout.async_steps: 1` sampling and training overlap."""
    training = sum(parts.values()) - parts.get("sampling", 0.0)
    return max(training, parts.get("sampling", 0.0)) if config.rollout.async_steps else sum(parts.values())


class Servers(NamedTuple):
    """The engines that sample, embedded or servers."""

    count: float
    gpus_each: int
    colocated: bool

    @classmethod
    def of(cls, config: Config, gpus: int) -> Servers:
        """Return the engines of a configuration; an embedded engine runs on each of the `gpus`."""
        rollout = config.rollout
        if rollout.engine_settings.in_process:
            return cls(gpus, 1, True)
        count = len(rollout.urls) or rollout.servers
        return cls(count, rollout.engine_settings.gpus_per_server, rollout.colocated)


def cache_bytes(architecture: Architecture, size: int) -> int:
    """Return the bytes of one token's keys and values in all layers, `size` bytes per number."""
    width = architecture.num_key_value_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * width * size


def sampling_seconds(
    architecture: Architecture,
    config: Config,
    machine: Machine,
    gpus: int,
    workload: Workload,
    prompts: int,
    samples: int,
) -> float:
    """Return the seconds of decoding `samples` responses to each of `prompts`; 0 for a replay.

    The sum of memory and computation time.

    Each token of the longest response reads all weights, and each token its sequence's keys and values (cf.
    Pope et al., arXiv 2211.05102, §2); each token, prompts included, costs two FLOP per parameter.
    """
    if config.rollout.replay is not None:
        return 0.0
    rollout, size, servers = config.rollout, planned_dtype(config, machine).itemsize, Servers.of(config, gpus)
    sequences = math.ceil(prompts / servers.count) * samples
    mean = workload.response_tokens
    longest = min(rollout.max_response_tokens, LONGEST * mean)
    cached = sequences * mean * (workload.prompt_tokens + mean / 2) * cache_bytes(architecture, size)
    read = longest * total_parameters(architecture) * size + cached
    seconds = read / (servers.gpus_each * machine.memory_bandwidth * DECODING)
    flops = 2 * active_parameters(architecture) * sequences * workload.document
    seconds += flops / (servers.gpus_each * machine.peak * machine.mfu)
    if rollout.engine_settings.in_process:
        batches = math.ceil(sequences / rollout.batch_size)
        waves = math.ceil(batches / WAVE_BATCHES)
        passes = batches * mean + waves * (longest - mean)  # only a wave's last responses have free rows
        seconds = max(seconds, passes * architecture.num_hidden_layers * EMBEDDED_SECONDS)
    return seconds


def evaluation_count(config: Config) -> int:
    """Count the evaluations of a run: after every `evaluation.every` steps, first and last included."""
    every, steps = config.evaluation.every, config.train.steps
    if not every or config.rollout.replay is not None:
        return 0
    return 1 + steps // every + (steps % every > 0)
