"""The source of a step's groups: an engine with the policy's weights, or a folder of dumped steps."""

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor
from typing_extensions import override

from megatron_srpo.algorithm.routing import has_signal
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, PartialGroup
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.batch import Batch, BatchBuilder
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.rollout.ledger import Ledger, carried_groups
from megatron_srpo.rollout.replay import replay
from megatron_srpo.tasks import Task, evaluation_tasks, training_tasks
from megatron_srpo.tasks.mixture import Mixture
from megatron_srpo.tasks.pool import Pool
from megatron_srpo.tasks.remarks import evaluation_remarks


class Rollouts(Protocol):
    """A source of verified groups. All calls are collective, except `saved` and `close`."""

    metrics: dict[str, float]  # of the last selection of groups, for metrics.jsonl

    def collect(self, step: int) -> list[Group]:
        """Return this rank's share of the step's verified groups. Raises ConfigError, EngineFailed."""
        ...

    def release_memory(self) -> None:
        """Free the engine's GPU memory until weights are published, with rollout.colocated."""

    def publish(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Send the policy's weights to the engine, as version `step`, once no request is in flight."""

    def state(self) -> tuple[int, list[PartialGroup]]:
        """Return the first prompt of the next step, and the groups left over for it."""
        return 0, []

    def resume(self, step: int, next_prompt: int, carried: Path | None) -> None:
        """Restore the `state` after `step`, with left-over groups in `carried`; discard later samples."""

    def saved(self, step: int) -> None:
        """Remove the samples up to `step`, which a checkpoint has. Called on one rank, at any time."""

    def close(self) -> None:
        """Stop engine and verifiers."""


def open_rollouts(
    config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None], watch: Stopwatch
) -> "LiveRollouts | ReplayedRollouts":
    """Create the source of groups for `config`; its engine has no weights yet."""
    settings = config.rollout
    if settings.replay is not None:
        return ReplayedRollouts(settings.replay, settings, folder, layout)
    if settings.top_p < 1 and not settings.engine_settings.renormalises:
        say(_top_p_warning(settings))
    ledger = Ledger(config.logging.dir / "ledger", layout, keeps_samples=config.checkpoint.save_interval > 0)
    engine = create_engine(config, folder, layout, say)
    trained = training_tasks(config)
    evaluated = evaluation_tasks(config) if config.evaluation.every > 0 else {}
    for line in evaluation_remarks(config.evaluation, evaluated, trained):
        say(line)
    verifiers = {name: task.verifier for name, task in {**trained, **evaluated}.items()}
    collector = Collector(Pool(verifiers, config.task), engine, folder, layout, settings)
    mixture = Mixture(trained, {source.name: source.weight for source in config.task.sources})
    is_useful = partial(has_signal, algorithm=config.algorithm, feedback=config.teacher.feedback)
    builder = BatchBuilder(collector, mixture.prompt, ledger, settings, config.train.seed, is_useful)
    last_step_ahead = config.train.steps if settings.async_steps else 0
    return LiveRollouts(builder, watch, last_step_ahead, evaluated)


def _top_p_warning(settings: RolloutSection) -> str:
    unless = "" if settings.engine_settings.renormalises is False else ", unless its servers renormalise them"
    return (
        f"rollout.top_p: {settings.top_p:g} biases training: the log-probabilities of {settings.engine} are"
        f" those of the complete softmax{unless}; a token's importance weight is up to"
        f" {1 / settings.top_p:.2f} times too large ({-math.log(settings.top_p):.3f} nats); set 1"
    )


@dataclass(eq=False)
class LiveRollouts(Rollouts):
    """Groups sampled by an engine with the policy's weights.

    Steps up to `last_step_ahead` (0: none) are sampled by a thread while the step before trains
    (rollout.async_steps: 1), with weights one version older. evaluated: evaluation tasks by name.
    """

    builder: BatchBuilder
    watch: Stopwatch  # counts the seconds of phases `rollout` and `verify`
    last_step_ahead: int = 0
    evaluated: Mapping[str, Task] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.collector = self.builder.collector
        self.metrics = {}
        self._published = 0  # step
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._ahead: Future[Batch] | None = None

    @override
    def collect(self, step: int) -> list[Group]:
        ahead, self._ahead = self._ahead, None
        batch = self.builder.build(step, self.watch) if ahead is None else ahead.result()
        if step < self.last_step_ahead:
            self._ahead = self._thread.submit(self.builder.build, step + 1)
        self.metrics = batch.metrics
        return batch.groups

    @override
    def release_memory(self) -> None:
        self.collector.engine.release_memory()

    @override
    def publish(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        if self._ahead is not None:
            with self.watch("rollout"):
                self._ahead.result()  # raises the thread's error before other ranks wait for this one
        self._published = step
        self.collector.engine.update_weights(tensors, str(step))

    @override
    def state(self) -> tuple[int, list[PartialGroup]]:
        return self.builder.state_before(self._published + 1)

    @override
    def resume(self, step: int, next_prompt: int, carried: Path | None) -> None:
        ledger = self.builder.ledger
        ledger.resume(step)
        if carried is not None and carried.is_file():
            groups = carried_groups(carried.read_text(encoding="utf-8"), str(carried))
        else:
            groups = carried_groups(ledger.carried(step + 1), str(ledger.directory))
        self.builder.resume(step + 1, next_prompt, groups)

    @override
    def saved(self, step: int) -> None:
        self.builder.ledger.saved(step)

    @override
    def close(self) -> None:
        self._thread.shutdown()
        self.builder.ledger.close()
        self.collector.engine.close()
        self.collector.verifiers.close()


@dataclass(eq=False)
class ReplayedRollouts(Rollouts):
    """Groups dumped by another run (rollout.replay). All methods but `collect` do nothing."""

    directory: Path
    settings: RolloutSection
    folder: HFFolder
    layout: Layout
    metrics: dict[str, float] = field(default_factory=dict)

    @override
    def collect(self, step: int) -> list[Group]:
        groups = replay(self.directory, step, self.settings.samples_per_prompt, self.folder)
        if len(groups) != self.settings.prompts_per_step:
            needed = f"rollout.prompts_per_step is {self.settings.prompts_per_step}"
            raise ConfigError(f"rollout.replay: step {step} holds {len(groups)} groups; {needed}")
        return groups[self.layout.rank :: self.layout.world_size]
