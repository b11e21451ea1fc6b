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
from megatron_srpo.rollout.transformers_engine import TransformersEngine
from megatron_srpo.runtime.parallel import Layout
from megatron_srpo.tasks import evaluation_tasks, training_tasks
from megatron_srpo.tasks.mixture import Mixture
from megatron_srpo.tasks.pool import Pool


class Rollouts:
    """`collector` is None when replaying: then nothing is sampled, published or evaluated. `evaluated`: tasks by name."""

    def __init__(self, config: Config, folder: HFFolder, layout: Layout):
        settings = config.rollout
        self.config, self.folder, self.layout = config, folder, layout
        self.version, self.collector = "0", None
        if settings.replay is None:
            engine = TransformersEngine(folder, layout.device, model_dtype(config), settings.batch_size)
            trained, self.evaluated = training_tasks(config), evaluation_tasks(config)
            self.mixture = Mixture(trained, {source.name: source.weight for source in config.task.sources})
            verifiers = Pool({name: task.verifier for name, task in {**trained, **self.evaluated}.items()}, config.task)
            self.collector = Collector(verifiers, engine, folder, layout, settings)
        self.sampling = Sampling(settings.temperature, settings.top_p, settings.max_response_tokens, folder.stop_ids)

    def collect(self, step: int) -> list[Group]:
        """This rank's share of the step's groups. Raises ConfigError for a dumped step that does not fit."""
        settings = self.config.rollout
        if self.collector is None:
            groups = replay(settings.replay, step, settings.samples_per_prompt, self.folder)
            if len(groups) != (expected := settings.prompts_per_step):
                raise ConfigError(f"rollout.replay: step {step} holds {len(groups)} groups; rollout.prompts_per_step is {expected}")
            return groups[self.layout.rank :: self.layout.world_size]
        numbers = range((step - 1) * settings.prompts_per_step, step * settings.prompts_per_step)
        prompts = self.collector.prompts(self.mixture.prompt, numbers)
        return self.collector.sample(prompts, settings.samples_per_prompt, self.sampling, f"{self.config.train.seed}/{step}")

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Every sample with its verdict; dumped samples keep theirs."""
        return list(groups) if self.collector is None else self.collector.verify(groups)

    def publish(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """The policy's weights to the engine, as version `step`; all ranks together. The stream is left alone when replaying."""
        self.version = str(step)
        if self.collector is not None:
            self.collector.engine.update_weights(tensors, self.version)
