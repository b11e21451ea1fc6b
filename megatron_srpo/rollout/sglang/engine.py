"""SGLang servers as the run's engine. The first rank manages and updates them; all ranks sample."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Event

from torch import Tensor

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import CompletionStream, EngineFailed, Request, Sampling
from megatron_srpo.rollout.servers.generation import Generation
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang.api import SGLangAPI
from megatron_srpo.rollout.sglang.publisher import Publisher
from megatron_srpo.rollout.sglang.server import SGLangServer, launch_of
from megatron_srpo.rollout.sglang.settings import SGLangSettings

# seconds between the ranks' exchanges while servers start, which may exceed a collective's timeout
_HEARTBEAT = 1.0


def check(config: Config, trains: bool) -> None:
    """Check settings and ports (see rollout/engines.py)."""
    settings, minutes = config.rollout.section(SGLangSettings), config.logging.watchdog_minutes
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        variable = settings.api_key_env
        raise ConfigError(f"rollout.sglang.api_key_env: the environment variable {variable} is not set")
    if trains and minutes is not None and settings.update_timeout >= 60 * minutes:
        raise ConfigError(
            f"logging.watchdog_minutes: {minutes:g} minutes would end a run that waits for"
            f" rollout.sglang.update_timeout ({settings.update_timeout:g} s); set more"
        )
    launch = launch_of(config)
    if launch is not None:
        launch.check(config.rollout.servers)


def create(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> "SGLangEngine":
    """Create the engine, and the run's servers on the first rank (see rollout/engines.py)."""
    launch = launch_of(config)
    urls = [url.rstrip("/") for url in config.rollout.urls]
    if launch is not None:
        urls = launch.urls(config.rollout.servers)
    publisher = None
    if layout.rank == 0:
        weights = config.logging.dir / "servers" / "weights"
        dtype = model_dtype(config.model)
        publisher = Publisher(config.rollout, folder, urls, launch, layout.device, dtype, weights, say)
        if launch is not None:
            say(f"starting {len(urls)} SGLang servers (output: {launch.logs})")
    return SGLangEngine(config.rollout, folder, layout, urls, publisher)


@dataclass(eq=False)
class SGLangEngine:
    """`Engine` on SGLang servers, created by all ranks. Raises ConfigError for unusable servers."""

    settings: RolloutSection
    folder: HFFolder
    layout: Layout
    urls: Sequence[str]  # of all servers
    publisher: Publisher | None  # manages the servers; on the first rank only

    def __post_init__(self) -> None:
        settings, layout = self.settings, self.layout
        self.sglang = settings.section(SGLangSettings)
        vocab_size = self.folder.architecture.vocab_size
        try:
            is_seeded = self._wait_for_servers()
            problems = layout.gather_json(find_unreachable(self.urls, settings, layout.rank))
            for problem in problems:
                if problem is not None:
                    raise ConfigError(f"{problem} (rollout.sglang.host, rollout.urls)")
        except BaseException:
            self.close()
            raise
        self.generation = Generation(
            SGLangAPI(vocab_size, is_seeded, renormalises=settings.top_p < 1),
            self.urls,
            self.sglang,
            vocab_size=vocab_size,
            rank=layout.rank,
            world_size=layout.world_size,
            report_failure=self._report_failure,
            no_server_reason=self._no_server_reason,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Yield completions of the servers (see `Generation.generate`)."""
        return self.generation.generate(requests, sampling, stop)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Publish `tensors`; iterate over them again, to disk, for servers that missed the update."""
        self.generation.start_publication(version)
        invalid = self.layout.gather_json(self.generation.invalid_replies())
        problem, needs_disk = None, False
        if self.publisher is not None:
            for url, reason in {url: reason for part in invalid for url, reason in part.items()}.items():
                self.publisher.fleet.report_failure(url, reason, is_invalid=True)
            problem = self.publisher.publish(tensors, version)
            needs_disk = self.publisher.needs_disk()
        else:
            _consume(tensors)
        problem, needs_disk = self.layout.broadcast((problem, needs_disk))
        if problem is not None:
            raise EngineFailed(problem)
        if needs_disk:
            if self.publisher is not None:
                self.publisher.publish_through_disk(tensors, version)
            else:
                _consume(tensors)
        states = self.publisher.fleet.states() if self.publisher is not None else None
        self.generation.end_publication(self.layout.broadcast(states))

    def release_memory(self) -> None:
        """Free the servers' GPU memory until the next update, with rollout.colocated."""
        if self.settings.colocated:
            if self.publisher is not None:
                self.publisher.release_memory()
            self.layout.broadcast(None)  # no rank may use the memory before it is free

    def close(self) -> None:
        """Stop the servers of the run, and leave external ones."""
        if self.publisher is not None:
            self.publisher.close()

    def _wait_for_servers(self) -> bool:
        """Wait until all servers have started, and check them; return True if they use our seeds."""
        while self.layout.broadcast(self.publisher is not None and self.publisher.fleet.is_starting()):
            beat()  # start_timeout ends this wait
            time.sleep(_HEARTBEAT)
        problem, is_seeded = None, False
        if self.publisher is not None:
            try:
                self.publisher.inspect()
                is_seeded = self.publisher.is_seeded
            except ConfigError as error:
                problem = str(error)
        problem, is_seeded = self.layout.broadcast((problem, is_seeded))
        if problem is not None:
            raise ConfigError(problem)
        return is_seeded

    def _report_failure(self, url: str, reason: str, is_invalid: bool) -> None:
        # only the first rank can act at once; it gets others' invalid replies at publications
        if self.publisher is not None:
            self.publisher.fleet.report_failure(url, reason, is_invalid)

    def _no_server_reason(self, seconds: float) -> str | None:
        if self.publisher is not None and (reason := self.publisher.fleet.failed()) is not None:
            return reason
        limit = self.sglang.return_timeout
        if self.settings.servers:
            limit = (1 + self.sglang.max_restarts) * self.sglang.start_timeout
        return f"none has recovered in {limit:g} s" if seconds > limit else None


def find_unreachable(urls: Sequence[str], settings: RolloutSection, rank: int) -> str | None:
    """Return why this rank cannot reach a server (127.0.0.1 is each rank's own host), or None."""
    sglang = settings.section(SGLangSettings)
    name = sglang.api_key_env
    place = f"rank {rank} on {socket.gethostname()}"
    if name is not None and not os.environ.get(name):
        return f"rollout.sglang.api_key_env: {place} does not have the environment variable {name}"
    for url in urls:
        try:
            SGLangServer(url, sglang).version()
        except ServerFailed as failure:
            return f"rollout.engine: {place} cannot reach a server: {failure}"
    return None


def _consume(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take part in the collectives that make each tensor, which only the first rank uses."""
    for _ in tensors:
        pass
