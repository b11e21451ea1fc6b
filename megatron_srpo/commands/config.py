"""srpo config: every key of the configuration, or the check of a file."""

import argparse
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.commands.common import add_overrides
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config

HELP = "print every key of the configuration, or check a file"

# Where the papers define a key: SRPO = arXiv 2604.02288, SDPO = arXiv 2601.20802.
_KEYS_BY_PAPER = {
    "SRPO §2.1": "algorithm.clip_low algorithm.clip_high",
    "SRPO §2.1 (with), §4.1 (without)": "algorithm.advantage_std",
    "SRPO §3": "algorithm.name",
    "SRPO §3, §4.1": "algorithm.entropy_beta",
    "SRPO §3.3": "algorithm.loss_aggregation",
    "SRPO §4.1": "algorithm.lr algorithm.mini_batch_prompts algorithm.divergence_topk teacher.ema_rate"
    " rollout.prompts_per_step rollout.samples_per_prompt rollout.temperature rollout.top_p"
    " rollout.enable_thinking rollout.max_prompt_tokens rollout.max_response_tokens optimizer.lr_warmup_steps"
    " optimizer.weight_decay optimizer.clip_grad evaluation.every evaluation.samples evaluation.temperature"
    " evaluation.top_p",
    "SDPO": "algorithm.divergence algorithm.divergence_support teacher.kind teacher.feedback",
}
PAPER = {key: paper for paper, names in _KEYS_BY_PAPER.items() for key in names.split()}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true | false"}
_TYPES |= {"object": "mapping", "null": "null"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file to check, and its overrides and processes."""
    add = parser.add_argument
    add("--check", type=Path, metavar="FILE", help="find what is wrong with it, without starting anything")
    add("--processes", type=int, help="that the run will have; default: as few as its layout needs")
    add_overrides(parser, "with --check: replace the file's")


def run(arguments: argparse.Namespace) -> int:
    """Print every key, or check a file."""
    if arguments.check is not None:
        print(check(arguments.check, arguments.overrides, arguments.processes))
    elif arguments.overrides:
        raise ConfigError(f"config: {arguments.overrides[0]!r} needs --check FILE")
    else:
        print_keys()
    return 0


class Key(NamedTuple):
    """One key. `default` is as in YAML, or "required"; `paper` names a section of a paper, or is empty."""

    name: str
    type: str
    default: str
    help: str
    paper: str


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def keys() -> Iterator[Key]:
    """Yield every key, in the order of the sections."""
    for section, field in _schema()["properties"].items():
        if "oneOf" in field:
            yield from _method_keys(section, field["oneOf"])
        else:
            yield from _keys_of(section, field, section in _schema()["required"])


def _keys_of(name: str, field: dict[str, Any], required: bool) -> Iterator[Key]:
    """Yield the key itself or, of a section, the keys in it."""
    if "$ref" not in field:
        default = "required" if required else _default(field)
        yield Key(name, _type_name(field), default, field.get("description", ""), PAPER.get(name, ""))
        return
    section = _resolve(field)
    for inner, inner_field in section["properties"].items():
        yield from _keys_of(f"{name}.{inner}", inner_field, inner in section.get("required", ()))


def _method_keys(section: str, references: list[dict[str, Any]]) -> Iterator[Key]:
    """Yield the keys of the methods: one default if it is the same in all of them, else each one's own."""
    models = [_resolve(reference)["properties"] for reference in references]
    methods = {model["name"]["const"]: model for model in models}
    name, usual = f"{section}.name", Config.model_fields[section].default.name
    yield Key(name, " | ".join(methods), usual, "the method; sets its paper's defaults", PAPER[name])
    for name in dict.fromkeys(name for model in models for name in model if name != "name"):
        fields = {method: model[name] for method, model in methods.items() if name in model}
        defaults = {method: _default(field) for method, field in fields.items()}
        first = next(iter(fields.values()))
        default = next(iter(defaults.values()))
        if len(set(defaults.values())) > 1 or len(fields) < len(methods):
            default = ", ".join(f"{method}: {value}" for method, value in defaults.items())
        # A field declared again in a subclass has the base's description.
        base = Algorithm.model_fields.get(name)
        meaning = first.get("description") or (base and base.description) or ""
        key = f"{section}.{name}"
        yield Key(key, _type_name(first), default, meaning, PAPER.get(key, ""))


def _resolve(field: dict[str, Any]) -> dict[str, Any]:
    return _schema()["$defs"][field["$ref"].rpartition("/")[2]]


def _default(field: dict[str, Any]) -> str:
    """Return the default as in YAML; a mapping's is empty."""
    value = field.get("default", {})
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _type_name(field: dict[str, Any]) -> str:
    """Return a JSON schema's type as people write it in YAML."""
    if "$ref" in field:
        return f"{{{', '.join(_resolve(field)['properties'])}}}"
    if "anyOf" in field:
        return " | ".join(_type_name(one) for one in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_type_name(field.get('items') or field['prefixItems'][0])}"
    return "path" if field.get("format") == "path" else _TYPES[field["type"]]


def print_keys() -> None:
    """Print every key, section by section."""
    from rich.console import Console
    from rich.text import Text

    console, section = Console(highlight=False), ""
    for key in keys():
        if section != (section := key.name.partition(".")[0]):
            console.print(Text(f"\n{section}", style="bold"))
        default = key.default if key.default.startswith("[") else f"[{key.default}]"
        line = Text.assemble("  ", (key.name, "cyan"), f"  {key.type}  ", (default, "green"))
        console.print(line, soft_wrap=True)
        if key.help or key.paper:
            paper = f"  ({key.paper})" if key.paper else ""
            console.print(Text(f"      {key.help}{paper}", style="dim"), soft_wrap=True)


def check(path: Path, overrides: list[str], processes: int | None) -> str:
    """Run all checks of a run before it starts, and describe it; raise ConfigError if one fails.

    Without `processes`, the run has as few as its layout needs.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes: {processes}; expected 1 or more")
    config = load_config(path, overrides)

    from megatron_srpo.preflight import preflight  # torch, which an error above does not wait for

    parallel, rollout, steps = config.parallel, config.rollout, config.train.steps
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    experts *= parallel.pipeline_model_parallel_size
    if processes is not None:
        from megatron_srpo.distributed.group_sizes import data_parallel_size

        data_parallel_size(parallel, processes, "--processes")
    processes = processes or math.lcm(parallel.replica_size, experts)
    os.environ["WORLD_SIZE"] = str(processes)
    method = f"{config.algorithm.name} on {preflight(config).path.name}"
    samples = f"{steps} steps of {rollout.prompts_per_step} × {rollout.samples_per_prompt} samples"
    layout = f"{processes} process{'es' * (processes > 1)}, run folder {config.logging.dir}"
    return f"{path}: can be run: {method}, {samples}, {layout}"
