"""The rollout section: engines, their servers, and how a batch is sampled."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_srpo.config.base import Section
from megatron_srpo.config.engines import ENGINES, EngineName, EngineTraits


class ServerSection(Section):
    """How to request completions from servers. Numbers of requests are for all ranks together."""

    key: ClassVar[str]

    api_key_env: str | None = Field(
        default=None, description="name of the environment variable that holds the servers' API key"
    )
    concurrency: int = Field(default=512, gt=0, description="requests running at once")
    retries: int = Field(default=4, ge=0, description="how often a failed request is retried")
    request_timeout: float = Field(default=1800, gt=0, description="seconds until a request counts as failed")
    health_timeout: float = Field(default=30, gt=0, description="seconds a server has for a health check")
    return_timeout: float = Field(
        default=180, ge=0, description="seconds to wait for restarting servers, or for any to sample with"
    )
    update_timeout: float = Field(
        default=300, gt=0, description="seconds for a publication's call; below logging.watchdog_minutes"
    )


class SGLangSection(ServerSection):
    """How to start and update SGLang servers."""

    key: ClassVar[str] = "rollout.sglang"

    python: str = Field(
        default=".venv-sglang/bin/python", description="interpreter with SGLang, for our own servers"
    )
    arguments: tuple[str, ...] = Field(
        default=(), description="added to our servers' command line: [--attention-backend, fa3]"
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="environment variables of our servers, in addition to the trainer's"
    )
    host: str = Field(default="127.0.0.1", description="address our servers listen on")
    port: int = Field(default=30000, gt=1023, lt=65536, description="of our first server; the others' follow")
    tensor_parallel_size: int = Field(default=1, gt=0, description="GPUs of each of our servers")
    base_gpu_id: int = Field(default=0, ge=0, description="first GPU of our first server; the others' follow")
    start_timeout: float = Field(default=900, gt=0, description="seconds a server has to start")
    max_restarts: int = Field(
        default=3, ge=0, description="failed starts in a row after which one of our servers is marked failed"
    )
    update: Literal["disk", "distributed", "tensor"] = Field(
        default="disk",
        description="how servers get weights. disk: files in the run folder, which they must see;"
        " distributed: broadcast (NCCL, gloo on CPUs); tensor: memory shared on one machine's GPUs or CPUs",
    )
    bucket_mib: int = Field(
        default=512, gt=0, description="size of the buckets weights are sent in; a larger tensor has its own"
    )
    trainer_host: str | None = Field(
        default=None, description="update: distributed: the first rank's address; null: loopback or host name"
    )

    @model_validator(mode="after")
    def _not_open_to_the_network(self):
        if not is_loopback(self.host) and self.api_key_env is None:
            key, problem = "rollout.sglang.host", f"{self.host} can be reached from other machines"
            raise ValueError(f"{key}: {problem}; set rollout.sglang.api_key_env")
        return self


def is_loopback(host: str) -> bool:
    """Return True if an address or host name means this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


class OpenAISection(ServerSection):
    """Servers with an OpenAI-compatible /v1/completions that takes and returns token ids (experimental)."""

    key: ClassVar[str] = "rollout.openai"

    model: str | None = Field(
        default=None, description="model name in requests; null: the one a server lists"
    )
    reload_path: str | None = Field(
        default=None,
        pattern="^/",
        description="POST path of each server that loads weights from a folder, such as"
        " /update_weights_from_disk; null: the servers keep their weights, and train is refused",
    )
    reload_body: dict[str, Any] = Field(
        default_factory=lambda: {"model_path": "{path}"},
        description="JSON body of the reload call; {path} and {version} are replaced in its strings",
    )


