"""TensorBoard and Weights & Biases, by config: the numbers of metrics.jsonl under the same names."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.distributed.files import write_text


class Tracker(Protocol):
    """Where rows of metrics.jsonl are sent besides."""

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; what is no number in it is left out."""

    def close(self) -> None:
        """All that was written is kept."""


def check_trackers(config: Config) -> None:
    """Raises ConfigError when one is asked for that is not installed."""
    wanted = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb_project is not None}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            key = "logging.tensorboard" if package == "tensorboard" else "logging.wandb_project"
            raise ConfigError(f"{key}: needs the package {package}: pip install {package}")


class Trackers:
    """All of a run.

    One that fails, such as for a lost connection, is told by `say` and let go: metrics.jsonl has everything.
    """

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None]):
        self._trackers, self._say = trackers, say

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.write(row))

    def close(self) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except Exception as error:  # whatever the packages raise
                self._say(f"{type(tracker).__name__} is given up: {type(error).__name__}: {error}")
                self._trackers.remove(tracker)


def start_trackers(config: Config, step: int) -> list[Tracker]:
    """The trackers asked for, for a run that goes on after `step`."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(config.logging.dir / "tensorboard", step))
    if config.logging.wandb_project is not None:
        trackers.append(WandB(config))
    return trackers


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


class TensorBoard:
    """Event files in RUN/tensorboard. What an earlier start wrote of steps after `step` is hidden."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class WandB:
    """One W&B run for a run folder (its id is kept in RUN/wandb_id), also over several starts.

    W&B's own step may only grow, and what comes below it is dropped; a run that goes on from a checkpoint
    comes back to steps it had. So `step` is a number like the others, named as the x axis of all: such steps
    have two points.
    """

    def __init__(self, config: Config):
        import wandb

        settings, file = config.logging, config.logging.dir / "wandb_id"
        if not file.is_file():
            write_text(file, secrets.token_hex(4))
        self.run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or settings.dir.name,
            dir=str(settings.dir),
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=settings.wandb_mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is ours
        )

        self.run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.run.log({"step": row["step"], **_numbers(row)})

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()
