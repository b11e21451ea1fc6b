"""The engine for OpenAI-compatible completions servers (experimental; api.py lists what they must support).

Weights are published on disk: a Hugging Face folder in the run folder, which the servers must see under the
same path, and a POST to rollout.openai.reload_path of each server. Without that key the servers keep their
weights: sample and eval work if these are the weights of model.hf_path, and train is refused.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor
from typing_extensions import override

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import CompletionStream, EngineFailed, Request, Sampling
from megatron_srpo.rollout.openai.api import OpenAICompletions
from megatron_srpo.rollout.openai.settings import OpenAISettings
from megatron_srpo.rollout.servers.generation import Generation
from megatron_srpo.rollout.servers.http import Server, ServerFailed
from megatron_srpo.rollout.servers.replies import MALFORMED
from megatron_srpo.weights.transfer import save_hf


def check(config: Config, trains: bool) -> None:
    """Raise ConfigError for a missing API key, or reload_path if weights must be sent to the servers."""
    settings = config.rollout.section(OpenAISettings)
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        variable = settings.api_key_env
        raise ConfigError(f"rollout.openai.api_key_env: the environment variable {variable} is not set")
    if settings.reload_path is None and trains:
        needed = "train needs it, the call that makes a server load new weights"
        rest = "without it only sample, eval and replay are possible"
        raise ConfigError(f"rollout.openai.reload_path: {needed}; {rest}")
    if settings.reload_path is None and config.evaluation.checkpoint is not None:
        raise ConfigError("rollout.openai.reload_path: evaluation.checkpoint needs it to send its weights")


def create(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> "OpenAIEngine":
    """Create the engine (see rollout/engines.py)."""
    weights = config.logging.dir / "servers" / "weights"
    settings = config.rollout.section(OpenAISettings)
    engine = OpenAIEngine(settings, config.rollout.urls, folder, layout, weights)
    say(f"{len(config.rollout.urls)} OpenAI-compatible servers (experimental), model {engine.model}")
    return engine


class OpenAIServer(Server):
    """A server that loads weights on a configured call (rollout.openai.reload_path)."""

    settings: OpenAISettings

    def model(self) -> str:
        """Return rollout.openai.model, or the only model if it is null. Raises ConfigError if not listed."""
        try:
            names = [str(row["id"]) for row in self.get("/v1/models").get("data", [])]
        except ServerFailed as failure:
            raise ConfigError(f"rollout.urls: {failure}") from None
        except MALFORMED as error:
            raise ConfigError(f"rollout.urls: {self.url}/v1/models: unexpected format: {error}") from None
        wanted = self.settings.model
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None or wanted not in names:
            raise ConfigError(f"rollout.openai.model: {wanted!r}, but {self.url} lists {', '.join(names)}")
        return wanted

    @override
    def load(self, folder: Path, version: str) -> None:
        assert self.settings.reload_path is not None
        values = {"{path}": str(folder.resolve()), "{version}": version}
        self.post(self.settings.reload_path, _filled(self.settings.reload_body, values))


@dataclass(eq=False)
class OpenAIEngine:
    """`Engine` on OpenAI-compatible servers, created by all ranks. Raises ConfigError for unusable ones."""

    settings: OpenAISettings
    urls: Sequence[str]
    folder: HFFolder
    layout: Layout
    weights: Path  # folder for published weights; holds at most two versions

    def __post_init__(self) -> None:
        settings, layout = self.settings, self.layout
        self.servers = [OpenAIServer(url, settings) for url in self.urls]
        names = {server.model() for server in self.servers}
        if len(names) > 1:
            raise ConfigError(f"rollout.urls: the servers serve different models: {', '.join(sorted(names))}")
        self.model = names.pop()
        vocab_size = self.folder.architecture.vocab_size
        self.generation = Generation(
            OpenAICompletions(self.model, vocab_size, weights_change=settings.reload_path is not None),
            [server.url for server in self.servers],
            settings,
            vocab_size=vocab_size,
            rank=layout.rank,
            world_size=layout.world_size,
            report_failure=lambda url, reason, is_invalid: None,
            no_server_reason=self._no_server_reason,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Yield completions of the servers (see `Generation.generate`)."""
        return self.generation.generate(requests, sampling, stop)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Save the weights on disk and let every server load them. Raises EngineFailed if none can."""
        self.generation.start_publication(version)
        failures: dict[str, str | None] = {server.url: None for server in self.servers}
        if self.settings.reload_path is not None:
            path = self.weights / f"version_{version}"
            if self.layout.rank == 0:
                old = sorted(self.weights.glob("*"), key=lambda folder: folder.stat().st_mtime)
                for folder in old[:-1]:
                    shutil.rmtree(folder, ignore_errors=True)
            save_hf(tensors, self.folder, path, write=self.layout.rank == 0)
            if self.layout.rank == 0:
                failures = self._load(path, version)
        failures = self.layout.broadcast(failures)
        if all(failures.values()):
            raise EngineFailed(f"no server has loaded weight version {version}: {failures}")
        self.generation.end_publication(failures)

    def release_memory(self) -> None:
        """Do nothing: rollout.colocated is refused for these servers."""

    def close(self) -> None:
        """Do nothing: the servers keep running."""

    def _load(self, path: Path, version: str) -> dict[str, str | None]:
        failures: dict[str, str | None] = {}
        for server in self.servers:
            try:
                server.load(path, version)
                failures[server.url] = None
            except ServerFailed as failure:
                failures[server.url] = str(failure)
            beat()
        return failures

    def _no_server_reason(self, seconds: float) -> str | None:
        limit = self.settings.return_timeout
        return f"none has recovered in {limit:g} s" if seconds > limit else None


def _filled(value: Any, values: dict[str, str]) -> Any:
    """Return the JSON value with every key of `values` replaced in its strings."""
    if isinstance(value, dict):
        return {key: _filled(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, values) for inner in value]
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace(name, text)
    return value
