"""Small runs of the quick start's model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.train import train

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def small_config(directory: Path, *overrides: str) -> Config:
    """Five steps of 8 × 4 samples, nothing evaluated or saved; the run folder is `directory`."""
    small = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "train.steps=5", "evaluation.every=0"]
    settings = [*small, "checkpoint.save_interval=0", f"model.hf_path={QUICKSTART / 'start'}", f"logging.dir={directory}", *overrides]
    return load_config(QUICKSTART / "config.yaml", settings)


def small_run(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train; the rows of its metrics.jsonl."""
    train(small_config(directory, *overrides))
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
