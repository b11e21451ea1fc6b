"""The driver: one training step reads as the paper's Algorithm 1."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.config import Config, save_config
from megatron_srpo.evaluate import evaluate
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.qwen3 import model_dtype, uses_transformer_engine
from megatron_srpo.observe.metrics import MetricsFile, rollout_metrics, update_metrics
from megatron_srpo.observe.terminal import Stopwatch, Terminal
from megatron_srpo.preflight import preflight
from megatron_srpo.records import Group
from megatron_srpo.rollout.collect import exchange
from megatron_srpo.rollout.dump import dump
from megatron_srpo.rollout.source import Rollouts
from megatron_srpo.runtime.parallel import Layout, initialize, shut_down
from megatron_srpo.runtime.trainer import Trainer, UpdateReport
from megatron_srpo.scores import with_history
from megatron_srpo.weights.transfer import save_hf


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


def train(config: Config) -> Path:
    """Run the configuration to its end on this process's share of the work; returns the run folder."""
    folder = preflight(config)
    layout = initialize(config.parallel, config.train.seed)
    try:
        return _run(config, folder, layout)
    finally:
        shut_down(layout)


def _run(config: Config, folder: HFFolder, layout: Layout) -> Path:
    directory, is_first = config.logging.dir, layout.rank == 0
    if is_first:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
    metrics = MetricsFile(directory / "metrics.jsonl" if is_first else Path(os.devnull))
    title = f"{config.algorithm.name} · {folder.path.name} · {layout.world_size} process{'es' * (layout.world_size > 1)}"
    with Terminal(title, config.train.steps, is_first) as terminal:
        layers = "Transformer Engine" if uses_transformer_engine(config) else "local layers, torch SDPA attention"
        terminal.say(f"{layout.device.type}, {str(model_dtype(config)).removeprefix('torch.')}, {layers}")
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        if longest > (positions := folder.architecture.max_position_embeddings):
            terminal.say(f"sequences may reach {longest} tokens (rollout.max_*_tokens); the model was made for {positions}", "yellow")
        trainer = Trainer(config, folder, layout)
        terminal.say(trainer.loss_path)
        rollouts = Rollouts(config, folder, layout)
        watch = Stopwatch(terminal)
        stopped = None
        try:
            evaluations = _loop(config, trainer, rollouts, watch, metrics, terminal)
        except TrainingStopped as error:  # on every rank alike: what was learnt before is kept
            stopped, evaluations = error, []
        terminal.phase("export")
        save_hf(trainer.export(), folder, directory / "hf", write=is_first)
        _say_goodbye(terminal, evaluations, directory)
    metrics.close()
    if stopped is not None:
        raise stopped
    return directory


def _loop(config: Config, trainer: Trainer, rollouts: Rollouts, watch: Stopwatch, metrics: MetricsFile, terminal: Terminal) -> list[dict]:
    evaluations: list[dict] = []
    skipped_in_a_row = 0

    def evaluate_after(step: int) -> None:
        terminal.phase("evaluate")
        start = time.perf_counter()
        limit, seed = config.rollout.max_response_tokens, config.train.seed
        scores = evaluate(rollouts.collector, rollouts.evaluated, config.evaluation, limit, seed)
        row = {"step": step, **with_history(scores, evaluations), "seconds_evaluate": time.perf_counter() - start}
        evaluations.append(row)
        metrics.write(row)
        terminal.evaluation(row)

    evaluates = config.evaluation.every > 0 and rollouts.collector is not None
    if config.evaluation.every > 0 and not evaluates:
        terminal.say("replaying: there is no engine, so there are no evaluations", "yellow")
    rollouts.publish(trainer.export(), 0)
    if evaluates:
        evaluate_after(0)
    for step in range(1, config.train.steps + 1):
        groups, version, report = _step(config, trainer, rollouts, watch, step)
        row = {
            "step": step,
            **update_metrics(report),
            **rollout_metrics(groups),
            **watch.read(),
            "weight_version": version,
        }
        metrics.write(row)
        terminal.step(row)
        for loss, norm in report.skipped_updates:
            terminal.say(f"step {step}: an update was skipped: loss {loss}, gradient norm {norm}", "bold red")
        skipped_in_a_row = report.skipped_in_a_row(skipped_in_a_row)
        if skipped_in_a_row >= config.train.max_skipped_updates:
            raise TrainingStopped(
                f"step {step}: {skipped_in_a_row} updates in a row had a non-finite loss or gradient norm"
                " (train.max_skipped_updates); hf/ holds the weights of the last finite update"
            )
        if evaluates and (step % config.evaluation.every == 0 or step == config.train.steps):
            evaluate_after(step)
    return evaluations


def _step(config: Config, trainer: Trainer, rollouts: Rollouts, watch: Stopwatch, step: int) -> tuple[list[Group], str, UpdateReport]:
    """Algorithm 1 of arXiv 2604.02288, once. Returns all ranks' groups, the version that sampled them, and the update's report."""
    version = rollouts.version
    with watch("rollout"):
        groups = rollouts.collect(step)
    with watch("verify"):
        groups = rollouts.verify(groups)
        groups = route_groups(
            groups,
            config.algorithm,
            encode=lambda messages: rollouts.folder.encode(messages, config.rollout.enable_thinking),
            max_teacher_prompt_tokens=config.teacher.max_prompt_tokens,
            seed=f"{config.train.seed}/{step}",
            feedback=config.teacher.feedback,
        )
        groups = exchange(groups, rollouts.layout)
        if config.logging.rollouts and rollouts.layout.rank == 0:
            dump(groups, config.logging.dir / "rollouts", step)
    with watch("teacher"):
        batches = trainer.pack([sample for group in groups for sample in group])
        targets = trainer.score_teacher(batches)
    with watch("update"):
        report = trainer.update(batches, targets)
    with watch("publish"):
        rollouts.publish(trainer.export(), step)
    return groups, version, report


def _say_goodbye(terminal: Terminal, evaluations: list[dict], directory: Path) -> None:
    if evaluations:
        key = next(key for key in evaluations[0] if "/avg@" in key)
        terminal.say(f"{key.removeprefix('eval/')}: {evaluations[0][key]:.3f} before, {evaluations[-1][key]:.3f} after", "bold green")
    terminal.say(f"run folder: {directory}  (metrics.jsonl, rollouts/, config.yaml; the trained model is in hf/)")
