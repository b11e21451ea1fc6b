"""The driver: one training step reads as the paper's Algorithm 1."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from megatron_srpo.checkpoint import resume
from megatron_srpo.checkpoint.folder import Counters, RunInfo
from megatron_srpo.checkpoint.saver import Saver
from megatron_srpo.config.load import save_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.data.update_report import UpdateReport
from megatron_srpo.distributed.device import model_dtype, uses_transformer_engine
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.distributed.layout import Layout, joined
from megatron_srpo.distributed.stop import StopRequest
from megatron_srpo.evaluation.evaluate import evaluate
from megatron_srpo.evaluation.scores import with_history
from megatron_srpo.model.hf_folder import HFFolder, naming_key
from megatron_srpo.observe.alarms import REMEMBERED, Alarm, Limits, alarms
from megatron_srpo.observe.logs import alone, open_run_folder, rank_log
from megatron_srpo.observe.metrics import MetricsFile, rollout_metrics, update_metrics, version_metrics
from megatron_srpo.observe.profiler import StepProfiler
from megatron_srpo.observe.report import write_report
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.observe.tokens import choose, write_tokens
from megatron_srpo.observe.trackers import Trackers, start_trackers
from megatron_srpo.observe.watchdog import Watchdog
from megatron_srpo.preflight import preflight
from megatron_srpo.rollout.collect import exchange
from megatron_srpo.rollout.route import route
from megatron_srpo.rollout.source import Rollouts
from megatron_srpo.training.token_values import TokenValues
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.transfer import save_hf


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


class TrainingInterrupted(RuntimeError):
    """The run was asked to leave and has saved itself: the same command goes on."""


@naming_key("model.hf_path")
def train(config: Config) -> Path:
    """Run the configuration to its end on this process's share of the work; returns the run folder.

    A folder that holds this run already is gone on with (`resume`). Raises ConfigError, TrainingStopped,
    TrainingInterrupted, and SaveFailed when the last checkpoint could not be written.
    """
    folder = preflight(config)
    with joined(config.parallel, config.train.seed, alike=(TrainingStopped, TrainingInterrupted)) as layout:
        title = f"{config.algorithm.name} · {folder.path.name} · {layout.world_size} process{'es' * (layout.world_size > 1)}"
        session = open_run_folder(config.logging.dir, layout)
        with (
            alone(config.logging.dir, layout),
            rank_log(config.logging.dir, layout),
            Watchdog(config.logging.dir / "watchdog", layout, config.logging.watchdog_minutes, session),
            Terminal(title, config.train.steps, layout.rank == 0) as terminal,
            StopRequest(layout, config.checkpoint.exit_duration_in_mins) as stop,
        ):
            _Run(config, folder, layout, terminal, stop).whole()
    return config.logging.dir


class _Run:
    """Policy, rollouts and all that is written down, from the run's start or newest checkpoint to its end."""

    def __init__(
        self, config: Config, folder: HFFolder, layout: Layout, terminal: Terminal, stop: StopRequest
    ):
        self.config, self.folder, self.layout, self.terminal, self.stop = (
            config,
            folder,
            layout,
            terminal,
            stop,
        )
        self.directory, self.is_first, self.skipped_in_a_row = config.logging.dir, layout.rank == 0, 0
        self.checkpoint = resume.find(config, layout, lambda text: terminal.say(text, "bold red"))
        if self.is_first:
            save_config(config, self.directory / "config.yaml")
        self._introduce()
        self.trainer = Trainer(config, folder, layout, is_resumed=self.checkpoint is not None)
        terminal.say(self.trainer.loss_path)
        self.trainer.make_room()  # servers may start beside it
        self.watch = Stopwatch(terminal.phase)
        self.rollouts = Rollouts(config, folder, layout, terminal.say, self.watch)
        self.metrics = MetricsFile(self.directory / "metrics.jsonl" if self.is_first else Path(os.devnull))
        self.trackers = Trackers([], terminal.say)
        self.profiler = StepProfiler(self.directory / "profile", config.logging, layout)
        self.rows, self.limits = [], Limits.of(config)  # the last training steps' rows
        self.saver = Saver(
            self.directory / "checkpoints",
            config.checkpoint,
            layout,
            RunInfo.of(config, folder.architecture, layout),
            self.rollouts.ledger.saved,
        )
        self.evaluates = config.evaluation.every > 0 and self.rollouts.collector is not None
        if config.evaluation.every > 0 and not self.evaluates:
            terminal.say("replaying: there is no engine, so there are no evaluations", "yellow")

    def whole(self) -> None:
        """All steps that are left, then the model as a Hugging Face folder."""
        stopped = None
        try:
            try:
                self._loop()
            except TrainingStopped as error:  # on every rank alike: what was learnt before is kept
                stopped = error
            finally:
                self.rollouts.close()
                self.trackers.close()
            self.terminal.phase("export")
            save_hf(self.trainer.export(), self.folder, self.directory / "hf", write=self.is_first)
            self.saver.finish()
            self._say_goodbye()
            if self.is_first:
                self._report()
        finally:
            self.metrics.close()
            self.trainer.close()
        if stopped is not None:
            raise stopped

    def _loop(self) -> None:
        config, (done, is_evaluated) = self.config, self._go_on()
        self._publish(done)
        if self.evaluates and self._evaluates_after(done) and not is_evaluated:
            self._evaluate(done)
        for step in range(done + 1, config.train.steps + 1):
            PROGRESS.step = step
            with self.profiler(step):
                groups, report = self._step(step)
            self._tell(step, groups, report)
            reason = self.stop.reason()  # asked here: all ranks have done the same steps
            evaluation = (
                self._evaluate(step)
                if self.evaluates and self._evaluates_after(step) and reason is None
                else None
            )
            interval = config.checkpoint.save_interval
            if interval and (step % interval == 0 or step == config.train.steps or reason is not None):
                self._save(step, evaluation)
            if problem := self.saver.news():  # the checkpoint before stays, and training goes on
                self.terminal.say(problem, "bold red")
            if reason is not None and (
                step < config.train.steps or self.evaluates and interval
            ):  # the last step's is left to do
                self._leave(step, reason)

    def _step(self, step: int) -> tuple[list[Group], UpdateReport]:
        """Algorithm 1 of arXiv 2604.02288, once. Returns all ranks' groups and the update's report."""
        config, trainer, rollouts, watch = self.config, self.trainer, self.rollouts, self.watch
        with watch("rollout"):
            groups = rollouts.collect(step)
        with watch("verify"):
            groups = exchange(route(groups, step, config, self.folder), self.layout)
            rollouts.make_room()
            if config.logging.rollouts and self.is_first:
                dump(groups, self.directory / "rollouts", step)
        with watch("teacher"):
            trainer.take_room()
            batches = trainer.pack([sample for group in groups for sample in group])
            targets = trainer.score_teacher(batches)
        with watch("update"):
            values = self._token_values(step, groups)
            report = trainer.update(batches, targets, values)
            if values is not None and (rows := values.gather()) and self.is_first:
                write_tokens(rows, groups, self.folder.tokenizer.decode, self.directory / "rollouts", step)
            rollouts.ledger.trained(step, [group[0].prompt.id for group in groups])
        with watch("rollout"):
            rollouts.settle()  # with overlap, the next batch was sampled meanwhile
        with watch("publish"):
            self._publish(step)
        return groups, report

    def _publish(self, step: int) -> None:
        self.trainer.make_room()
        self.rollouts.publish(self.trainer.export(), step)

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.trackers.write(row)

    def _token_values(self, step: int, groups: list[Group]) -> TokenValues | None:
        """For the steps whose tokens are dumped."""
        settings = self.config.logging
        if not (
            settings.rollouts and settings.tokens_every and (step == 1 or step % settings.tokens_every == 0)
        ):
            return None
        return TokenValues(
            choose(groups, settings.tokens_samples), self.layout, self.config.rollout.temperature
        )

    def _tell(self, step: int, groups: list[Group], report: UpdateReport) -> None:
        """The step's row and line.

        Raises TrainingStopped after too many skipped updates, or when trainer and engine disagree.
        """
        row = {
            "step": step,
            **update_metrics(report),
            **rollout_metrics(groups),
            **version_metrics(groups, step),
        }
        row |= self.rollouts.drawn.numbers | self.watch.read()
        before = self.rows[-1].get("alarms", []) if self.rows else []
        self.rows = [*self.rows, row][-REMEMBERED:]
        raised = alarms(self.rows, self.limits)
        row["alarms"] = [alarm.name for alarm in raised]
        self._write(row)
        self.terminal.step(row)
        self._sound(step, raised, before)
        self._guard(step, row["engine_logprob_gap"])
        for loss, norm in report.skipped_updates:
            self.terminal.say(
                f"step {step}: an update was skipped: loss {loss}, gradient norm {norm}", "bold red"
            )
        self.skipped_in_a_row = report.skipped_in_a_row(self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.config.train.max_skipped_updates:
            raise TrainingStopped(
                f"step {step}: {self.skipped_in_a_row} updates in a row had a non-finite loss or gradient norm"
                " (train.max_skipped_updates); hf/ holds the weights of the last finite update"
            )

    def _sound(self, step: int, raised: list[Alarm], before: list[str]) -> None:
        """Tell the alarms that did not hold after the step before.

        Raises TrainingStopped for one of logging.stop_on.
        """
        self.terminal.alarms = raised
        for alarm in raised:
            if alarm.name not in before:
                self.terminal.say(
                    f"step {step}: alarm {alarm.name}: {alarm.finding}\n    {alarm.advice}", "bold yellow"
                )
        if fatal := [alarm for alarm in raised if alarm.name in self.config.logging.stop_on]:
            raise TrainingStopped(f"step {step}: alarm {fatal[0].name} (logging.stop_on): {fatal[0].finding}")

    def _guard(self, step: int, gap: float) -> None:
        """Trainer and engine must agree on what was sampled; what is replayed, another policy may have made."""
        settings = self.config.rollout
        if (
            settings.replay is None
            and settings.logprob_gap_stop is not None
            and not gap < settings.logprob_gap_stop
        ):
            what = f"step {step}: trainer's and engine's log-probabilities are {gap:.3g} nats a token apart"
            raise TrainingStopped(
                f"{what} (rollout.logprob_gap_stop); does the engine have the published weights?"
            )

    def _evaluates_after(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.train.steps

    def _evaluate(self, step: int) -> dict[str, float]:
        config = self.config
        self.terminal.phase("evaluate")
        start = time.perf_counter()
        limit, seed = config.rollout.max_response_tokens, config.train.seed
        scores = evaluate(self.rollouts.collector, self.rollouts.evaluated, config.evaluation, limit, seed)
        row = {
            "step": step,
            **with_history(scores, self.metrics.evaluations()),
            "seconds_evaluate": time.perf_counter() - start,
        }
        self._write(row)
        self.terminal.evaluation(row)
        return row

    def _go_on(self) -> tuple[int, bool]:
        """Everything as after the newest checkpoint's step, or as at the start: that step (0) and whether it
        has been evaluated.
        """
        resumed = resume.restore(self.checkpoint, self.trainer, self.layout, self.terminal.say)
        step, is_evaluated, counters = resumed
        self.skipped_in_a_row = counters.skipped_in_a_row
        rows = self.metrics.rewind(step, is_evaluated)
        self.terminal.recall(rows)
        if self.is_first:
            self.trackers = Trackers(
                start_trackers(self.config, step), lambda text: self.terminal.say(text, "bold red")
            )
        recent = [row for row in rows if "loss" in row][-REMEMBERED:]
        self.rows = self.layout.broadcast(recent)  # only the first rank has read them
        self.rollouts.go_on(step, counters.next_prompt)
        return step, is_evaluated

    def _save(self, step: int, evaluation: dict[str, float] | None) -> None:
        """Begin a checkpoint of the state after `step`."""
        with self.watch("checkpoint"):
            counters = Counters(self.skipped_in_a_row, self.rollouts.next_prompt)
            self.saver.save(step, self.trainer, counters, evaluation)

    def _leave(self, step: int, reason: str) -> None:
        self.terminal.phase("checkpoint")
        if not self.config.checkpoint.save_interval:
            raise TrainingInterrupted(
                f"{reason}: left after step {step} without a checkpoint (checkpoint.save_interval: 0)"
            )
        self.saver.finish()
        raise TrainingInterrupted(
            f"{reason}: checkpoint saved at step {step}/{self.config.train.steps}; rerun the same command to resume"
        )

    def _introduce(self) -> None:
        layers = (
            "Transformer Engine"
            if uses_transformer_engine(self.config.model)
            else "local layers, torch SDPA attention"
        )
        dtype = str(model_dtype(self.config.model)).removeprefix("torch.")
        self.terminal.say(f"{self.layout.device.type}, {dtype}, {layers}")
        prompt = max(
            self.config.rollout.max_prompt_tokens,
            self.config.teacher.max_prompt_tokens * self.config.algorithm.uses_teacher,
        )
        longest = prompt + self.config.rollout.max_response_tokens
        if longest > (positions := self.folder.architecture.max_position_embeddings):
            keys = "rollout.max_*_tokens, teacher.max_prompt_tokens"
            self.terminal.say(
                f"sequences may reach {longest} tokens ({keys}); the model was made for {positions}", "yellow"
            )

    def _report(self) -> None:
        """report.html. What it could not read, or a full disk, does not undo a run that is done."""
        try:
            write_report([self.directory], self.directory / "report.html")
        except (OSError, ValueError) as error:
            self.terminal.say(f"report.html could not be written: {error}", "bold red")

    def _say_goodbye(self) -> None:
        evaluations = self.metrics.evaluations()
        if evaluations:
            key = next(key for key in evaluations[-1] if "/avg@" in key)
            values = [
                row[key] for row in evaluations if key in row
            ]  # evaluation.* may have changed where the run went on
            self.terminal.say(
                f"{key.removeprefix('eval/')}: {values[0]:.3f} before, {values[-1]:.3f} after", "bold green"
            )
        self.terminal.say(
            f"run folder: {self.directory}  (report.html, metrics.jsonl, rollouts/; the trained model is in hf/)"
        )
