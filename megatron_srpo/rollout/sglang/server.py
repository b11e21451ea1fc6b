"""One SGLang server: its start, its state, and weights from disk."""

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.rollout.servers.fleet import Launch
from megatron_srpo.rollout.servers.http import Server, ServerFailed
from megatron_srpo.rollout.sglang.settings import SGLangSettings


class SGLangServer(Server):
    """`Server` with the HTTP API of SGLang."""

    @override
    def version(self) -> str:
        return str(self.get("/model_info").get("weight_version"))

    @override
    def check_up(self) -> None:
        self.get("/model_info", timeout=2)
        self.get("/health")

    @override
    def load(self, folder: Path, version: str) -> None:
        body = {"model_path": str(folder.resolve()), "weight_version": version, "flush_cache": True}
        self.post("/update_weights_from_disk", body)
        self.check_version(version)

    def check_version(self, version: str) -> None:
        """Raise ServerFailed unless the server reports `version`."""
        found = self.version()
        if found != version:
            raise ServerFailed(f"{self.url} has weight version {found!r} after an update to {version!r}")


@dataclass(frozen=True, kw_only=True)
class SGLangLaunch(Launch):
    """Start SGLang servers with the interpreter rollout.sglang.python."""

    settings: SGLangSettings
    model: Path  # folder of the start model
    dtype: str  # the trainer's
    has_gpus: bool
    saves_memory: bool  # they can release their memory (rollout.colocated)

    def urls(self, count: int) -> list[str]:
        """Return the URLs of `count` servers, as seen from other hosts unless they listen on loopback."""
        host = self.settings.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return [f"http://{host}:{self.settings.port + number}" for number in range(count)]

    @override
    def command(self, number: int) -> list[str]:
        settings, gpus = self.settings, self.settings.tensor_parallel_size
        words = [settings.python, "-m", "sglang.launch_server"]
        words += ["--model-path", str(self.model.resolve()), "--dtype", self.dtype]
        words += ["--host", settings.host, "--port", str(settings.port + number), "--tp-size", str(gpus)]
        if self.has_gpus:
            words += ["--base-gpu-id", str(settings.base_gpu_id + number * gpus)]
        if self.saves_memory:
            words += ["--enable-memory-saver"]
        if self.secret is not None:
            words += ["--api-key", self.secret]
        return [*words, *settings.arguments]

    @override
    def environment(self) -> dict[str, str]:
        # one setting for both sides
        health = {"SGLANG_HEALTH_CHECK_TIMEOUT": str(math.ceil(self.settings.health_timeout))}
        return {**health, **self.settings.environment}

    def check(self, count: int) -> None:
        """Raise ConfigError for a missing interpreter and for ports in use."""
        if not os.access(self.settings.python, os.X_OK):
            problem = f"{self.settings.python} is not an interpreter; set that of an environment with SGLang"
            hint = "bash tools/install_sglang.sh creates one for CPUs"
            raise ConfigError(f"rollout.sglang.python: {problem} ({hint})")
        for number in range(count):
            port = self.settings.port + number
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    needed = f"{count} ports are needed from {self.settings.port} on"
                    raise ConfigError(f"rollout.sglang.port: {port} is in use; {needed}")


def launch_of(config: Config) -> SGLangLaunch | None:
    """Return the launch of the servers of `config`; None if they are external."""
    settings = config.rollout.section(SGLangSettings)
    if not config.rollout.servers:
        return None
    return SGLangLaunch(
        logs=config.logging.dir / "servers",
        start_timeout=settings.start_timeout,
        max_restarts=settings.max_restarts,
        secret=os.environ[settings.api_key_env] if settings.api_key_env else None,
        settings=settings,
        model=config.model.hf_path,
        dtype=str(model_dtype(config.model)).removeprefix("torch."),
        has_gpus=torch.cuda.is_available(),
        saves_memory=config.rollout.colocated,
    )
