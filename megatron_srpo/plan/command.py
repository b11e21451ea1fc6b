"""`python -m megatron_srpo plan`: memory and step time of a configuration, and better layouts."""

import argparse

from rich.console import Console
from rich.table import Table

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import data_parallel_size
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.hf_folder import HFFolder, naming_key
from megatron_srpo.plan.layouts import Plan, Scaled, layouts, plan_for, scale, where_it_stops
from megatron_srpo.plan.machine import MACHINES, Machine, Workload, planned_dtype
from megatron_srpo.plan.memory import Batch, total_parameters
from megatron_srpo.plan.step import active_parameters, cache_bytes, step_flops, traffic

SHOWN = 5  # layouts


@naming_key("model.hf_path")
def plan(config: Config, options: argparse.Namespace) -> int:
    """Print the plan, given config.json of model.hf_path; return 0 if it fits, else 1. Raises ConfigError."""
    if options.gpus < 1:
        raise ConfigError(f"--gpus: {options.gpus}; expected 1 or more")
    machine, workload = _machine(options), _workload(config, options)
    architecture, console = HFFolder(config.model.hf_path).architecture, Console()
    own = plan_for(architecture, config, machine, options.gpus, workload)
    console.print(_title(architecture, config, machine, options.gpus, workload))
    console.print(_memory_table(own, machine), _step_table(own, architecture, machine, workload))
    problem = own.problem(machine)
    console.print(f"[bold red]does not fit: {problem}" if problem else "[bold green]fits")
    if own.cache_room is not None and problem is None:
        tokens = own.cache_room / cache_bytes(architecture, planned_dtype(config, machine).itemsize)
        room = f"{own.cache_room / 1e9:.1f} GB per GPU for keys and values: {tokens:,.0f} tokens"
        console.print(f"during sampling, the engine has {room}")
    console.print(*_best(architecture, config, machine, options.gpus, workload))
    if options.scale:
        counts = [options.gpus * 2**n for n in range(13) if options.gpus * 2**n <= 4096]
        rows = scale(architecture, config, machine, workload, counts)
        console.print(_scale_table(rows, workload), *where_it_stops(rows), sep="\n")
    return 1 if problem else 0


def _machine(options: argparse.Namespace) -> Machine:
    if options.machine not in MACHINES:
        raise ConfigError(f"--machine: {options.machine!r}; expected one of {', '.join(MACHINES)}")
    machine = MACHINES[options.machine]
    given = {
        "memory": ("--gpu-memory", options.gpu_memory, 1e9),
        "peak": ("--peak-tflops", options.peak_tflops, 1e12),
        "mfu": ("--mfu", options.mfu, 1.0),
    }
    for option, value, _ in given.values():
        if value is not None and not value > 0:
            raise ConfigError(f"{option}: {value:g}; expected more than 0")
    if options.mfu is not None and options.mfu > 1:
        raise ConfigError(f"--mfu: {options.mfu:g}; expected a share, at most 1")
    changed = {name: value * unit for name, (_, value, unit) in given.items() if value is not None}
    return machine._replace(**changed)


def _workload(config: Config, options: argparse.Namespace) -> Workload:
    given = {name: getattr(options, name) for name in Workload._fields if getattr(options, name) is not None}
    shortest = min(given.get("prompt_tokens", 1), given.get("response_tokens", 1))
    if shortest < 1 or not 0 <= given.get("distilled_share", 0) <= 1:
        expected = "--distilled-share from 0 to 1, --prompt-tokens and --response-tokens of 1 or more"
        raise ConfigError(f"plan: expected {expected}")
    return Workload.expected(config)._replace(**given)


