"""The engine named by `rollout.engine`: module `engine` of the folder with that name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Engine


class EngineModule(Protocol):
    """What the module `engine` of an engine's folder defines."""

    def check(self, config: Config, trains: bool) -> None:
        """Check what can be found wrong before anything starts. Raises ConfigError.

        Args:
            config: the run's configuration.
            trains: False for commands that never update the weights after the first time.
        """

    def create(self, config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
        """Return the engine, still without weights. All ranks together.

        Args:
            config: the run's configuration.
            folder: the model's architecture and tokenizer.
            layout: this rank's place.
            say: prints a line to terminal and log of the first rank.
        """
        ...


def engine_module(config: Config) -> EngineModule:
    module: EngineModule = importlib.import_module(f"megatron_srpo.rollout.{config.rollout.engine}.engine")  # pyright: ignore[reportAssignmentType]
    return module


def check_engine(config: Config, trains: bool) -> None:
    engine_module(config).check(config, trains)


def create_engine(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    return engine_module(config).create(config, folder, layout, say)
