"""Where a step's groups come from: an engine fed with the policy's weights, or a folder of dumped steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from megatron_srpo.config import Config, ConfigError
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.qwen3 import model_dtype
from megatron_srpo.records import Group
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.dump import replay
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.ledger import Ledger
from megatron_srpo.rollout.transformers_engine import TransformersEngine
from megatron_srpo.runtime.parallel import Layout
from megatron_srpo.tasks import evaluation_tasks, training_tasks
from megatron_srpo.tasks.mixture import Mixture
from megatron_srpo.tasks.pool import Pool


class Rollouts:
    """`collector` is None when replaying: then nothing is sampled, published or evaluated. `evaluated`: tasks by name.

    next_prompt: the number of the first training prompt not yet drawn.
    """

    def __init__(self, config: Config, folder: HFFolder, layout: Layout):
        settings = config.rollout
        self.config, self.folder, self.layout = config, folder, layout
        self.version, self.collector, self.next_prompt = "0", None, 0
        self.ledger = Ledger(config.logging.dir / "ledger", layout, keeps_samples=config.checkpoint.save_interval > 0)
        if settings.replay is None:
            engine = TransformersEngine(folder, layout.device, model_dtype(config), settings.batch_size)
            trained, self.evaluated = training_tasks(config), evaluation_tasks(config)
            self.mixture = Mixture(trained, {source.name: source.weight for source in config.task.sources})
            verifiers = Pool({name: task.verifier for name, task in {**trained, **self.evaluated}.items()}, config.task)
            self.collector = Collector(verifiers, engine, folder, layout, settings)
        self.sampling = Sampling(settings.temperature, settings.top_p, settings.max_response_tokens, folder.stop_ids)

    def collect(self, step: int) -> list[Group]:
        """This rank's share of the step's groups. Raises ConfigError for a dumped step that does not fit."""
        settings, count = self.config.rollout, self.config.rollout.prompts_per_step
        if self.collector is None:
            groups = replay(settings.replay, step, settings.samples_per_prompt, self.folder)
            if len(groups) != count:
                raise ConfigError(f"rollout.replay: step {step} holds {len(groups)} groups; rollout.prompts_per_step is {count}")
            self.ledger.drawn(step, self.version, [group[0].prompt.id for group in groups])
            return groups[self.layout.rank :: self.layout.world_size]
        numbers = range(self.next_prompt, self.next_prompt + count)
        self.next_prompt += count
        self.ledger.drawn(step, self.version, [self.mixture.prompt(number).id for number in numbers])
        return self.collector.sample(
            self.collector.prompts(self.mixture.prompt, numbers),
            settings.samples_per_prompt,
            self.sampling,
            seed=f"{self.config.train.seed}/{step}",
            kept=self.ledger.kept(step, self.version),
            keep=lambda sample: self.ledger.keep(step, sample),
        )

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Every sample with its verdict; dumped samples keep theirs."""
        return list(groups) if self.collector is None else self.collector.verify(groups)

    def publish(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """The policy's weights to the engine, as version `step`; all ranks together. The stream is left alone when replaying."""
        self.version = str(step)
        if self.collector is not None:
            self.collector.engine.update_weights(tensors, self.version)
