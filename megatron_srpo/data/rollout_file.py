"""Rollouts on disk: one file per step, one JSON line per sample; people can read them, a run can replay."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.data.atomic import atomic_file
from megatron_srpo.data.records import Group


def step_file(folder: Path, step: int) -> Path:
    """Return the file of step `step` (from 1), given a run folder or its folder of rollouts."""
    inner = folder / "rollouts"
    return (inner if inner.is_dir() else folder) / f"step_{step:06d}.jsonl"


def dump(groups: Sequence[Group], folder: Path, step: int) -> None:
    """Write the step's samples atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(step_file(folder, step)) as out:
        for sample in itertools.chain.from_iterable(groups):
            out.write(json.dumps({"step": step, **sample.model_dump(mode="json")}, ensure_ascii=False) + "\n")


def policy_tokens(row: dict[str, Any]) -> int:
    """Count the policy's tokens in a sample, given as a JSON object, also of an older run."""
    if "response_ids" in row:
        return len(row["response_ids"])
    return sum(len(segment["ids"]) for segment in row["segments"] if segment["author"] == "policy")
