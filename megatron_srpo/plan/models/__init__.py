"""The config.json of published models, so that the planner knows them by name."""

import json
from pathlib import Path
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.families import architecture_of
from megatron_srpo.model.hf_folder import HFFolder

_FILES = {f"Qwen/{file.stem}": file for file in Path(__file__).parent.glob("*.json")}
PUBLISHED = tuple(sorted(_FILES))


def published_config(name: str) -> dict[str, Any]:
    """Return the config.json of a model in PUBLISHED."""
    return json.loads(_FILES[name].read_text(encoding="utf-8"))


def planned_architecture(path: Path) -> Architecture:
    """Return the architecture of model.hf_path: a folder with a config.json, or a name in PUBLISHED."""
    if not path.exists() and path.as_posix() in PUBLISHED:
        return architecture_of(published_config(path.as_posix()))
    if not path.is_dir():
        expected = f"a folder with a config.json, or one of {', '.join(PUBLISHED)}"
        raise ConfigError(f"model.hf_path: {path} is neither a folder nor a known model; expected {expected}")
    return HFFolder(path).architecture
