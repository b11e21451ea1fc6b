"""The driver: one training step reads as the paper's Algorithm 1."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.config import Config, ConfigError, save_config
from megatron_srpo.evaluate import evaluate
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.qwen3 import check_layout, model_dtype, transformer_config, uses_transformer_engine
from megatron_srpo.observe.metrics import MetricsFile, rollout_metrics, update_metrics
from megatron_srpo.observe.terminal import Terminal
from megatron_srpo.records import Group
from megatron_srpo.rollout.collect import Collector, encode_prompt, exchange
from megatron_srpo.rollout.dump import dump, replay, step_file
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.transformers_engine import TransformersEngine
from megatron_srpo.runtime.parallel import (
    Layout,
    data_parallel_size,
    initialize,
    rank_from_environment,
    shut_down,
    world_size_from_environment,
)
from megatron_srpo.runtime.trainer import Trainer, UpdateReport
from megatron_srpo.tasks import create_task
from megatron_srpo.weights.transfer import save_hf


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


def preflight(config: Config) -> HFFolder:
    """Everything that can be found wrong before processes meet or weights are read. Raises ConfigError."""
    folder = HFFolder(config.model.hf_path)
    check_layout(folder.architecture, config)
    data_parallel_size(config.parallel, world_size_from_environment())
    uses_transformer_engine(config)
    transformer_config(folder.architecture, config)
    folder.file_of, folder.tokenizer  # noqa: B018  (both check what they read)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > folder.architecture.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest}, but the model's max_position_embeddings is"
            f" {folder.architecture.max_position_embeddings}"
        )
    task = create_task(config.task.name, config.train.seed)
    for number in range(config.rollout.prompts_per_step):
        encode_prompt(task.prompt("train", number), folder, config.rollout)
    directory = config.logging.dir
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and rank_from_environment() == 0:
        raise ConfigError(f"logging.dir: {directory.resolve()} is not empty; a run needs a folder of its own")
    if config.rollout.replay is not None:
        for step in range(1, config.train.steps + 1):
            if not step_file(config.rollout.replay, step).is_file():
                raise ConfigError(
                    f"rollout.replay: {step_file(config.rollout.replay, step)} is missing, but train.steps is {config.train.steps}"
                )
    return folder


class Stopwatch:
    """Seconds of each phase of a step, and the phase's name on the terminal."""

    def __init__(self, terminal: Terminal):
        self.terminal, self.seconds = terminal, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.terminal.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """seconds and seconds_<phase> since the last reading."""
        phases = ("rollout", "verify", "teacher", "update", "publish")
        row = {f"seconds_{name}": self.seconds.pop(name, 0.0) for name in phases}
        return {"seconds": sum(row.values()), **row}


class Rollouts:
    """Where groups come from: an engine that samples and is fed the policy's weights, or a folder of dumped steps."""

    def __init__(self, config: Config, folder: HFFolder, layout: Layout):
        settings = config.rollout
        self.config, self.folder, self.layout = config, folder, layout
        self.version, self.collector = "0", None
        if settings.replay is None:
            engine = TransformersEngine(folder, layout.device, model_dtype(config), settings.batch_size)
            task = create_task(config.task.name, config.train.seed)
            self.collector = Collector(task, engine, folder, layout, settings)
        self.sampling = Sampling(settings.temperature, settings.top_p, settings.max_response_tokens, folder.stop_ids)

    def collect(self, step: int, watch: Stopwatch) -> list[Group]:
        """This rank's share of the step's verified groups; all of them when replaying."""
        settings = self.config.rollout
        if self.collector is None:
            with watch("rollout"):
                groups = replay(settings.replay, step, settings.samples_per_prompt, self.folder)
            if len(groups) != (expected := settings.prompts_per_step):
                raise ConfigError(f"rollout.replay: step {step} holds {len(groups)} groups; rollout.prompts_per_step is {expected}")
            return groups[self.layout.rank :: self.layout.world_size]
        with watch("rollout"):
            prompts = self.collector.prompts("train", (step - 1) * settings.prompts_per_step, settings.prompts_per_step)
            groups = self.collector.sample(prompts, settings.samples_per_prompt, self.sampling, f"{self.config.train.seed}/{step}")
        with watch("verify"):
            return self.collector.verify(groups)

    def publish(self, trainer: Trainer, step: int) -> None:
        """The policy's weights to the engine, as version `step`; all ranks together."""
        self.version = str(step)
        if self.collector is not None:
            self.collector.engine.update_weights(trainer.export(), self.version)

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out prompts with the weights published last."""
        return evaluate(self.collector, self.config.evaluation, self.config.rollout.max_response_tokens, self.config.train.seed)


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
        trainer = Trainer(config, folder, layout)
        rollouts = Rollouts(config, folder, layout)
        watch = Stopwatch(terminal)
        evaluations = _loop(config, trainer, rollouts, watch, metrics, terminal)
        terminal.phase("export")
        save_hf(trainer.export(), folder, directory / "hf", write=is_first)
        _say_goodbye(terminal, evaluations, directory)
    metrics.close()
    return directory


def _loop(config: Config, trainer: Trainer, rollouts: Rollouts, watch: Stopwatch, metrics: MetricsFile, terminal: Terminal) -> list[dict]:
    evaluations: list[dict] = []
    skipped_in_a_row = 0

    def evaluate_after(step: int) -> None:
        terminal.phase("evaluate")
        start = time.perf_counter()
        row = {"step": step, **rollouts.evaluate(), "seconds_evaluate": time.perf_counter() - start}
        evaluations.append(row)
        metrics.write(row)
        terminal.evaluation(row)

    evaluates = config.evaluation.every > 0 and rollouts.collector is not None
    if config.evaluation.every > 0 and not evaluates:
        terminal.say("replaying: there is no engine, so there are no evaluations", "yellow")
    rollouts.publish(trainer, 0)
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
                " (train.max_skipped_updates); the weights are those of the last finite update"
            )
        if evaluates and (step % config.evaluation.every == 0 or step == config.train.steps):
            evaluate_after(step)
    return evaluations


def _step(config: Config, trainer: Trainer, rollouts: Rollouts, watch: Stopwatch, step: int) -> tuple[list[Group], str, UpdateReport]:
    """Algorithm 1 of arXiv 2604.02288, once. Returns all ranks' groups, the version that sampled them, and the update's report."""
    version = rollouts.version
    groups = rollouts.collect(step, watch)
    with watch("verify"):
        groups = route_groups(
            groups,
            config.algorithm,
            encode=lambda messages: rollouts.folder.encode(messages, config.rollout.enable_thinking),
            max_teacher_prompt_tokens=config.teacher.max_prompt_tokens,
            seed=f"{config.train.seed}/{step}",
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
        rollouts.publish(trainer, step)
    return groups, version, report


def _say_goodbye(terminal: Terminal, evaluations: list[dict], directory: Path) -> None:
    if evaluations:
        key = next(key for key in evaluations[0] if "/avg@" in key)
        terminal.say(f"{key.removeprefix('eval/')}: {evaluations[0][key]:.3f} before, {evaluations[-1][key]:.3f} after", "bold green")
    terminal.say(f"run folder: {directory}  (metrics.jsonl, rollouts/, config.yaml; the trained model is in hf/)")
