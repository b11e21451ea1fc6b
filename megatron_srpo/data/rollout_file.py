"""Rollouts on disk: one file a step, one JSON line a sample, readable by people and replayable by the
trainer.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.data.records import Group


def step_file(folder: Path, step: int) -> Path:
    """Where step `step` (from 1) is kept in a folder of rollouts, or in that of the run whose folder is
    given.
    """
    inner = folder / "rollouts"
    return (inner if inner.is_dir() else folder) / f"step_{step:06d}.jsonl"


def dump(groups: Sequence[Group], folder: Path, step: int) -> None:
    """Write the step's samples; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = step_file(folder, step)
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for sample in itertools.chain.from_iterable(groups):
            out.write(json.dumps({"step": step, **sample.model_dump(mode="json")}, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def policy_tokens(row: dict[str, Any]) -> int:
    """Return how many tokens the policy wrote in a sample, given as its JSON object (also of older runs)."""
    if "response_ids" in row:
        return len(row["response_ids"])
    return sum(len(segment["ids"]) for segment in row["segments"] if segment["author"] == "policy")
