"""The folder of a run's checkpoints: read, check, commit and discard them.

    RUN/checkpoints/step_000010/__0_0.distcp …   each rank's tensors, in megatron-core's format torch_dist
                                .metadata, common.pt, metadata.json   the same format's
                                carried.jsonl    groups left over for the next step, if any
                                manifest.json    step, configuration, versions, counters, checksums of the
                                                 run's inputs, and every file's size and checksum
                    latest                       the name of the newest one
    RUN/newest_checkpoint                        the same, in case the folder above is lost

A checkpoint is written to `.step_000010.…`, synced, and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.files import FileError, SavedFile, describe, sync, write_text
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.architecture import Architecture

FORMAT = 2  # 1: safetensors files with ranges of the ranks' shards
CARRIED = "carried.jsonl"
_PACKAGES = ("megatron-core", "megatron_srpo", "safetensors", "torch", "transformers")
_NAME = re.compile(r"step_(\d{6,})")


# Configuration key → name of a file, or of something else that the key stands for → its checksum.
Inputs = dict[str, dict[str, str]]


class RunInfo(BaseModel, extra="forbid"):
    """The part of manifest.json that is the same in all checkpoints of a process."""

    architecture: dict[str, Any]
    dtype: str  # the model's, without "torch."
    config: dict[str, Any]
    versions: dict[str, str]  # of the packages a run depends on
    world_size: int
    threads: int | None = None  # of a process (OMP_NUM_THREADS); None: saved by an older version, as below
    inputs: Inputs = {}

    @classmethod
    def of(cls, config: Config, architecture: Architecture, layout: Layout, inputs: Inputs) -> RunInfo:
        """Describe this process's run."""
        return cls(
            architecture=dataclasses.asdict(architecture),
            dtype=str(model_dtype(config.model)).removeprefix("torch."),
            config=config.model_dump(mode="json"),
            versions=package_versions(),
            world_size=layout.world_size,
            threads=torch.get_num_threads(),
            inputs=inputs,
        )


class Counters(NamedTuple):
    """State of a run in addition to the trainer's."""

    skipped_in_a_row: int = 0  # skipped updates since the last applied one
    next_prompt: int = 0  # position in the training prompts


class Manifest(RunInfo):
    """The content of manifest.json."""

    format: int
    step: int
    session: str
    state: dict[str, int]  # the trainer's scalars and `Counters`
    evaluation: dict[str, Any] | None  # the row of metrics.jsonl, if this step was evaluated
    files: dict[str, SavedFile]
    metrics: SavedFile | None = None  # the beginning of metrics.jsonl, up to this step
    crc32: int | None = None  # of everything else in manifest.json

    @property
    def counters(self) -> Counters:
        """The run's counters, from `state`."""
        return Counters(self.state["skipped_in_a_row"], self.state["next_prompt"])


class DamagedCheckpoint(FileError):
    """A checkpoint that cannot be used; the message names the file and the problem."""


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that a run depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def folder_of(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step` in a run's folder of checkpoints, `directory`."""
    return directory / f"step_{step:06d}"


def steps(directory: Path) -> list[int]:
    """List the steps with a checkpoint, the newest first. `directory` need not exist."""
    names = [_NAME.fullmatch(entry.name) for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(match[1]) for match in names if match), reverse=True)


def newest_saved(run: Path) -> str | None:
    """Return the name of the newest checkpoint that this run has ever saved, None if there is none."""
    for file in (run / "newest_checkpoint", run / "checkpoints" / "latest"):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace").strip()
    return None


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in `folder`. Raises DamagedCheckpoint."""
    file = folder / "manifest.json"
    try:
        tree = json.loads(file.read_bytes())
        manifest = Manifest.model_validate(tree)
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise DamagedCheckpoint(f"{file}: is damaged: {error.errors()[0]['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: is damaged: {error}") from None
    if manifest.format != FORMAT:
        found = f"{file}: has format {manifest.format}, and this version reads format {FORMAT}"
        advice = "resume with the version that saved it (see that file), or start a new run from the"
        advice += " Hugging Face folder that its convert_megatron_to_hf.py writes"
        raise DamagedCheckpoint(f"{found}; {advice}")
    if manifest.crc32 is not None and manifest.crc32 != _checksum(tree):
        raise DamagedCheckpoint(f"{file}: its content has changed since it was written (CRC-32)")
    return manifest


def _checksum(tree: dict[str, Any]) -> int:
    """Return the CRC-32 of a manifest, given as a JSON object, but for the checksum itself."""
    rest = {key: value for key, value in tree.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def check_files(folder: Path, manifest: Manifest, share: slice = slice(None)) -> None:
    """Compare sizes and checksums of a slice of the files with the manifest. Raises DamagedCheckpoint."""
    for name, expected in sorted(manifest.files.items())[share]:
        file = folder / name
        try:
            if (size := file.stat().st_size) != expected.bytes:
                raise DamagedCheckpoint(f"{file}: has {size} bytes, the manifest says {expected.bytes}")
            found = describe(file)
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: cannot be read: {error.strerror}") from None
        if found.crc32 != expected.crc32:
            raise DamagedCheckpoint(f"{file}: its content has changed since it was written (CRC-32)")


def commit(partial: Path, manifest: Manifest, directory: Path) -> Path:
    """Rename the complete checkpoint in `partial`, point `latest` to it, and discard later ones."""
    manifest = manifest.model_copy(update={"crc32": _checksum(json.loads(manifest.model_dump_json()))})
    write_text(partial / "manifest.json", manifest.model_dump_json(indent=1))
    sync(partial)
    final = folder_of(directory, manifest.step)
    if final.exists():  # a damaged one
        discard(final)
    partial.rename(final)
    sync(directory)
    for file in (directory / "latest", directory.parent / "newest_checkpoint"):
        write_text(file, final.name + "\n")
    for step in steps(directory):
        if step > manifest.step:  # a damaged one, which resuming skipped
            discard(folder_of(directory, step))
    return final


def discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one is not taken for valid."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def tidy(directory: Path) -> None:
    """Remove the remains of interrupted saves and removals."""
    for entry in directory.iterdir() if directory.is_dir() else ():
        if entry.name.startswith(".step_"):
            shutil.rmtree(entry)


def retain(directory: Path, keep_last: int, keep_best: int) -> list[int]:
    """Discard all but the newest `keep_last` and the best `keep_best` checkpoints; return the kept steps."""
    saved = steps(directory)
    scores = {step: score for step in saved if (score := _score(folder_of(directory, step))) is not None}
    best = sorted(scores, key=lambda step: (-scores[step], -step))[:keep_best]
    kept = [step for number, step in enumerate(saved) if number < keep_last or step in best]
    for step in saved:
        if step not in kept:
            discard(folder_of(directory, step))
    return kept


def _score(folder: Path) -> float | None:
    """Return the first task's avg@K of the evaluation at this checkpoint."""
    try:
        evaluation = read_manifest(folder).evaluation or {}
    except DamagedCheckpoint:
        return None
    return next((value for key, value in evaluation.items() if "/avg@" in key), None)


def newest_valid(
    directory: Path, check: Callable[[Path, Manifest], str | None], say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint in which `check` finds no problem, or None; report skipped ones."""
    for step in steps(directory):
        folder = folder_of(directory, step)
        try:
            manifest = read_manifest(folder)
            problem = check(folder, manifest)
        except DamagedCheckpoint as error:
            problem = str(error)
        if problem is None:
            return folder, manifest
        say(f"skipping checkpoint at step {step}: {problem}")
    return None
