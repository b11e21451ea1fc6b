"""The section rollout.sglang of the configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from megatron_srpo.config.engines import ServerSettings, is_loopback

if TYPE_CHECKING:
    from megatron_srpo.config.rollout_section import RolloutSection


class SGLangSettings(ServerSettings):
    """Settings to start and update SGLang servers."""

    name = "sglang"
    summary = "SGLang servers"
    renormalises = True
    starts_servers = True

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

    @property
    @override
    def gpus_per_server(self) -> int:
        return self.tensor_parallel_size

    @override
    def check(self, rollout: RolloutSection) -> None:
        if any(re.match("--(admin-)?api-key", word) for word in self.arguments):
            needed = "which config.yaml would show; set rollout.sglang.api_key_env"
            raise ValueError(f"rollout.sglang.arguments: found an API key, {needed}")
        elsewhere = [url for url in rollout.urls if not is_loopback(re.split(r"//|[:/]", url)[2])]
        if self.update == "tensor" and elsewhere:
            raise ValueError(
                "rollout.sglang.update: tensor shares memory, but rollout.urls names other machines"
            )
        if rollout.colocated and self.update == "distributed":
            needed = "but rollout.colocated shares them; set tensor"
            raise ValueError(f"rollout.sglang.update: distributed broadcasts between GPUs, {needed}")
        if self.port + rollout.servers > 65536:
            raise ValueError(f"rollout.sglang.port: {rollout.servers} servers from {self.port} on pass 65535")
