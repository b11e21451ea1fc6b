"""Check that a run folder is usable: it is empty, or contains this run, which can be resumed."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import DamagedCheckpoint, Manifest
from megatron_srpo.checkpoint.inputs import check_inputs, inputs_of
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.families import architecture_from_dict
from megatron_srpo.model.hf_folder import HFFolder

_OF_A_RUN = ("metrics.jsonl", "rollouts", "checkpoints", "hf", "hf.partial")


def check_run_folder(config: Config, folder: HFFolder) -> None:
    """Raise ConfigError if logging.dir contains another run, or one that cannot be resumed."""
    directory = config.logging.dir
    check_writable(directory)
    place = f"logging.dir: {directory.resolve()}"
    if (directory / "samples").exists():
        raise ConfigError(f"{place} holds an evaluation; name another folder for the run")
    held = [name for name in _OF_A_RUN if (directory / name).exists()]
    if not held:
        return
    what = f"{place} already holds a run ({', '.join(held)})"
    if config.resume.mode == "never":
        raise ConfigError(f"{what}; name another folder, or set resume: auto to resume it")
    if _was_only_sampled(directory):
        advice = "name another folder (and train on its samples with rollout.replay)"
        raise ConfigError(f"{what} of the sample command; {advice}")
    steps = folders.steps(directory / "checkpoints")
    if not steps and (newest := folders.newest_saved(directory)):
        found = f"{what}, whose checkpoint {newest} is missing from {directory / 'checkpoints'}"
        advice = "bring it back (a disk that is not mounted?), or remove the run folder to start the run over"
        raise ConfigError(f"{found}; {advice}")
    if not steps and ("hf" in held or not config.checkpoint.save_interval):
        raise ConfigError(f"{what} without a checkpoint to resume from; name another folder")
    _check_configuration(config, what)
    for step in steps:
        try:
            manifest = folders.read_manifest(folders.folder_of(directory / "checkpoints", step))
        except DamagedCheckpoint:
            continue  # `resume.find` reports and skips it
        _check_model(manifest, folders.folder_of(directory / "checkpoints", step), folder.architecture)
        check_inputs(manifest.inputs, inputs_of(config, folder), config.resume.override, what)
        break


def check_writable(directory: Path) -> None:
    """Raise ConfigError if the folder logging.dir cannot be created or written to."""
    above = directory.absolute()
    place = next(path for path in (above, *above.parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ConfigError(f"logging.dir: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"logging.dir: {place} cannot be written to")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} for all differences; tuples equal lists."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif _as_list(one) != _as_list(other):
            found[f"{prefix}{key}"] = one, other
    return found


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _was_only_sampled(directory: Path) -> bool:
    """Return True if the folder's steps were sampled but not trained."""
    file = directory / "metrics.jsonl"
    rows = file.read_bytes() if file.is_file() else b""
    return b'"pass_rate":' in rows and b'"loss":' not in rows


def _check_configuration(config: Config, what: str) -> None:
    """Compare with the configuration of the run's last start; keys of resume.override may differ."""
    file = config.logging.dir / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it has no sections")
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{what}, but {file.name} cannot be read ({error}); name another folder") from None
    changes = differences(before, config.model_dump(mode="json"))
    allowed = ("resume", *config.resume.override)
    refused = [key for key in changes if not any(f"{key}.".startswith(f"{name}.") for name in allowed)]
    if refused:
        lines = [f"{key}: was {changes[key][0]!r}, is now {changes[key][1]!r}" for key in refused]
        advice = "name another folder; or, to resume with these changes, add their keys to resume.override"
        lines = [f"{what} with another configuration ({file}):", *lines]
        raise ConfigError("\n  ".join(lines) + f"\n{advice}")


def _check_model(manifest: Manifest, checkpoint: Path, architecture: Architecture) -> None:
    saved = architecture_from_dict(manifest.architecture)
    changes = differences(dataclasses.asdict(saved), dataclasses.asdict(architecture))
    if changes:
        lines = [f"logging.dir: {checkpoint} is a checkpoint of another model:"]
        for key, (old, new) in changes.items():
            lines.append(f"{key}: the checkpoint has {old!r}, model.hf_path {new!r}")
        raise ConfigError("\n  ".join(lines))
