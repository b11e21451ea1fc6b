"""Everything that can be found wrong before processes meet or weights are read."""

from __future__ import annotations

from megatron_srpo.checkpoint.resume import check_run_folder
from megatron_srpo.config import Config, ConfigError
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.qwen3 import check_layout, transformer_config, uses_transformer_engine
from megatron_srpo.rollout.collect import encode_prompt
from megatron_srpo.rollout.dump import step_file
from megatron_srpo.runtime.parallel import data_parallel_size
from megatron_srpo.runtime.processes import rank_from_environment, world_size_from_environment
from megatron_srpo.tasks import create_task


def preflight(config: Config) -> HFFolder:
    """Check the configuration against the model folder, the processes and the disk; returns the folder. Raises ConfigError."""
    folder = HFFolder(config.model.hf_path)
    check_layout(folder.architecture, config)
    data_parallel_size(config.parallel, world_size_from_environment())
    uses_transformer_engine(config)
    transformer_config(folder.architecture, config)
    folder.file_of, folder.tokenizer  # noqa: B018  (both check what they read)
    task = create_task(config.task.name, config.train.seed)
    for number in range(config.rollout.prompts_per_step):
        encode_prompt(task.prompt("train", number), folder, config.rollout)
    if rank_from_environment() == 0:
        check_run_folder(config, folder.architecture)
    if config.rollout.replay is not None:
        for step in range(1, config.train.steps + 1):
            if not step_file(config.rollout.replay, step).is_file():
                raise ConfigError(
                    f"rollout.replay: {step_file(config.rollout.replay, step)} is missing, but train.steps is {config.train.steps}"
                )
    return folder