def _title(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> str:
    size = f"{total_parameters(architecture):,} parameters"
    if architecture.num_experts:
        size += f", {active_parameters(architecture):,} of them active per token in the layers"
    dtype = str(planned_dtype(config, machine)).removeprefix("torch.")
    gpu = f"{machine.memory / 1e9:.0f} GB, {machine.peak / 1e12:.0f} TFLOPS, MFU {machine.mfu:.2f} assumed"
    samples = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt} samples"
    tokens = f"{workload.prompt_tokens} + {workload.response_tokens} tokens on average"
    fullest = f"fullest micro-batch {Batch.worst(config, gpus, workload).tokens:,} tokens per GPU"
    return (
        f"{config.model.hf_path.name}: {size}; {dtype}\n"
        f"{gpus} × {machine.name} ({gpu}): {_describe(config, gpus)}\n"
        f"{config.algorithm.name}: {samples} of {tokens}, {workload.distilled_share:.0%} distilled; {fullest}"
    )


def _describe(config: Config, gpus: int) -> str:
    p = config.parallel
    names = {"TP": p.tensor_model_parallel_size, "PP": p.pipeline_model_parallel_size}
    names |= {"VPP": p.virtual_pipeline_model_parallel_size or 1, "CP": p.context_parallel_size}
    names |= {"EP": p.expert_model_parallel_size, "DP": data_parallel_size(p, gpus)}
    text = " ".join(f"{name}{size}" for name, size in names.items() if size > 1) or "one replica"
    granularity = config.megatron.get("recompute_granularity")
    return text + (f", {granularity} recompute" if granularity else "")


def _memory_table(plan: Plan, machine: Machine) -> Table:
    table = Table("memory of the fullest GPU", "GB")
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("total", f"{plan.bytes / 1e9:.2f} of {machine.memory / 1e9:.0f}")
    return table


def _step_table(plan: Plan, architecture: Architecture, machine: Machine, workload: Workload) -> Table:
    sent = traffic(architecture, plan.config, machine, plan.gpus, workload)
    table = Table("estimated step", "seconds", "GB sent per GPU")
    for name, seconds in plan.seconds.items():
        transfer = sent.get(name.removeprefix("traffic: ")) if name.startswith("traffic") else None
        table.add_row(name, f"{seconds:.2f}", f"{transfer.bytes / 1e9:.2f}" if transfer else "")
    rollout = plan.config.rollout
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * workload.document
    flops = sum(step_flops(architecture, plan.config, workload).values())
    gigabytes = sum(transfer.bytes for transfer in sent.values()) / 1e9
    table.add_section()
    table.add_row("total", f"{plan.step:.2f}", f"{gigabytes:.2f}")
    table.add_row("tokens per second", f"{tokens / plan.step:,.0f}", f"{flops / 1e15:.1f} PFLOP")
    return table


def _best(
    architecture: Architecture, config: Config, machine: Machine, gpus: int, workload: Workload
) -> list:
    fitting, impossible, too_large = layouts(architecture, config, machine, gpus, workload)
    undivided = f"{impossible} layouts that do not divide the model or the GPUs"
    summary = f"left out: {undivided}, {too_large} that do not fit"
    if not fitting:
        return [f"[bold red]no layout of {gpus} GPUs fits[/]; {summary}"]
    table = Table("fastest layouts that fit", "seconds", "GB")
    for one in fitting[:SHOWN]:
        table.add_row(_describe(one.config, gpus), f"{one.step:.2f}", f"{one.bytes / 1e9:.1f}")
    return [table, summary]


def _scale_table(rows: list[Scaled], workload: Workload) -> Table:
    speed = ("seconds", "tokens/s per GPU")
    table = Table("GPUs", "same batch: layout", *speed, "batch × GPUs: layout", *speed)
    for row in rows:
        cells = [f"{row.gpus}"]
        for one in (row.strong, row.weak):
            if one is None:
                cells += ["nothing fits", "", ""]
                continue
            samples = one.config.rollout.prompts_per_step * one.config.rollout.samples_per_prompt
            rate = samples * workload.document / one.step / row.gpus
            cells += [_describe(one.config, row.gpus), f"{one.step:.2f}", f"{rate:,.0f}"]
        table.add_row(*cells)
    return table
