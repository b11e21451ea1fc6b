"""Plans for layouts: those that fit, the fastest, and the point where more GPUs stop helping."""

import itertools
import math
from typing import NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import WAVE_BATCHES
from megatron_srpo.config.schema import Config, ParallelSection
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.layout import check_layout
from megatron_srpo.plan.machine import Machine, Workload, planned_dtype
from megatron_srpo.plan.memory import Batch, memory, total_parameters
from megatron_srpo.plan.step import Servers, cache_bytes, step_seconds, total

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
POWERS = tuple(2**n for n in range(8))
MINIMUM_CACHE = 0.05  # share of the memory that SGLang needs for keys and values at least; assumed
SLEEPING = 2e9  # bytes a colocated server keeps while offloaded: its CUDA context and graphs; assumed


class Plan(NamedTuple):
    """A configuration on a number of GPUs; memory (bytes) and seconds by part.

    Attributes:
        cache_room: Bytes for the engine's keys and values on a training GPU; None if no engine runs there.
        cache_needed: Bytes that the engine needs for them.
    """

    config: Config
    gpus: int
    memory: dict[str, float]
    seconds: dict[str, float]
    cache_room: float | None
    cache_needed: float

    @property
    def bytes(self) -> float:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return total(self.seconds, self.config)

    def problem(self, machine: Machine) -> str | None:
        """Return the reason why the plan does not fit, or None."""
        if self.bytes > machine.memory:
            largest = max(self.memory, key=self.memory.__getitem__)
            needs = f"{self.bytes / 1e9:.1f} GB of {machine.memory / 1e9:.0f} GB on its fullest GPU"
            return f"needs {needs}, most of it for {largest} ({self.memory[largest] / 1e9:.1f} GB)"
        if self.cache_room is not None and self.cache_room < self.cache_needed:
            room = f"{self.cache_room / 1e9:.1f} GB per GPU for keys and values during sampling"
            return f"leaves the engine {room}; it needs {self.cache_needed / 1e9:.1f} GB"
        return None