class RolloutSection(Section):
    engine: EngineName = Field(
        default="transformers",
        description="transformers: its model in this process; sglang: SGLang servers;"
        " openai: servers with a compatible /v1/completions (experimental)",
    )
    urls: tuple[str, ...] = Field(
        default=(), description="URLs of externally managed servers, [http://host:port, …]"
    )
    servers: int = Field(
        default=0, ge=0, description="engine: sglang: servers the first rank starts and stops"
    )
    colocated: bool = Field(
        default=False, description="engine: sglang: servers share the trainer's GPUs, and offload in training"
    )
    sglang: SGLangSection = SGLangSection()
    openai: OpenAISection = OpenAISection()
    prompts_per_step: int = Field(default=32, gt=0)
    samples_per_prompt: int = Field(default=8, gt=0, description="G, the group size")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_prompt_tokens: int = Field(default=2048, gt=0)
    max_response_tokens: int = Field(default=8192, gt=0)
    enable_thinking: bool = Field(default=False, description="passed to the chat template")
    batch_size: int = Field(default=256, gt=0, description="sequences the embedded engine samples at once")
    over_sampling: float = Field(
        default=1.0, ge=1, description="over-sampling factor; partial rollouts continue in the next step"
    )
    dynamic_filtering: bool = Field(
        default=False, description="replace groups without signal (equal rewards and no teacher) by others"
    )
    filter_rounds: int = Field(
        default=4, gt=0, description="rounds of sampling before groups without signal fill the batch"
    )
    max_staleness: int = Field(
        default=1, ge=0, description="versions that a partial rollout may be older than the policy"
    )
    async_steps: Literal[0, 1] = Field(
        default=0, description="1: the next batch is sampled while one trains, by weights one version older"
    )
    logprob_gap_warning: float = Field(
        default=0.05,
        gt=0,
        description="mean |log π_trainer - log π_engine|, nats a token, that raises an alarm;"
        " async_steps adds the policy's move",
    )
    logprob_gap_stop: float | None = Field(
        default=0.5, gt=0, description="… and from which the run stops; null: never"
    )
    replay: Path | None = Field(
        default=None, description="train on this run's dumped rollouts (its folder or rollouts/), no engine"
    )

    @property
    def traits(self) -> EngineTraits:
        return ENGINES[self.engine]

    @model_validator(mode="before")
    @classmethod
    def _refuse_overlap(cls, given: Any) -> Any:
        if isinstance(given, dict) and "overlap" in given:
            raise ValueError("rollout.overlap: is called rollout.async_steps now (0 or 1)")
        return given

    @model_validator(mode="after")
    def _check_engine_keys(self) -> Self:
        if self.traits.in_process and self.urls:
            _refuse_key("urls", self.engine, [name for name in ENGINES if not ENGINES[name].in_process])
        for key in ("servers", "colocated"):
            if getattr(self, key) and not self.traits.starts_servers:
                _refuse_key(key, self.engine, [name for name in ENGINES if ENGINES[name].starts_servers])
        if not self.traits.in_process:
            self._check_servers()
        return self

    def _check_servers(self) -> None:
        if bool(self.urls) == bool(self.servers):
            needed = "urls (externally managed servers)"
            if self.traits.starts_servers:
                needed = f"either {needed} or servers (how many to start)"
            raise ValueError(f"rollout.engine: {self.engine} needs {needed}")
        for url in self.urls:
            if not re.fullmatch(r"https?://[^/?#]+/?", url):
                raise ValueError(f"rollout.urls: {url!r}: expected http://host:port")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("rollout.urls: a server is named twice")
        elsewhere = [url for url in self.urls if not is_loopback(re.split(r"//|[:/]", url)[2])]
        update, port = self.sglang.update, self.sglang.port
        if self.traits.starts_servers and update == "tensor" and elsewhere:
            raise ValueError(
                "rollout.sglang.update: tensor shares memory, but rollout.urls names other machines"
            )
        if self.colocated and self.async_steps:
            raise ValueError(
                "rollout.async_steps: 1 samples while training; rollout.colocated cannot do both"
            )
        if self.colocated and update == "distributed":
            needed = "but rollout.colocated shares them; set tensor"
            raise ValueError(f"rollout.sglang.update: distributed broadcasts between GPUs, {needed}")
        if port + self.servers > 65536:
            raise ValueError(f"rollout.sglang.port: {self.servers} servers from {port} on pass 65535")


def _refuse_key(key: str, engine: str, engines: list[EngineName]) -> None:
    raise ValueError(f"rollout.{key}: needs rollout.engine: {' or '.join(engines)}, not {engine}")
