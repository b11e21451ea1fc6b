"""Checksums of what a run is made of besides its configuration: data, task code, tokenizer, chat template."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_srpo.checkpoint.folder import Inputs
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.tasks import create_task
from megatron_srpo.tasks.questions import SPLITS
from megatron_srpo.tasks.worker import OWN_MODULE

_PROMPTS = 1000  # of a task that is code: at most this many are compared
_ENDLESS_PROMPTS = 64
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def inputs_of(config: Config, folder: HFFolder) -> Inputs:
    """Compute the checksums by the configuration's key: data and code of all training tasks, tokenizer."""
    key = "task.mixture" if config.task.mixture else "task.path" if config.task.path else "task.name"
    found: dict[str, str] = {}
    for source in config.task.sources:
        found |= _task(source, config.train.seed)
    return {key: found, "model.hf_path": tokenizer_inputs(folder)}


def tokenizer_inputs(folder: HFFolder) -> dict[str, str]:
    """Compute the checksums of the tokenizer's files, the chat template and the ids that end a response."""
    files = (folder.path / name for name in _TOKENIZER_FILES)
    found = {file.name: file_checksum(file) for file in files if file.is_file()}
    found["the chat template"] = _text_checksum(str(folder.tokenizer.chat_template))
    found["the ids that end a response"] = _text_checksum(str(folder.stop_ids))
    return found


def file_checksum(file: Path) -> str:
    """Return the SHA-256 of a file; raise ConfigError if it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def check_inputs(saved: Inputs, now: Inputs, allowed: tuple[str, ...], what: str) -> None:
    """Raise ConfigError, which names all changes, unless `allowed` (resume.override) lists their keys."""
    lines, keys = [], []
    for key, names in saved.items():
        if key not in now or any(f"{key}.".startswith(f"{name}.") for name in allowed):
            continue  # another key, such as task.mixture for task.path, is a change of the configuration
        changed = [name for name in (*names, *now[key]) if names.get(name) != now[key].get(name)]
        lines += [f"{key}: {name} is not what it was" for name in dict.fromkeys(changed)]
        keys += [key] if changed else []
    if lines:
        restore = "restore it, or name another folder"
        advice = f"{restore}; or, to resume with this change, add {', '.join(keys)} to resume.override"
        raise ConfigError("\n  ".join([f"{what}, but its inputs have changed:", *lines]) + f"\n{advice}")


def _task(source: TaskSource, seed: int) -> dict[str, str]:
    path = source.path
    if path is not None and path.suffix != ".py":  # a folder, or one file, of questions
        files = [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]
        return {str(file): file_checksum(file) for file in files if file.is_file()}
    task = create_task(source, seed)
    found = {}
    if path is not None:
        files = [path.resolve(), *_modules_beside(path.resolve()), *_files_in(source.options)]
        found = {str(file): file_checksum(file) for file in files}
    size = task.size("train")
    count = min(_PROMPTS, _ENDLESS_PROMPTS if size is None else size)
    numbers = (round(place * ((size or count) - 1) / max(1, count - 1)) for place in range(count))
    prompts = "".join(task.prompt("train", number).model_dump_json() for number in numbers)
    return {**found, f"the training prompts of task {source.name}": _text_checksum(prompts)}


def _modules_beside(file: Path) -> list[Path]:
    """Return the modules in the file's folder which a task's file imports, directly or not."""
    found: dict[Path, None] = {}
    waiting = [module for name, module in sys.modules.items() if name == f"{OWN_MODULE}.{file.stem}"]
    while waiting:
        for value in vars(waiting.pop()).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            module = sys.modules.get(name) if isinstance(name, str) else None
            place = Path(getattr(module, "__file__", None) or "/")
            if module is not None and place.parent == file.parent and place not in {*found, file}:
                found[place] = None
                waiting.append(module)
    return list(found)


def _files_in(options: Any) -> Iterator[Path]:
    """Yield the files that are named anywhere in task.options."""
    if isinstance(options, str):
        try:
            is_file = Path(options).is_file()
        except (OSError, ValueError):
            is_file = False
        if is_file:
            yield Path(options)
    elif isinstance(options, dict | list):
        for value in options.values() if isinstance(options, dict) else options:
            yield from _files_in(value)


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