def plan_for(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> Plan:
    """Plan exactly this configuration. Raises ConfigError with the reason if its layout is impossible."""
    check_layout(architecture, config.parallel, config.megatron)
    data_parallel_size(config.parallel, gpus)
    parts = memory(architecture, config, machine, gpus, Batch.worst(config, gpus, workload))
    room, needed = _cache(architecture, config, machine, gpus, parts)
    if not config.rollout.engine_settings.in_process and room is not None:
        parts["SGLang, offloaded"] = SLEEPING
    seconds = step_seconds(architecture, config, machine, gpus, workload)
    return Plan(config, gpus, parts, seconds, room, needed)


def _cache(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, parts: dict[str, float]
) -> tuple[float | None, float]:
    """Return (bytes for keys and values, bytes needed); (None, 0) if no engine runs on training GPUs.

    The embedded engine holds each prompt of a wave once, and pads prompts and responses to the longest. While
    SGLang samples, all but the trainer's weights is offloaded to the host.
    """
    rollout, servers, size = config.rollout, Servers.of(config, gpus), planned_dtype(config, machine).itemsize
    if rollout.replay is not None or not servers.colocated:
        return None, 0.0
    stay = ["weights", "reserve"]
    if rollout.engine_settings.in_process:
        stay += ["gradients", "optimizer", "teacher", "EMA"]
    kept = sum(parts.get(name, 0.0) for name in stay)
    room = machine.memory - kept - total_parameters(architecture) * size / servers.gpus_each
    if not rollout.engine_settings.in_process:
        return room, MINIMUM_CACHE * machine.memory
    own = math.ceil(rollout.prompts_per_step / gpus) * rollout.samples_per_prompt
    rows, requests = min(rollout.batch_size, own), min(WAVE_BATCHES * rollout.batch_size, own)
    prompts = math.ceil(requests / rollout.samples_per_prompt)
    tokens = prompts * rollout.max_prompt_tokens + rows * rollout.max_response_tokens
    return room, tokens * cache_bytes(architecture, size)


def layouts(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> tuple[list[Plan], int, int]:
    """Try all layouts with powers of two, each with and without full recomputation.

    Tensor and context parallelism are limited to a node.

    Returns:
        The plans that fit, fastest first; the number of impossible layouts; the number of those too large.
    """
    fitting: list[Plan] = []
    impossible = too_large = 0
    tensors = [size for size in POWERS if size <= min(machine.gpus_per_node, gpus)]
    pipelines = [size for size in POWERS if size <= min(16, gpus)]
    experts = [size for size in POWERS if size <= gpus] if architecture.num_experts else [1]
    choices = itertools.product(tensors, tensors, pipelines, experts, (False, True))
    for tensor, context, pipeline, expert, recompute in choices:
        if tensor * context > machine.gpus_per_node:
            continue
        changed = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": None,
            "context_parallel_size": context,
            "expert_model_parallel_size": expert,
            "expert_tensor_parallel_size": 1 if expert > 1 else None,
            "sequence_parallel": tensor > 1,
        }
        parallel = ParallelSection(**{**config.parallel.model_dump(), **changed})
        others = {key: value for key, value in config.megatron.items() if not key.startswith("recompute_")}
        if recompute:
            others |= RECOMPUTE
        candidate = config.model_copy(update={"parallel": parallel, "megatron": others})
        try:
            plan = plan_for(architecture, candidate, machine, gpus, workload)
        except ConfigError:
            impossible += 1
            continue
        if plan.problem(machine) is None:
            fitting.append(plan)
        else:
            too_large += 1
    return sorted(fitting, key=lambda plan: (plan.step, plan.bytes)), impossible, too_large


class Scaled(NamedTuple):
    """The best plans for a number of GPUs; None if nothing fits."""

    gpus: int
    strong: Plan | None  # with the same batch
    weak: Plan | None  # with a batch that grows in proportion to the GPUs


def scale(
    architecture: Architecture, config: Config, machine: Machine, workload: Workload, counts: list[int]
) -> list[Scaled]:
    """Plan for each number of GPUs in `counts`; servers on separate GPUs grow in proportion."""
    rows = []
    for gpus in counts:
        factor = gpus // counts[0]
        same = _more_servers(config, factor)
        larger = _more_prompts(same, factor)
        best = [layouts(architecture, one, machine, gpus, workload)[0][:1] for one in (same, larger)]
        rows.append(Scaled(gpus, *(found[0] if found else None for found in best)))
    return rows


def _more_servers(config: Config, factor: int) -> Config:
    rollout = config.rollout
    if rollout.engine_settings.in_process:
        return config
    changed = {"servers": rollout.servers * factor, "urls": rollout.urls * factor}
    return config.model_copy(update={"rollout": rollout.model_copy(update=changed)})


def _more_prompts(config: Config, factor: int) -> Config:
    rollout, mini = config.rollout, config.algorithm.mini_batch_prompts
    larger = rollout.model_copy(update={"prompts_per_step": rollout.prompts_per_step * factor})
    algorithm = config.algorithm.model_copy(update={"mini_batch_prompts": mini and mini * factor})
    return config.model_copy(update={"rollout": larger, "algorithm": algorithm})


def where_it_stops(rows: list[Scaled]) -> list[str]:
    """Say where doubling gains less than 1.4 times, or a growing batch's step takes 1.4 times as long."""
    lines = []
    strong = [(row.gpus, row.strong) for row in rows if row.strong is not None]
    for (fewer, before), (more, after) in itertools.pairwise(strong):
        if (gain := before.step / after.step) < 1.4:
            lines.append(
                f"same batch: {more} GPUs are {gain:.2f} times as fast as {fewer}; {_most_of(after)}"
            )
            break
    growing = [row.weak for row in rows if row.weak is not None]
    for plan in growing:
        if (slower := plan.step / growing[0].step) > 1.4:
            step = f"on {plan.gpus} GPUs a step takes {slower:.2f} times as long as on {growing[0].gpus}"
            lines.append(f"growing batch: {step}; {_what_grew(growing[0], plan)}")
            break
    return lines or ["no limit in this range"]


_WHY = {
    "sampling": "the longest response takes as long on any number of servers;"
    " rollout.async_steps: 1 hides training behind it",
    "idle": "there are fewer samples than data-parallel ranks",
    "bubble": "there are too few micro-batches for the pipeline's stages",
    "reading samples": "every rank reads the outline of every sample and plans all of them",
}


def _most_of(plan: Plan) -> str:
    part = max(plan.seconds, key=plan.seconds.__getitem__)
    why = _WHY.get(part, "it does not shrink as ranks are added")
    return f"{plan.seconds[part] / sum(plan.seconds.values()):.0%} of it is {part}: {why}"


def _what_grew(before: Plan, after: Plan) -> str:
    grown = {part: seconds - before.seconds.get(part, 0.0) for part, seconds in after.seconds.items()}
    part = max(grown, key=grown.__getitem__)
    return f"{grown[part]:.1f} s more in {part}: {_WHY.get(part, 'it grows with the ranks')}"
