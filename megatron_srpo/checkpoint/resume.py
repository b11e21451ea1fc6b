"""Going on: where a run stands, and whether this configuration may go on with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import Counters, DamagedCheckpoint, Manifest
from megatron_srpo.checkpoint.state import restore_generators, restore_trainer
from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.families import architecture_from_dict
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.torch_dist import Folder


class Checkpoint(NamedTuple):
    """A whole checkpoint of this run."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """The last step it holds."""
        return self.manifest.step


def check_run_folder(config: Config, architecture: Architecture) -> None:
    """Raises ConfigError when the run folder cannot take this run: it holds another one, or may not be gone
    on with.
    """
    directory = config.logging.dir
    check_writable(directory)
    if (directory / "samples").exists():
        raise ConfigError(
            f"logging.dir: {directory.resolve()} holds an evaluation; name another folder for the run"
        )
    held = [
        name
        for name in ("metrics.jsonl", "rollouts", "checkpoints", "hf", "hf.partial")
        if (directory / name).exists()
    ]
    if not held:
        return
    what = f"logging.dir: {directory.resolve()} already holds a run ({', '.join(held)})"
    if config.resume.mode == "never":
        raise ConfigError(f"{what}; name another folder, or set resume: auto to go on with it")
    has_checkpoint = bool(folders.steps(directory / "checkpoints"))
    if _was_only_sampled(directory):
        raise ConfigError(
            f"{what} of the sample command; name another folder (and train on its samples by rollout.replay)"
        )
    if not has_checkpoint and ("hf" in held or not config.checkpoint.save_interval):
        raise ConfigError(f"{what} without a checkpoint to go on from; name another folder")
    before, source = _configuration_of(directory, what)
    changes = differences(before, config.model_dump(mode="json"))
    if refused := [key for key in changes if not _may_change(key, ("resume", *config.resume.override))]:
        lines = [f"{key}: was {changes[key][0]!r}, is now {changes[key][1]!r}" for key in refused]
        raise ConfigError(
            f"{what} with another configuration ({source}):\n  "
            + "\n  ".join(lines)
            + "\nname another folder; or, if the run may go on"
            " with these changes, add their keys to resume.override"
        )
    for step in folders.steps(directory / "checkpoints")[:1]:
        _check_model(folders.folder_of(directory / "checkpoints", step), architecture)


def check_writable(directory: Path) -> None:
    """Raises ConfigError when the folder `logging.dir` can be neither made nor written to."""
    above = directory.absolute()
    place = next(path for path in (above, *above.parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ConfigError(f"logging.dir: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"logging.dir: {place} cannot be written to")


def _was_only_sampled(directory: Path) -> bool:
    """Whether the folder's steps were sampled and not trained."""
    file = directory / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return any(b'"pass_rate":' in line for line in lines) and not any(b'"loss":' in line for line in lines)


def _configuration_of(directory: Path, what: str) -> tuple[dict[str, Any], Path]:
    """The configuration the run was last started with, and its file."""
    file = directory / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}, but {file.name} cannot be read ({error}); name another folder") from None
    rollout = before.get("rollout", {})
    if "overlap" in rollout:  # the name of older runs
        rollout["async_steps"] = rollout.pop("overlap")
    return before, file


def _check_model(folder: Path, architecture: Architecture) -> None:
    try:
        saved = architecture_from_dict(folders.read_manifest(folder).architecture)
    except DamagedCheckpoint:
        return  # `find` says so and skips it
    changes = differences(dataclasses.asdict(saved), dataclasses.asdict(architecture))
    if changes:
        lines = [
            f"{key}: the checkpoint has {old!r}, model.hf_path {new!r}" for key, (old, new) in changes.items()
        ]
        raise ConfigError(f"logging.dir: {folder} is a checkpoint of another model:\n  " + "\n  ".join(lines))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of all that differs between two nested dictionaries."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif (list(one) if isinstance(one, tuple) else one) != (
            list(other) if isinstance(other, tuple) else other
        ):
            found[f"{prefix}{key}"] = one, other
    return found


def _may_change(key: str, allowed: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def find(config: Config, layout: Layout, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of the run folder whose files are all as they were written; None when there is
    none.

    Ranks share the reading. Each that is passed over is said. Raises ConfigError when none of those that are
    there is whole.
    """

    def check(folder: Path, manifest: Manifest) -> str | None:
        try:
            folders.check_files(folder, manifest, slice(layout.rank, None, layout.world_size))
            problem = ""
        except DamagedCheckpoint as error:
            problem = str(error)
        return next((text.decode() for text in layout.gather_bytes(problem.encode()) if text), None)

    directory = config.logging.dir / "checkpoints"
    if config.resume.mode == "never" or not folders.steps(directory):
        return None
    found = folders.newest_valid(directory, check, say)
    if found is None:
        raise ConfigError(
            f"logging.dir: no checkpoint in {directory.resolve()} is valid; remove that folder to start the run"
            " over"
        )
    return Checkpoint(*found)


class Resumed(NamedTuple):
    """Where a run continues. step: the last one done, 0 at the start; is_evaluated: whether it has been."""

    step: int = 0
    is_evaluated: bool = False
    counters: Counters = Counters()


def restore(
    checkpoint: Checkpoint | None, trainer: Trainer, layout: Layout, say: Callable[[str], None]
) -> Resumed:
    """Restore trainer and random states of `checkpoint`. Without one, the run starts as it is.

    Random states are restored where as many ranks saved them.
    """
    if checkpoint is None:
        return Resumed()
    manifest = checkpoint.manifest
    saved = Folder(checkpoint.folder)
    restore_trainer(trainer, saved, manifest.state)
    if manifest.world_size == layout.world_size:
        restore_generators(saved, layout.rank)
    for name, (old, new) in differences(manifest.versions, folders.package_versions()).items():
        say(f"the checkpoint was written with {name} {old}, this is {new}")
    say(f"resuming from step {manifest.step}: {checkpoint.folder}")
    return Resumed(manifest.step, manifest.evaluation is not None, manifest.counters)
