"""The engine named by `rollout.engine`: `check` and `create` of module `engine` in that folder.

An engine is one folder: `settings.py` (see config/engines.py) and `engine.py`, found by the folder's name.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Engine


def check_engine(config: Config, trains: bool) -> None:
    """Check settings before anything starts; raise ConfigError. trains: weights change every step."""
    _module(config).check(config, trains)


def create_engine(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    """Create the engine, without weights yet. A collective call. say: prints on the first rank."""
    return _module(config).create(config, folder, layout, say)


def _module(config: Config) -> ModuleType:
    return importlib.import_module(f"megatron_srpo.rollout.{config.rollout.engine}.engine")
