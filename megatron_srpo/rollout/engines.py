"""The engine named by `rollout.engine`: module `engine` of the folder with that name.

Such a module defines the two functions below, which call it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Engine


def check_engine(config: Config, trains: bool) -> None:
    """Check what can be found wrong before anything starts (`check`). Raises ConfigError.

    trains: False for commands that update the weights once at most.
    """
    _module(config).check(config, trains)


def create_engine(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    """Return the engine, still without weights (`create`). All ranks together.

    say: prints a line to terminal and log of the first rank.
    """
    return _module(config).create(config, folder, layout, say)


def _module(config: Config) -> ModuleType:
    return importlib.import_module(f"megatron_srpo.rollout.{config.rollout.engine}.engine")
