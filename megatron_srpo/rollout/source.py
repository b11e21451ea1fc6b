"""Where a step's groups come from: an engine fed with the policy's weights, or a folder of dumped steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.data.records import Group
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.drawing import Drawing, Drawn
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.rollout.ledger import Ledger
from megatron_srpo.rollout.replay import replay
from megatron_srpo.tasks import evaluation_tasks, training_tasks
from megatron_srpo.tasks.mixture import Mixture
from megatron_srpo.tasks.pool import Pool


class Rollouts:
    """`collector` is None when replaying: then nothing is sampled, published or evaluated. `evaluated`: tasks
    by name.

    With `rollout.async_steps: 1` the batch of the next step is sampled, by a thread, while a step trains: by
    weights one version older.
    """

    def __init__(
        self, config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None], watch: Stopwatch
    ):
        settings = config.rollout
        self.config, self.folder, self.layout, self.watch = config, folder, layout, watch
        self.version, self.collector, self.drawn = "0", None, Drawn([], {})
        self.ledger = Ledger(
            config.logging.dir / "ledger", layout, keeps_samples=config.checkpoint.save_interval > 0
        )
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._ahead: Future[Drawn] | None = None
        if settings.replay is None:
            engine = create_engine(config, folder, layout, say)
            trained = training_tasks(config)
            self.evaluated = evaluation_tasks(config) if config.evaluation.every > 0 else {}
            mixture = Mixture(trained, {source.name: source.weight for source in config.task.sources})
            verifiers = Pool(
                {name: task.verifier for name, task in {**trained, **self.evaluated}.items()}, config.task
            )
            self.collector = Collector(verifiers, engine, folder, layout, settings)
            self.drawing = Drawing(config, self.collector, mixture.prompt, self.ledger, layout)

    def collect(self, step: int) -> list[Group]:
        """This rank's share of the step's verified groups.

        Raises ConfigError for a dumped step that does not fit.
        """
        if self.collector is None:
            return self._replay(step)
        ahead, self._ahead = self._ahead, None
        self.drawn = self.drawing.draw(step, self.version, self.watch) if ahead is None else ahead.result()
        if self.config.rollout.async_steps and step < self.config.train.steps:
            self._ahead = self._thread.submit(self.drawing.draw, step + 1, self.version)
        return self.drawn.groups

    def settle(self) -> None:
        """Wait until nothing is being sampled.

        Raises what went wrong there: other ranks may wait for this one's part.
        """
        if self._ahead is not None:
            self._ahead.result()

    def publish(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """The policy's weights to the engine, as version `step`; all ranks together.

        The stream is left alone when replaying.
        """
        with self.watch("rollout"):
            self.settle()
        self.version = str(step)
        if self.collector is not None:
            self.collector.engine.update_weights(tensors, self.version)

    def make_room(self) -> None:
        """With rollout.colocated: the engine's memory is the trainer's until weights are published. All ranks
        together, when all have their groups.
        """
        if self.collector is not None and self.config.rollout.colocated:
            self.collector.engine.release_memory()

    @property
    def next_prompt(self) -> int:
        """The first training prompt that belongs to none of the steps trained so far."""
        return 0 if self.collector is None else self.drawing.place(int(self.version) + 1)

    def go_on(self, step: int, next_prompt: int) -> None:
        """As after `step`; what came later is taken back."""
        self.ledger.resume(step)
        if self.collector is not None:
            self.drawing.go_on(step + 1, next_prompt)

    def close(self) -> None:
        """Let go of the engine and of the verifiers."""
        self._thread.shutdown()
        self.ledger.close()
        if self.collector is not None:
            self.collector.engine.close()
            self.collector.verifiers.close()

    def _replay(self, step: int) -> list[Group]:
        settings = self.config.rollout
        groups = replay(settings.replay, step, settings.samples_per_prompt, self.folder)
        if len(groups) != settings.prompts_per_step:
            raise ConfigError(
                f"rollout.replay: step {step} holds {len(groups)} groups; rollout.prompts_per_step is {settings.prompts_per_step}"
            )
        self.ledger.drawn(step, self.version, [group[0].prompt.id for group in groups])
        return groups[self.layout.rank :: self.layout.world_size]
