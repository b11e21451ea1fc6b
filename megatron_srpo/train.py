"""The driver: one training step reads as Algorithm 1 of the paper (arXiv 2604.02288)."""

from pathlib import Path

from megatron_srpo.checkpoint.run import RunCheckpoints, TrainingInterrupted
from megatron_srpo.config.load import save_config
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.distributed.layout import Layout, process_group
from megatron_srpo.distributed.startup import resume_collection
from megatron_srpo.distributed.stop import StopRequest
from megatron_srpo.evaluation.evaluator import create_evaluator
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.profiler import StepProfiler
from megatron_srpo.observe.reporter import Reporter, TrainingStopped
from megatron_srpo.observe.session import run_session
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.preflight import describe_setup, preflight
from megatron_srpo.rollout.exchange import share_outlines
from megatron_srpo.rollout.route import route
from megatron_srpo.rollout.source import open_rollouts
from megatron_srpo.training.step_dump import StepDump
from megatron_srpo.training.trainer import Trainer, TrainerSettings
from megatron_srpo.weights.transfer import save_hf


def train(config: Config) -> Path:
    """Train on all ranks together, from the start or from the newest checkpoint of the run folder.

    Returns:
        The run folder (logging.dir).

    Raises:
        ConfigError: The configuration cannot be run.
        TrainingStopped: Training cannot continue.
        TrainingInterrupted: A signal or the time limit ended the run early.
        SaveFailed: The last checkpoint could not be written.
    """
    folder = preflight(config)
    title = f"{config.algorithm.name} · {folder.path.name}"
    collective_errors = (TrainingStopped, TrainingInterrupted)
    with (
        process_group(config.parallel, config.train.seed, collective_errors) as layout,
        run_session(config.logging, title, config.train.steps, layout) as terminal,
        StopRequest(layout, config.checkpoint.exit_duration_in_mins) as stop,
    ):
        Training(config, folder, layout, terminal, stop).run()
    return config.logging.dir


class Training:
    """The components of a run, and the loop over its steps."""

    def __init__(
        self, config: Config, folder: HFFolder, layout: Layout, terminal: Terminal, stop: StopRequest
    ):
        self.config = config
        self.folder = folder
        self.layout = layout
        self.terminal = terminal
        self.stop = stop
        self.directory = config.logging.dir
        self.watch = Stopwatch(terminal.phase)
        self.checkpoints = RunCheckpoints(config, folder, layout, terminal, self.watch)
        if layout.rank == 0:
            save_config(config, self.directory / "config.yaml")
        self.trainer = Trainer(TrainerSettings.of(config), folder, layout, self.checkpoints.is_resumed)
        for line in [*describe_setup(config, folder, layout), *self.trainer.describe()]:
            terminal.say(line)
        self.rollouts = open_rollouts(config, folder, layout, terminal.say, self.watch)
        self.evaluator = create_evaluator(config, self.rollouts, terminal.say)
        self.reporter = Reporter(config, layout, terminal)
        self.dump = StepDump(config, layout, folder.tokenizer.decode, terminal.say)
        self.profiler = StepProfiler(self.directory / "profile", config.logging, layout)

    def run(self) -> None:
        """Train all remaining steps, then export the policy as a Hugging Face folder."""
        stopped: TrainingStopped | None = None
        resume_collection()
        try:
            try:
                self._loop()
            except TrainingStopped as error:  # raised on every rank; the policy so far is exported
                stopped = error
            finally:
                self.rollouts.close()
                self.reporter.close_trackers()
            self.reporter.start_report()
            self.terminal.phase("export")
            save_hf(self.trainer.export(), self.folder, self.directory / "hf", write=self.layout.rank == 0)
            self.checkpoints.finish()
            self.reporter.summary()
        finally:
            self.reporter.close()
            self.trainer.close()
        if stopped is not None:
            raise stopped

    def _loop(self) -> None:
        saved = self.trainer, self.rollouts, self.reporter
        done, is_evaluated = self.checkpoints.restore(*saved)
        self._publish(done)
        if not is_evaluated:
            self._evaluate(done)
        for step in range(done + 1, self.config.train.steps + 1):
            PROGRESS.step = step
            with self.profiler(step):
                self.step(step)
            reason = self.stop.reason()  # a collective after every step
            evaluation = self._evaluate(step) if reason is None else None
            self.checkpoints.save(step, *saved, evaluation, is_ending=reason is not None)
            if reason is not None and self._is_unfinished(step):
                self.checkpoints.interrupt(step, reason)

    def step(self, step: int) -> None:
        """Run one training step: sample, route, score, update, publish. Raises TrainingStopped."""
        rollouts, trainer, watch = self.rollouts, self.trainer, self.watch
        with watch("rollout"):
            groups = route(rollouts.collect(step), step, self.config, self.folder)
            outlines = share_outlines(groups, self.layout)
            rollouts.release_memory()
            self.dump.samples(step, groups, outlines)
        with trainer.onloaded():
            with watch("teacher"):
                batches = trainer.prepare(groups, outlines)
                scores = trainer.score_teacher(batches)
            with watch("update"):
                values = self.dump.token_values(step, outlines)
                report = trainer.update(batches, scores, values)
                self.dump.tokens(step, values)
        self._publish(step)
        self.reporter.step(step, outlines, report, {**rollouts.metrics, **watch.read()})

    def _publish(self, step: int) -> None:
        with self.watch("publish"):
            self.rollouts.publish(self.trainer.export(), step)

    def _evaluate(self, step: int) -> dict | None:
        """Evaluate the policy after `step` if that is due, and return the row of metrics.jsonl."""
        if self.evaluator is None or not self.evaluator.is_due(step):
            return None
        self.terminal.phase("evaluate")
        return self.reporter.evaluation(step, self.evaluator(self.reporter.evaluations))

    def _is_unfinished(self, step: int) -> bool:
        """Return True if a resumed run has work left after `step`: steps, or the last evaluation."""
        evaluates = self.evaluator is not None and self.config.checkpoint.save_interval > 0
        return step < self.config.train.steps or evaluates
