"""`python -m megatron_srpo plan`: memory and step time of a configuration, and better layouts."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, validate_tree
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.hf_folder import naming_key
from megatron_srpo.plan.layouts import Plan, Scaled, layouts, plan_for, scale, where_it_stops
from megatron_srpo.plan.machine import MACHINES, Machine, Workload, planned_dtype
from megatron_srpo.plan.memory import Batch, total_parameters
from megatron_srpo.plan.models import PUBLISHED, planned_architecture
from megatron_srpo.plan.step import (
    active_parameters,
    cache_bytes,
    evaluation_count,
    sampling_seconds,
    step_flops,
    traffic,
)
from megatron_srpo.tasks import evaluation_tasks, question_count

SHOWN = 5  # layouts


STEPS = 500  # of a run that only a model is given of


@naming_key("model.hf_path")
def plan(options: argparse.Namespace) -> int:
    """Print the plan of a configuration file or a model; return 0 if it fits, else 1. Raises ConfigError."""
    if options.gpus < 1:
        raise ConfigError(f"--gpus: {options.gpus}; expected 1 or more")
    machine = _machine(options)
    is_model = _is_model(options.config)
    if not is_model and not options.config.exists() and options.config.suffix not in (".yaml", ".yml"):
        expected = f"expected a YAML file, a model's folder, or one of {', '.join(PUBLISHED)}"
        raise ConfigError(f"{options.config} does not exist; {expected}")
    if is_model:
        config = _configuration_of(options.config, options.overrides, machine, options.gpus)
    else:
        config = load_config(options.config, options.overrides)
    data_parallel_size(config.parallel, options.gpus, "--gpus")
    architecture, console = planned_architecture(config.model.hf_path), Console()
    workload = _workload(config, options)
    if is_model and not any(text.startswith(("parallel", "megatron")) for text in options.overrides):
        fitting, _, _ = layouts(architecture, config, machine, options.gpus, workload)
        config = fitting[0].config if fitting else config
    own = plan_for(architecture, config, machine, options.gpus, workload)
    console.print(_title(architecture, config, machine, options.gpus, workload))
    console.print(_memory_table(own, machine), _step_table(own, architecture, machine, workload))
    problem = own.problem(machine)
    console.print(f"[bold red]does not fit: {problem}" if problem else "[bold green]fits")
    console.print(*_run_lines(own, architecture, machine, workload), sep="\n", highlight=False)
    if own.cache_room is not None and problem is None:
        tokens = own.cache_room / cache_bytes(architecture, planned_dtype(config, machine).itemsize)
        room = f"{own.cache_room / 1e9:.1f} GB per GPU for keys and values: {tokens:,.0f} tokens"
        console.print(f"during sampling, the engine has {room}")
        if own.cache_needed and config.rollout.engine_settings.in_process:
            peak = machine.memory - own.cache_room + own.cache_needed
            console.print(
                f"it needs up to {own.cache_needed / 1e9:.1f} GB; then a rank holds {peak / 1e9:.1f} GB"
            )
    console.print(*_best(architecture, config, machine, options.gpus, workload))
    if options.scale:
        counts = [options.gpus * 2**n for n in range(13) if options.gpus * 2**n <= 4096]
        rows = scale(architecture, config, machine, workload, counts)
        console.print(_scale_table(rows, workload), *where_it_stops(rows), sep="\n")
    return 1 if problem else 0


def _is_model(given: Path) -> bool:
    """Return True for a model's folder, its config.json, or a published model's name."""
    return (
        given.is_dir()
        or given.name == "config.json"
        or (given.as_posix() in PUBLISHED and not given.exists())
    )


def _configuration_of(given: Path, overrides: list[str], machine: Machine, gpus: int) -> Config:
    """Return the papers' settings for a model; on GPUs, colocated servers sample by default."""
    path = given.parent if given.name == "config.json" else given
    tree: dict[str, Any] = {
        "model": {"hf_path": str(path)},
        "train": {"steps": STEPS},
        "logging": {"dir": "runs/plan"},
    }
    engine_keys = ("engine", "servers", "urls", "colocated", "sglang", "openai", "replay")
    chosen = any(text.startswith(tuple(f"rollout.{key}" for key in engine_keys)) for text in overrides)
    if machine.is_gpu and not chosen:
        weights = 2 * total_parameters(planned_architecture(path))
        size = 1
        while weights / size > machine.memory / 2 and 2 * size <= min(gpus, machine.gpus_per_node):
            size *= 2
        tree["rollout"] = {"engine": "sglang", "colocated": True, "servers": max(1, gpus // size)}
        tree["rollout"]["sglang"] = {"tensor_parallel_size": size}
    return validate_tree(tree, {}, overrides, str(given))


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
    gpu = f"{machine.memory / 1e9:.0f} GB, {machine.peak / 1e12:.3g} TFLOPS, MFU {machine.mfu:.2f} assumed"
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
    table.add_row("tokens per second", f"{tokens / plan.step:,.0f}", f"{flops / 1e15:.3g} PFLOP")
    return table


def _run_lines(plan: Plan, architecture: Architecture, machine: Machine, workload: Workload) -> list[str]:
    """Describe the duration of the run: its steps and its evaluations."""
    config, lines, evaluating = plan.config, [], 0.0
    steps = config.train.steps
    if count := evaluation_count(config):
        settings = config.evaluation
        samples = settings.samples
        try:
            questions = _questions(config)
        except ConfigError as error:
            lines.append(f"evaluation is not counted: {error}")
        else:
            what = config, machine, plan.gpus, workload
            seconds = sampling_seconds(architecture, *what, questions, samples)
            evaluating = count * seconds
            ratio = (
                questions * samples / (config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
            )
            what = f"{questions:,} questions × {samples} samples ({ratio:.1f} × a step's)"
            lines.append(f"an evaluation: {what}, {_duration(seconds)}; {count} of them (evaluation.every)")
    of_it = f", {_duration(evaluating)} of it evaluation" if evaluating else ""
    complete = _duration(steps * plan.step + evaluating)
    lines.append(f"the complete run: {steps:,} steps, {complete}{of_it}; checkpoints are not counted")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _questions(config: Config) -> int:
    """Count the questions of an evaluation; reads the question files if evaluation.prompts is null."""
    settings = config.evaluation
    if settings.prompts is not None:
        return len(config.evaluation_tasks) * len(settings.splits) * settings.prompts
    tasks = evaluation_tasks(config).values()
    return sum(question_count(task, split, settings) for task in tasks for split in settings.splits)


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
