"""The driver: one training step reads as the paper's Algorithm 1."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.checkpoint import resume
from megatron_srpo.checkpoint.folder import FORMAT, Manifest
from megatron_srpo.checkpoint.saver import Saver
from megatron_srpo.checkpoint.state import numbers, snapshot
from megatron_srpo.config import Config, save_config
from megatron_srpo.evaluate import evaluate
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.qwen3 import model_dtype, uses_transformer_engine
from megatron_srpo.observe.metrics import MetricsFile, rollout_metrics, update_metrics, version_metrics
from megatron_srpo.observe.terminal import Stopwatch, Terminal
from megatron_srpo.preflight import preflight
from megatron_srpo.records import Group
from megatron_srpo.rollout.collect import exchange
from megatron_srpo.rollout.dump import dump
from megatron_srpo.rollout.source import Rollouts
from megatron_srpo.runtime.parallel import Layout, initialize, shut_down
from megatron_srpo.runtime.stop import StopRequest
from megatron_srpo.runtime.trainer import Trainer, UpdateReport
from megatron_srpo.scores import with_history
from megatron_srpo.weights.transfer import save_hf


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


class TrainingInterrupted(RuntimeError):
    """The run was asked to leave and has saved itself: the same command goes on."""


def train(config: Config) -> Path:
    """Run the configuration to its end on this process's share of the work; returns the run folder.

    A folder that holds this run already is gone on with (`resume`). Raises ConfigError, TrainingStopped,
    TrainingInterrupted, and SaveFailed when the last checkpoint could not be written.
    """
    folder = preflight(config)
    layout = initialize(config.parallel, config.train.seed)
    title = f"{config.algorithm.name} · {folder.path.name} · {layout.world_size} process{'es' * (layout.world_size > 1)}"
    try:
        with (
            Terminal(title, config.train.steps, layout.rank == 0) as terminal,
            StopRequest(layout, config.checkpoint.exit_duration_in_mins) as stop,
        ):
            _Run(config, folder, layout, terminal, stop).whole()
    finally:
        shut_down(layout)
    return config.logging.dir


class _Run:
    """Policy, rollouts and all that is written down, from the run's start or newest checkpoint to its end."""

    def __init__(self, config: Config, folder: HFFolder, layout: Layout, terminal: Terminal, stop: StopRequest):
        self.config, self.folder, self.layout, self.terminal, self.stop = config, folder, layout, terminal, stop
        self.directory, self.is_first, self.skipped_in_a_row = config.logging.dir, layout.rank == 0, 0
        self.checkpoint = resume.find(config, layout, lambda text: terminal.say(text, "bold red"))
        if self.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_config(config, self.directory / "config.yaml")
        self._introduce()
        self.trainer = Trainer(config, folder, layout, is_resumed=self.checkpoint is not None)
        terminal.say(self.trainer.loss_path)
        self.rollouts = Rollouts(config, folder, layout, terminal.say)
        self.metrics = MetricsFile(self.directory / "metrics.jsonl" if self.is_first else Path(os.devnull))
        self.watch = Stopwatch(terminal)
        self.saver = Saver(self.directory / "checkpoints", config.checkpoint, layout, self.rollouts.ledger.saved)
        self.evaluates = config.evaluation.every > 0 and self.rollouts.collector is not None
        if config.evaluation.every > 0 and not self.evaluates:
            terminal.say("replaying: there is no engine, so there are no evaluations", "yellow")

    def whole(self) -> None:
        """All steps that are left, then the model as a Hugging Face folder."""
        stopped = None
        try:
            self._loop()
        except TrainingStopped as error:  # on every rank alike: what was learnt before is kept
            stopped = error
        finally:
            self.rollouts.close()
        self.terminal.phase("export")
        save_hf(self.trainer.export(), self.folder, self.directory / "hf", write=self.is_first)
        self.saver.finish()
        self._say_goodbye()
        self.metrics.close()
        if stopped is not None:
            raise stopped

    def _loop(self) -> None:
        config, (done, is_evaluated) = self.config, self._go_on()
        self.rollouts.publish(self.trainer.export(), done)
        if self.evaluates and self._evaluates_after(done) and not is_evaluated:
            self._evaluate(done)
        for step in range(done + 1, config.train.steps + 1):
            groups, report = self._step(step)
            self._tell(step, groups, report)
            reason = self.stop.reason()  # asked here: all ranks have done the same steps
            evaluation = self._evaluate(step) if self.evaluates and self._evaluates_after(step) and reason is None else None
            interval = config.checkpoint.save_interval
            if interval and (step % interval == 0 or step == config.train.steps or reason is not None):
                self._save(step, evaluation)
            if problem := self.saver.news():  # the checkpoint before stays, and training goes on
                self.terminal.say(problem, "bold red")
            if reason is not None and step < config.train.steps:
                self._leave(step, reason)

    def _step(self, step: int) -> tuple[list[Group], UpdateReport]:
        """Algorithm 1 of arXiv 2604.02288, once. Returns all ranks' groups and the update's report."""
        config, trainer, rollouts, watch = self.config, self.trainer, self.rollouts, self.watch
        with watch("rollout"):
            groups = rollouts.collect(step)
        watch.move(rollouts.drawn.seconds_verifying, "rollout", "verify")
        with watch("verify"):
            groups = route_groups(
                groups,
                config.algorithm,
                encode=lambda messages: self.folder.encode(messages, config.rollout.enable_thinking),
                max_teacher_prompt_tokens=config.teacher.max_prompt_tokens,
                seed=f"{config.train.seed}/{step}",
                feedback=config.teacher.feedback,
            )
            groups = exchange(groups, self.layout)
            rollouts.make_room()
            if config.logging.rollouts and self.is_first:
                dump(groups, self.directory / "rollouts", step)
        with watch("teacher"):
            batches = trainer.pack([sample for group in groups for sample in group])
            targets = trainer.score_teacher(batches)
        with watch("update"):
            report = trainer.update(batches, targets)
            rollouts.ledger.trained(step, [group[0].prompt.id for group in groups])
        with watch("rollout"):
            rollouts.settle()  # with overlap, the next batch was sampled meanwhile
        with watch("publish"):
            rollouts.publish(trainer.export(), step)
        return groups, report

    def _tell(self, step: int, groups: list[Group], report: UpdateReport) -> None:
        """The step's row and line. Raises TrainingStopped after too many skipped updates, or when trainer and engine disagree."""
        row = {"step": step, **update_metrics(report), **rollout_metrics(groups), **version_metrics(groups, step)}
        row |= self.rollouts.drawn.numbers | self.watch.read()
        self.metrics.write(row)
        self.terminal.step(row)
        self._guard(step, row["engine_logprob_gap"])
        for loss, norm in report.skipped_updates:
            self.terminal.say(f"step {step}: an update was skipped: loss {loss}, gradient norm {norm}", "bold red")
        self.skipped_in_a_row = report.skipped_in_a_row(self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.config.train.max_skipped_updates:
            raise TrainingStopped(
                f"step {step}: {self.skipped_in_a_row} updates in a row had a non-finite loss or gradient norm"
                " (train.max_skipped_updates); hf/ holds the weights of the last finite update"
            )

    def _guard(self, step: int, gap: float) -> None:
        """Trainer and engine must agree on what was sampled; what is replayed, another policy may have made."""
        settings = self.config.rollout
        if settings.replay is not None or gap < settings.logprob_gap_warning:
            return
        what = f"step {step}: trainer's and engine's log-probabilities are {gap:.3g} nats a token apart"
        if settings.logprob_gap_stop is not None and gap >= settings.logprob_gap_stop:
            raise TrainingStopped(f"{what} (rollout.logprob_gap_stop); does the engine have the published weights?")
        self.terminal.say(f"{what} (rollout.logprob_gap_warning)", "bold yellow")

    def _evaluates_after(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.train.steps

    def _evaluate(self, step: int) -> dict[str, float]:
        config = self.config
        self.terminal.phase("evaluate")
        start = time.perf_counter()
        limit, seed = config.rollout.max_response_tokens, config.train.seed
        scores = evaluate(self.rollouts.collector, self.rollouts.evaluated, config.evaluation, limit, seed)
        row = {"step": step, **with_history(scores, self.metrics.evaluations()), "seconds_evaluate": time.perf_counter() - start}
        self.metrics.write(row)
        self.terminal.evaluation(row)
        return row

    def _go_on(self) -> tuple[int, bool]:
        """Everything as after the newest checkpoint's step, or as at the start: that step (0) and whether it has been evaluated."""
        step, is_evaluated = 0, False
        if self.checkpoint is not None:
            manifest = self.checkpoint.manifest
            step, is_evaluated = manifest.step, manifest.evaluation is not None
            self.skipped_in_a_row = manifest.state["skipped_in_a_row"]
            resume.go_on(self.trainer, self.checkpoint, self.layout, self.terminal.say)
            self.terminal.say(f"going on after step {step}: {self.checkpoint.folder}", "bold")
        self.terminal.recall(self.metrics.rewind(step, is_evaluated))
        self.rollouts.go_on(step, 0 if self.checkpoint is None else self.checkpoint.manifest.state["next_prompt"])
        return step, is_evaluated

    def _save(self, step: int, evaluation: dict[str, float] | None) -> None:
        """Begin a checkpoint of the state after `step`."""
        with self.watch("checkpoint"):
            manifest = Manifest(
                format=FORMAT,
                step=step,
                session=self.saver.session,
                architecture=dataclasses.asdict(self.folder.architecture),
                config=self.config.model_dump(mode="json"),
                versions=resume.package_versions(),
                world_size=self.layout.world_size,
                state=numbers(self.trainer) | {"skipped_in_a_row": self.skipped_in_a_row, "next_prompt": self.rollouts.next_prompt},
                evaluation=evaluation,
                files={},
            )
            self.saver.save(snapshot(self.trainer), manifest)

    def _leave(self, step: int, reason: str) -> None:
        self.terminal.phase("checkpoint")
        if not self.config.checkpoint.save_interval:
            raise TrainingInterrupted(f"{reason}: left after step {step} without a checkpoint (checkpoint.save_interval: 0)")
        self.saver.finish()
        raise TrainingInterrupted(f"{reason}: saved after step {step} of {self.config.train.steps}; the same command goes on")

    def _introduce(self) -> None:
        layers = "Transformer Engine" if uses_transformer_engine(self.config) else "local layers, torch SDPA attention"
        dtype = str(model_dtype(self.config)).removeprefix("torch.")
        self.terminal.say(f"{self.layout.device.type}, {dtype}, {layers}")
        longest = self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens
        if longest > (positions := self.folder.architecture.max_position_embeddings):
            self.terminal.say(f"sequences may reach {longest} tokens (rollout.max_*_tokens); the model was made for {positions}", "yellow")

    def _say_goodbye(self) -> None:
        evaluations = self.metrics.evaluations()
        if evaluations:
            key = next(key for key in evaluations[0] if "/avg@" in key)
            before, after = evaluations[0][key], evaluations[-1][key]
            self.terminal.say(f"{key.removeprefix('eval/')}: {before:.3f} before, {after:.3f} after", "bold green")
        self.terminal.say(f"run folder: {self.directory}  (metrics.jsonl, rollouts/, config.yaml; the trained model is in hf/)")
