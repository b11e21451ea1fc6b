"""Rollouts on disk: one file per step, one JSON line per sample; people can read them, a run can replay."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.data.atomic import atomic_file
from megatron_srpo.data.records import Group, Sample


def step_file(folder: Path, step: int) -> Path:
    """Return the file of step `step` (from 1), given a run folder or its folder of rollouts."""
    inner = folder / "rollouts"
    return (inner if inner.is_dir() else folder) / f"step_{step:06d}.jsonl"


def encode_sample(sample: Sample, step: int) -> bytes:
    """Return a sample's line."""
    row = {"step": step, **sample.model_dump(mode="json")}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def write_step(lines: Iterable[bytes], folder: Path, step: int) -> None:
    """Write the lines of a step's samples atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(step_file(folder, step)) as out:
        out.buffer.writelines(lines)


def dump(groups: Sequence[Group], folder: Path, step: int) -> None:
    """Write the samples of all groups of a step atomically."""
    samples = itertools.chain.from_iterable(groups)
    write_step((encode_sample(sample, step) for sample in samples), folder, step)


def policy_tokens(row: dict[str, Any]) -> int:
    """Count the policy's tokens in a sample, given as a JSON object, also of an older run."""
    if "response_ids" in row:
        return len(row["response_ids"])
    return sum(len(segment["ids"]) for segment in row["segments"] if segment["author"] == "policy")
