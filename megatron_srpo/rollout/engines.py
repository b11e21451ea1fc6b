"""Which engine samples, by `rollout.engine`."""

from __future__ import annotations

from collections.abc import Callable

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Engine
from megatron_srpo.rollout.transformers_engine import TransformersEngine


def check_engine(config: Config) -> None:
    """What can be found wrong with the engine before anything starts. Raises ConfigError."""
    if config.rollout.engine == "sglang":
        from megatron_srpo.rollout.sglang.engine import check_settings

        check_settings(config)


def create_engine(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    """The engine, without weights yet; all ranks together. `say`: tells the user, on the first rank."""
    if config.rollout.engine == "sglang":
        from megatron_srpo.rollout.sglang.engine import SGLangEngine

        return SGLangEngine(config, folder, layout, say)
    return TransformersEngine(folder, layout.device, model_dtype(config.model), config.rollout.batch_size)
