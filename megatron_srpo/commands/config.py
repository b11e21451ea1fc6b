"""The config command: every key with its type, default, meaning and place in the papers; and the check of a
file.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_srpo.algorithm import METHODS
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config, ConfigError

# Where the papers say it: SRPO = arXiv 2604.02288, SDPO = arXiv 2601.20802.
PAPER = {
    "algorithm.name": "SRPO §3",
    "algorithm.lr": "SRPO §4.1",
    "algorithm.mini_batch_prompts": "SRPO §4.1",
    "algorithm.advantage_std": "SRPO §2.1 (with), §4.1 (without)",
    "algorithm.clip_low": "SRPO §2.1",
    "algorithm.clip_high": "SRPO §2.1",
    "algorithm.loss_aggregation": "SRPO §3.3",
    "algorithm.divergence": "SDPO",
    "algorithm.divergence_support": "SDPO",
    "algorithm.divergence_topk": "SRPO §4.1",
    "algorithm.entropy_beta": "SRPO §3, §4.1",
    "teacher.kind": "SDPO",
    "teacher.ema_rate": "SRPO §4.1",
    "teacher.feedback": "SDPO",
    "rollout.prompts_per_step": "SRPO §4.1",
    "rollout.samples_per_prompt": "SRPO §4.1",
    "rollout.temperature": "SRPO §4.1",
    "rollout.top_p": "SRPO §4.1",
    "rollout.max_prompt_tokens": "SRPO §4.1",
    "rollout.max_response_tokens": "SRPO §4.1",
    "rollout.enable_thinking": "SRPO §4.1",
    "optimizer.lr_warmup_steps": "SRPO §4.1",
    "optimizer.weight_decay": "SRPO §4.1",
    "optimizer.clip_grad": "SRPO §4.1",
    "evaluation.every": "SRPO §4.1",
    "evaluation.samples": "SRPO §4.1",
    "evaluation.temperature": "SRPO §4.1",
    "evaluation.top_p": "SRPO §4.1",
}


class Key(NamedTuple):
    """One key of the configuration. default: as in YAML, or "required"; paper: where the papers say it, or
    "".
    """

    name: str
    type: str
    default: str
    help: str
    paper: str


def keys() -> Iterator[Key]:
    """Every key, in the order of the sections."""
    for section, field in Config.model_fields.items():
        yield from _algorithm_keys() if section == "algorithm" else _keys_of(section, field)


def _keys_of(name: str, field: FieldInfo) -> Iterator[Key]:
    """The key itself, or, of a section, the keys in it."""
    if not _is_section(field.annotation):
        yield _key(name, field, _default(field), field.description)
        return
    for inner, inner_field in field.annotation.model_fields.items():
        yield from _keys_of(f"{name}.{inner}", inner_field)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _algorithm_keys() -> Iterator[Key]:
    """A key with the same default in all algorithms once; else with each one's own."""
    for name in dict.fromkeys(name for model in METHODS.values() for name in model.model_fields):
        fields = {
            label: model.model_fields[name] for label, model in METHODS.items() if name in model.model_fields
        }
        defaults = {label: _default(field) for label, field in fields.items()}
        first = next(iter(fields.values()))
        if name == "name":
            yield Key(
                "algorithm.name",
                " | ".join(METHODS),
                "srpo",
                "the method; sets its paper's defaults",
                PAPER["algorithm.name"],
            )
            continue
        same = len(set(defaults.values())) == 1 and len(fields) == len(METHODS)
        default = (
            next(iter(defaults.values()))
            if same
            else ", ".join(f"{label}: {value}" for label, value in defaults.items())
        )
        # A field declared anew in a subclass has the base's meaning.
        description = first.description or Algorithm.model_fields[name].description
        yield _key(f"algorithm.{name}", Algorithm.model_fields.get(name, first), default, description)


def _key(name: str, field: FieldInfo, default: str, description: str | None) -> Key:
    return Key(name, type_name(field.annotation), default, description or "", PAPER.get(name, ""))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def type_name(annotation: Any) -> str:
    """A type as people write it in YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join("null" if one is type(None) else type_name(one) for one in arguments)
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if _is_section(annotation):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if arguments:  # Annotated
        return type_name(arguments[0])
    names = {int: "integer", float: "number", str: "text", bool: "true | false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def print_keys() -> None:
    """Every key to the terminal, section by section."""
    from rich.console import Console
    from rich.text import Text

    console, before = Console(highlight=False), None
    for key in keys():
        section = key.name.partition(".")[0]
        if section != before:
            console.print(Text(f"\n{section}", style="bold"))
            before = section
        default = key.default if key.default.startswith("[") else f"[{key.default}]"
        line = Text.assemble("  ", (key.name, "cyan"), f"  {key.type}  ", (default, "green"))
        console.print(line, soft_wrap=True)
        meaning = f"{key.help}{f'  ({key.paper})' if key.paper else ''}"
        if meaning:
            console.print(Text(f"      {meaning}", style="dim"), soft_wrap=True)


def check(path: Path, overrides: list[str], processes: int | None) -> str:
    """Everything a run would check before it starts; says what would run. Raises ConfigError.

    processes: that the run will have; None: as few as its layout needs.
    """
    from megatron_srpo.preflight import preflight

    if processes is not None and processes < 1:
        raise ConfigError(f"--processes: {processes}; expected 1 or more")
    config = load_config(path, overrides)
    parallel = config.parallel
    experts = (
        parallel.expert_tensor_size
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    processes = processes or math.lcm(parallel.replica_size, experts)
    os.environ["WORLD_SIZE"] = str(processes)
    folder = preflight(config)
    samples = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt} samples"
    return (
        f"{path}: can be run: {config.algorithm.name} on {folder.path.name}, {config.train.steps} steps of {samples},"
        f" {processes} process{'es' * (processes > 1)}, run folder {config.logging.dir}"
    )
