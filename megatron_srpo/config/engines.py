"""The rollout engines by name: their settings, and the facts that planner and checks need about each.

An engine is a folder of megatron_srpo/rollout with two modules: `settings`, with a subclass of EngineSettings
that registers itself under its `name`, and `engine` (see rollout/engines.py). The configuration's schema
contains the settings of all engines, so this module imports every `settings`; they import only from `config`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from megatron_srpo.config.base import Section

if TYPE_CHECKING:
    from megatron_srpo.config.rollout_section import RolloutSection


class EngineSettings(Section):
    """Settings of one engine: section `rollout.<name>`, which exists if the subclass has fields.

    Attributes:
        name: The value of rollout.engine.
        summary: Short text for the description of rollout.engine.
        in_process: Every rank holds a copy of the model; otherwise rollout.urls or rollout.servers sample.
        renormalises: Under top_p its log-probabilities are those of the tokens that may be sampled, not of
            the complete softmax; None: depends on the servers.
        starts_servers: The run can start servers (rollout.servers) and share their GPUs (rollout.colocated).
    """

    registered: ClassVar[dict[str, type[EngineSettings]]] = {}
    name: ClassVar[str]
    summary: ClassVar[str]
    in_process: ClassVar[bool] = False
    renormalises: ClassVar[bool | None] = False
    starts_servers: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" in vars(cls):
            cls.registered[cls.name] = cls

    @property
    def gpus_per_server(self) -> int:
        """Number of GPUs per server, for `srpo plan`."""
        return 1

    def check(self, rollout: RolloutSection) -> None:
        """Raise ValueError ("rollout.key: problem") if the rollout section contradicts these settings."""


class ServerSettings(EngineSettings):
    """Settings for requesting completions from servers. Request counts are totals over all ranks."""

    api_key_env: str | None = Field(
        default=None, description="name of the environment variable that holds the servers' API key"
    )
    concurrency: int = Field(default=512, gt=0, description="requests in flight, over all ranks")
    retries: int = Field(default=4, ge=0, description="retries of a failed request")
    request_timeout: float = Field(default=1800, gt=0, description="timeout of a request in seconds")
    health_timeout: float = Field(default=30, gt=0, description="timeout of a health check in seconds")
    return_timeout: float = Field(
        default=180, ge=0, description="seconds to wait for restarting servers, or until any is available"
    )
    update_timeout: float = Field(
        default=300,
        gt=0,
        description="timeout in seconds of each call that publishes weights; keep it below"
        " logging.watchdog_minutes",
    )


def is_loopback(host: str) -> bool:
    """Return True if an address or host name refers only to this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _discover() -> dict[str, type[EngineSettings]]:
    folder = Path(__file__).parent.parent / "rollout"
    for module in pkgutil.iter_modules([str(folder)]):
        if module.ispkg and (folder / module.name / "settings.py").exists():
            importlib.import_module(f"megatron_srpo.rollout.{module.name}.settings")
    return EngineSettings.registered


ENGINES = _discover()
ENGINE_SECTIONS = {name: engine for name, engine in ENGINES.items() if engine.model_fields}
