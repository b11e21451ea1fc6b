"""The rollout section: the engine and its settings, servers, and how a batch is sampled."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, create_model, model_validator

from megatron_srpo.config.base import Section
from megatron_srpo.config.engines import ENGINE_SECTIONS, ENGINES, EngineSettings

WAVE_BATCHES = 2  # requests that the embedded engine samples together, in units of rollout.batch_size
_Engine = TypeVar("_Engine", bound=EngineSettings)
if TYPE_CHECKING:
    _EngineName = str
else:
    _EngineName = Literal[tuple(ENGINES)]


class _RolloutSection(Section):
    """The keys that all engines share."""

    engine: _EngineName = Field(
        default="transformers",
        description="; ".join(f"{name}: {engine.summary}" for name, engine in ENGINES.items()),
    )
    urls: tuple[str, ...] = Field(
        default=(), description="URLs of externally managed servers, [http://host:port, …]"
    )
    servers: int = Field(
        default=0, ge=0, description="number of servers the first rank starts and stops (engine: sglang)"
    )
    colocated: bool = Field(
        default=False,
        description="servers share the trainer's GPUs and offload during training (engine: sglang)",
    )
    prompts_per_step: int = Field(default=32, gt=0, description="prompts in the batch of one training step")
    samples_per_prompt: int = Field(default=8, gt=0, description="G, the group size")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in the loss as well")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    max_prompt_tokens: int = Field(default=2048, gt=0, description="limit of a prompt in tokens")
    max_response_tokens: int = Field(default=8192, gt=0, description="limit of a response in tokens")
    enable_thinking: bool = Field(default=False, description="passed to the chat template")
    batch_size: int = Field(default=256, gt=0, description="sequences transformers samples at once")
    over_sampling: float = Field(
        default=1.0, ge=1, description="over-sampling factor; partial rollouts continue in the next step"
    )
    dynamic_filtering: bool = Field(
        default=False, description="replace groups without signal (equal rewards and no teacher) by new ones"
    )
    filter_rounds: int = Field(
        default=4, gt=0, description="rounds of sampling before groups without signal fill the batch"
    )
    max_staleness: int = Field(
        default=1, ge=0, description="weight versions by which a partial rollout may lag behind the policy"
    )
    async_steps: Literal[0, 1] = Field(
        default=0, description="1: sample the next batch during training, with weights one version older"
    )
    logprob_gap_warning: float = Field(
        default=0.05,
        gt=0,
        description="mean |log π_trainer - log π_engine|, in nats per token, that raises an alarm;"
        " with async_steps: 1 it includes one update of the policy",
    )
    logprob_gap_stop: float | None = Field(
        default=0.5, gt=0, description="the same gap at which the run stops; null: never"
    )
    replay: Path | None = Field(
        default=None,
        description="run folder (or its rollouts/) whose dumped rollouts are trained on, without an engine",
    )

    @property
    def engine_settings(self) -> EngineSettings:
        """The section of the selected engine."""
        return self.section(ENGINES[self.engine])

    @property
    def nucleus_gap(self) -> float:
        """Nats by which top_p lets a token's log-probability differ from the complete softmax at most."""
        return 0.0 if self.engine_settings.renormalises is False else -math.log(self.top_p)

    def section(self, engine: type[_Engine]) -> _Engine:
        """Return the section of an engine, selected or not."""
        return getattr(self, engine.name, None) or engine()

    @model_validator(mode="before")
    @classmethod
    def _refuse_overlap(cls, given: Any) -> Any:
        if isinstance(given, dict) and "overlap" in given:
            raise ValueError("rollout.overlap: was renamed to rollout.async_steps (0 or 1)")
        return given

    @model_validator(mode="after")
    def _check_engine_keys(self) -> Self:
        if ENGINES[self.engine].in_process and self.urls:
            _refuse_key("urls", self.engine, [name for name in ENGINES if not ENGINES[name].in_process])
        for key in ("servers", "colocated"):
            if getattr(self, key) and not ENGINES[self.engine].starts_servers:
                _refuse_key(key, self.engine, [name for name in ENGINES if ENGINES[name].starts_servers])
        if not ENGINES[self.engine].in_process:
            self._check_servers()
        self.engine_settings.check(self)
        return self

    def _check_servers(self) -> None:
        if bool(self.urls) == bool(self.servers):
            needed = "urls (externally managed servers)"
            if ENGINES[self.engine].starts_servers:
                needed = f"either {needed} or servers (how many to start)"
            raise ValueError(f"rollout.engine: {self.engine} needs {needed}")
        for url in self.urls:
            if "@" in url:  # config.yaml would hold the password
                host = url.rpartition("@")[2]
                needed = f"set rollout.{self.engine}.api_key_env to the name of an environment variable"
                raise ValueError(f"rollout.urls: …@{host}: expected no user and no password; {needed}")
            if not re.fullmatch(r"https?://[^/?#]+/?", url):
                raise ValueError(f"rollout.urls: {url!r}: expected http://host:port")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("rollout.urls: a server is listed twice")
        if self.colocated and self.async_steps:
            raise ValueError(
                "rollout.async_steps: 1 samples while training; rollout.colocated cannot do both"
            )


def _refuse_key(key: str, engine: str, engines: list[str]) -> None:
    raise ValueError(f"rollout.{key}: needs rollout.engine: {' or '.join(engines)}, not {engine}")


if TYPE_CHECKING:
    RolloutSection = _RolloutSection
else:  # with a section for each engine that has settings
    _sections = {name: (engine, engine()) for name, engine in ENGINE_SECTIONS.items()}
    RolloutSection = create_model("RolloutSection", __base__=_RolloutSection, **_sections)
