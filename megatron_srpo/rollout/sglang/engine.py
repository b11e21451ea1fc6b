"""SGLang servers as the run's engine. The first rank keeps and updates them, every rank asks them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import EngineFailed, Finished, Request, Sampling
from megatron_srpo.rollout.sglang.fleet import Launch
from megatron_srpo.rollout.sglang.generation import Generation
from megatron_srpo.rollout.sglang.http import Server, ServerFailed
from megatron_srpo.rollout.sglang.publisher import Publisher

# seconds between the ranks' exchanges while servers start, which may last longer than a collective may
_HEARTBEAT = 1.0


def launch_of(config: Config) -> Launch | None:
    """How the servers of `config` are started; None when others run them."""
    settings = config.rollout
    if not settings.servers:
        return None
    dtype, logs = str(model_dtype(config.model)).removeprefix("torch."), config.logging.dir / "servers"
    return Launch(
        settings.sglang, config.model.hf_path, dtype, torch.cuda.is_available(), settings.colocated, logs
    )


def check_settings(config: Config) -> None:
    """What can be found wrong with the servers before anything starts. Raises ConfigError."""
    settings = config.rollout.sglang
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        raise ConfigError(
            f"rollout.sglang.api_key_env: the environment variable {settings.api_key_env} is not set"
        )
    if (launch := launch_of(config)) is not None:
        launch.check(config.rollout.servers)


class SGLangEngine:
    """See `Engine`. All ranks make one and update it together; each generates and closes on its own.

    Raises ConfigError when the servers cannot be started, or cannot do what the run needs.
    """

    def __init__(self, config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]):
        self.settings, self.layout, launch = config.rollout, layout, launch_of(config)
        urls = [url.rstrip("/") for url in self.settings.urls] or launch.urls(self.settings.servers)
        self.publisher = (
            Publisher(config, folder, urls, launch, layout.device, say) if layout.rank == 0 else None
        )
        try:
            is_seeded = self._meet_servers()
            if problems := [
                problem for problem in self._gather(self._unreachable(urls)) if problem is not None
            ]:
                raise ConfigError(f"{problems[0]} (rollout.sglang.host, rollout.urls)")
        except BaseException:
            self.close()
            raise
        self.generation = Generation(
            urls=urls,
            settings=self.settings.sglang,
            vocab_size=folder.architecture.vocab_size,
            rank=layout.rank,
            world_size=layout.world_size,
            is_seeded=is_seeded,
            complain=self._complain,
            hopeless=self._hopeless,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> None:
        """See `Engine.generate`. Raises EngineFailed when no server is left, or none can answer a request."""
        if requests:
            self.generation.generate(requests, sampling, finished)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """See `Engine.update_weights`; all ranks together. `tensors` can be iterated again, and is, when
        servers missed the update.

        Raises EngineFailed when the first update has not left the same weights on all servers.
        """
        self.generation.start_publication(version)
        lies = self._gather(self.generation.lies())
        problem, needs_disk = None, False
        if self.publisher is not None:
            for url, reason in {url: reason for part in lies for url, reason in part.items()}.items():
                self.publisher.fleet.complain(url, reason, is_lie=True)
            problem = self.publisher.publish(tensors, version)
            needs_disk = self.publisher.needs_disk()
        else:
            _consume(tensors)
        problem, needs_disk = self._from_first((problem, needs_disk))
        if problem is not None:
            raise EngineFailed(problem)
        if needs_disk:
            if self.publisher is not None:
                self.publisher.publish_through_disk(tensors, version)
            else:
                _consume(tensors)
        self.generation.end_publication(self._from_first(self.publisher and self.publisher.fleet.states()))

    def release_memory(self) -> None:
        """rollout.colocated: the servers' GPU memory is the trainer's until the next update. All ranks
        together, when all have their samples; nothing without rollout.colocated.
        """
        if self.settings.colocated:
            if self.publisher is not None:
                self.publisher.release_memory()
            self._from_first(None)  # nobody goes on before the memory is there

    def close(self) -> None:
        """Stop our servers."""
        if self.publisher is not None:
            self.publisher.close()

    def _meet_servers(self) -> bool:
        """Wait until all servers are there and have been looked at.

        Whether they keep to seeds, on every rank.
        """
        if self.publisher is not None and self.settings.servers:
            self.publisher.say(
                f"starting {self.settings.servers} SGLang servers (output: {self.publisher.fleet.launch.logs})"
            )
        while self._from_first(self.publisher is not None and self.publisher.fleet.is_starting()):
            beat()  # start_timeout ends this wait
            time.sleep(_HEARTBEAT)
        problem = None
        try:
            if self.publisher is not None:
                self.publisher.inspect()
        except ConfigError as error:
            problem = str(error)
        problem, is_seeded = self._from_first(
            (problem, self.publisher is not None and self.publisher.is_seeded)
        )
        if problem is not None:
            raise ConfigError(problem)
        return is_seeded

    def _unreachable(self, urls: Sequence[str]) -> str | None:
        """Why this rank cannot ask one of the servers, or None.

        What the first rank calls 127.0.0.1 is another host to others.
        """
        name = self.settings.sglang.api_key_env
        place = f"rank {self.layout.rank} on {socket.gethostname()}"
        if name is not None and not os.environ.get(name):
            return f"rollout.sglang.api_key_env: {place} does not have the environment variable {name}"
        for url in urls:
            server = Server(url, self.settings.sglang)
            try:
                server.version()
            except ServerFailed as failure:
                return f"rollout.engine: {place} cannot reach a server: {failure}"
            finally:
                server.close()
        return None

    def _complain(self, url: str, reason: str, is_lie: bool) -> None:
        """Only the first rank can do something at once.

        It sees for itself what does not answer, and hears of lies at publications.
        """
        if self.publisher is not None:
            self.publisher.fleet.complain(url, reason, is_lie)

    def _hopeless(self, seconds: float) -> str | None:
        if self.publisher is not None and (why := self.publisher.fleet.given_up()) is not None:
            return why
        settings = self.settings.sglang
        limit = (
            (1 + settings.max_restarts) * settings.start_timeout
            if self.settings.servers
            else settings.return_timeout
        )
        return f"none has come back in {limit:g} s" if seconds > limit else None

    def _gather(self, mine: Any) -> list[Any]:
        """What every rank has, by rank, through JSON."""
        return [json.loads(part) for part in self.layout.gather_bytes(json.dumps(mine).encode())]

    def _from_first(self, value: Any) -> Any:
        """What the first rank has."""
        return self._gather(value)[0]


def _consume(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take part in making each tensor, for the first rank."""
    for _ in tensors:
        pass
