"""Run the quick start's model, scaled down, and make trainers, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import initialize, shut_down
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.train import train
from megatron_srpo.training.trainer import Trainer, TrainerSettings

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def small_config(directory: Path, *overrides: str) -> Config:
    """Return a configuration of five steps of 8 × 4 samples, without evaluation or saving.

    The run folder is `directory`.
    """
    small = [
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=4",
        "train.steps=5",
        "evaluation.every=0",
    ]
    settings = [
        *small,
        "checkpoint.save_interval=0",
        f"model.hf_path={QUICKSTART / 'start'}",
        f"logging.dir={directory}",
        *overrides,
    ]
    return load_config(QUICKSTART / "config.yaml", settings)


def small_run(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train; return the rows of its metrics.jsonl."""
    train(small_config(directory, *overrides))
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def trainers() -> Iterator[Callable[[Config], Trainer]]:
    """Return make(config), whose trainer replaces the previous one.

    Megatron has one set of groups at a time.
    """
    made = []

    def leave():
        while made:
            layout, trainer = made.pop()
            trainer.close()
            shut_down(layout)

    def make(config: Config) -> Trainer:
        leave()
        layout = initialize(config.parallel, seed=1)
        made.append((layout, Trainer(TrainerSettings.of(config), HFFolder(config.model.hf_path), layout)))
        return made[-1][1]

    yield make
    leave()
