"""TensorBoard and Weights & Biases, by config: the numbers of metrics.jsonl under the same names."""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.files import write_text


class Tracker(Protocol):
    """A service that also gets the numbers in rows of metrics.jsonl."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row."""

    def close(self) -> None:
        """Send what is buffered, and close."""


def check_trackers(config: Config) -> None:
    """Raise ConfigError if a configured tracker is not installed."""
    wanted = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb_project is not None}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            key = "logging.tensorboard" if package == "tensorboard" else "logging.wandb_project"
            raise ConfigError(f"{key}: needs the package {package}: pip install {package}")


class Trackers:
    """All trackers of a run; one that fails is reported by `say` and disabled (metrics.jsonl has all)."""

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None]):
        self._trackers, self._say = trackers, say

    def write(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row to every tracker."""
        self._each(lambda tracker: tracker.write(row))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except Exception as error:  # whatever the packages raise
                self._say(f"disabling {type(tracker).__name__}: {type(error).__name__}: {error}")
                self._trackers.remove(tracker)


def start_trackers(config: Config, step: int, say: Callable[[str], None]) -> list[Tracker]:
    """Start the configured trackers, for a run that resumes after `step`; one that cannot start is reported.

    Weights & Biases falls back to its offline mode, as it needs a login and a network otherwise.
    """
    starts: dict[str, Callable[[], Tracker]] = {}
    if config.logging.tensorboard:
        directory = config.logging.dir / "tensorboard"
        starts["TensorBoard, which is disabled"] = lambda: TensorBoard(directory, step)
    if config.logging.wandb_project is not None:
        if config.logging.wandb_mode == "online":
            offline = f"W&B online; falling back to {config.logging.dir}/wandb, for `wandb sync`"
            starts[offline] = lambda: WandB(config, "online")
        starts["W&B offline, which is disabled"] = lambda: WandB(config, "offline")
    trackers: list[Tracker] = []
    for what, start in starts.items():
        if any(isinstance(tracker, WandB) for tracker in trackers):
            break
        try:
            trackers.append(start())
        except Exception as error:  # whatever the packages raise
            reason = " ".join(str(error).split())
            say(f"cannot start {what} (metrics.jsonl has all numbers): {type(error).__name__}: {reason}")
    return trackers


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


class TensorBoard:
    """Event files in RUN/tensorboard; events of an earlier start about steps after `step` are hidden."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row, and flush them."""
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandB:
    """One W&B run per run folder, also over several starts of it; its id is kept in RUN/wandb_id."""

    def __init__(self, config: Config, mode: str):
        import wandb  # pyright: ignore[reportMissingImports]

        settings, file = config.logging, config.logging.dir / "wandb_id"
        if not file.is_file():
            write_text(file, secrets.token_hex(4))
        name, run_id = settings.wandb_exp_name or settings.dir.name, file.read_text(encoding="utf-8").strip()
        options: dict[str, Any] = {"project": settings.wandb_project, "name": name, "dir": str(settings.dir)}
        options |= {"id": run_id, "resume": "allow", "mode": mode}
        options |= {"config": config.model_dump(mode="json")}
        quiet = wandb.Settings(silent=True, console="off")  # the terminal is ours
        self.run = wandb.init(**options, settings=quiet)

        # W&B drops rows below its own newest step, but a resumed run repeats steps: step is a metric.
        self.run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row."""
        self.run.log({"step": row["step"], **_numbers(row)})

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()
