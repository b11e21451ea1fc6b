"""The checkpoints of one run: restored at its start, saved during training and before an early exit."""

from typing import Any

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint import resume
from megatron_srpo.checkpoint.folder import Counters, RunInfo
from megatron_srpo.checkpoint.inputs import inputs_of
from megatron_srpo.checkpoint.saver import Progress, Saver
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.reporter import Reporter
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.rollout.ledger import carried_text
from megatron_srpo.rollout.source import Rollouts
from megatron_srpo.training.trainer import Trainer


class TrainingInterrupted(RuntimeError):
    """The run was interrupted and has saved a checkpoint; the same command resumes it."""


class RunCheckpoints:
    """Checkpoints of trainer, rollouts and reporter. All ranks call its methods together."""

    def __init__(
        self, config: Config, folder: HFFolder, layout: Layout, terminal: Terminal, watch: Stopwatch
    ):
        """Find the newest valid checkpoint of the run, and report skipped ones."""
        self._settings, self._last_step = config.checkpoint, config.train.steps
        self._layout, self._terminal, self._watch = layout, terminal, watch
        self._found = resume.find(config, layout, lambda text: terminal.say(text, "bold red"))
        inputs = inputs_of(config, folder) if layout.rank == 0 else {}
        info = RunInfo.of(config, folder.architecture, layout, inputs)
        self._saver = Saver(config.logging.dir / "checkpoints", config.checkpoint, layout, info)

    @property
    def is_resumed(self) -> bool:
        """True if the run continues from a checkpoint."""
        return self._found is not None

    def restore(self, trainer: Trainer, rollouts: Rollouts, reporter: Reporter) -> tuple[int, bool]:
        """Restore the checkpoint, if any; return its step (else 0), and True if that was evaluated."""
        restored = resume.restore(self._found, trainer, self._layout, self._terminal.say)
        step, counters = restored.step, restored.counters
        reporter.resume(step, restored.is_evaluated, counters.skipped_in_a_row, restored.metrics)
        rollouts.resume(step, counters.next_prompt, restored.carried)
        self._saver.on_commit = rollouts.saved
        return step, restored.is_evaluated

    def save(
        self,
        step: int,
        trainer: Trainer,
        rollouts: Rollouts,
        reporter: Reporter,
        evaluation: dict[str, Any] | None,
        is_ending: bool,
    ) -> None:
        """Start a checkpoint if one is due after `step` or the run `is_ending`; report an earlier failure.

        `evaluation` is the row of metrics.jsonl, if `step` was evaluated.
        """
        interval = self._settings.save_interval
        if interval and (step % interval == 0 or step == self._last_step or is_ending):
            with self._watch("checkpoint"):
                next_prompt, carried = rollouts.state()
                counters = Counters(reporter.skipped_in_a_row, next_prompt)
                text = carried_text(carried) if self._layout.rank == 0 else ""
                metrics = folders.describe(reporter.metrics_file) if self._layout.rank == 0 else None
                self._saver.save(step, trainer, Progress(counters, evaluation, text, metrics))
        if problem := self._saver.news():  # the previous checkpoint is kept
            self._terminal.say(problem, "bold red")

    def interrupt(self, step: int, reason: str) -> None:
        """Wait for the checkpoint of `step`, then raise TrainingInterrupted with `reason`."""
        self._terminal.phase("checkpoint")
        if not self._settings.save_interval:
            text = f"{reason}: ended after step {step} without a checkpoint (checkpoint.save_interval: 0)"
            raise TrainingInterrupted(text)
        self._saver.finish()
        saved = f"checkpoint saved at step {step}/{self._last_step}"
        raise TrainingInterrupted(f"{reason}: {saved}; rerun the same command to resume")

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises SaveFailed if it could not be written."""
        self._saver.finish()
