"""The first rank's part: manage the servers, and publish every weight version to all of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.servers.fleet import Fleet, ServerHandle, Weights
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang.capabilities import Capabilities, inspect
from megatron_srpo.rollout.sglang.publication import Broadcast, Disk, SharedMemory, Transport, Update
from megatron_srpo.rollout.sglang.server import SGLangLaunch, SGLangServer
from megatron_srpo.rollout.sglang.settings import SGLangSettings


@dataclass(eq=False)
class Publisher:
    """Manage the fleet, and publish weights to it."""

    settings: RolloutSection
    folder: HFFolder
    urls: Sequence[str]  # of all servers
    launch: SGLangLaunch | None  # starts them; None if they are external
    device: torch.device  # of the published tensors
    dtype: torch.dtype  # of the published tensors
    weights: Path  # folder for weights published on disk
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        shapes = self.folder.architecture.tensor_shapes().values()
        self._model_bytes = sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize
        self.sglang = self.settings.section(SGLangSettings)
        servers = [SGLangServer(url, self.sglang) for url in self.urls]
        self.fleet = Fleet(servers, self.launch, self.say)
        self.capabilities: dict[str, Capabilities] = {}
        self.disk = Disk(self.folder, self.weights, self._on_disk)
        self.transport = self.transport_for(self.settings)
        self._version: str | None = None  # published last
        self.released: dict[SGLangServer, int] = {}  # have no memory; by incarnation, as a restarted one has

    def _on_disk(self, path: Path, version: str) -> None:
        self.fleet.weights_changed(Weights(path, version))

    def inspect(self) -> None:
        """Check every server once all have started. Raises ConfigError if one cannot be used."""
        for handle in self.fleet.handles:
            if handle.state == "failed":
                problem = f"server {handle.number} could not be started: {handle.reason}"
                raise ConfigError(f"rollout.servers: {problem}")
            try:
                self.capabilities[handle.server.url] = inspect(handle.server, self.settings, self.folder)
            except ServerFailed as failure:
                raise ConfigError(f"rollout.engine: {failure}") from None
        versions = ", ".join(sorted({found.version for found in self.capabilities.values()}))
        transport = self.sglang.update
        self.say(f"SGLang {versions} on {len(self.capabilities)} servers; weight updates: {transport}")
        if not self.is_seeded:
            hint = "start the servers with --enable-deterministic-inference to use our seeds"
            self.say(f"sampling is not reproducible: {hint}")

    @property
    def is_seeded(self) -> bool:
        """True if every server uses our sampling seeds."""
        return all(found.is_seeded for found in self.capabilities.values())

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> str | None:
        """Send `version` to every server; return the problem that the first update's checksums show."""
        self.fleet.allow_starts()
        self.fleet.wait(self.sglang.return_timeout)
        self.fleet.weights_changed(None)
        update = self._update(self.fleet.reachable(), version)
        is_first = self._version is None
        for server, found in update.each(SGLangServer.version).items():
            if not is_first and found != self._version:
                server.incarnation += 1  # restarted by others: another process at the same URL
        before = update.each(_checksum) if is_first else {}
        self._send(update, tensors, self.transport)
        problem = None
        if is_first and not update.missed:
            problem = self._compare(before, update.each(_checksum), version)
        self._version = version
        self._record(update)
        return problem

    def forget(self) -> None:
        """Treat the next update as the first one: its checksums are compared."""
        self._version = None

    def needs_disk(self) -> bool:
        """Return True if a server missed the last update and can load it once it is on disk."""
        if self.fleet.newest is not None:
            return False
        handles = self.fleet.handles
        if self.fleet.launch is not None:
            return any(handle.state not in ("ready", "failed") for handle in handles)
        missed = [handle for handle in handles if handle.state in ("outdated", "quarantined")]
        return any(_responds(handle.server) for handle in missed)

    def publish_through_disk(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Publish the last version again, for servers that missed it. Consumes `tensors`."""
        handles = [handle for handle in self.fleet.reachable() if handle.state != "ready"]
        update = self._update(handles, version)
        self._send(update, tensors, self.disk)
        self._record(update)

    def release_memory(self) -> None:
        """Release the servers' GPU memory until the next publication, and pause them meanwhile."""
        self.fleet.forbid_starts()
        handles = [handle for handle in self.fleet.reachable() if handle.state != "quarantined"]
        update = self._update(handles, "")
        update.pause()  # generating a token would access released memory
        body = {"tags": ["kv_cache", "weights"]}
        update.each(lambda server: server.post("/release_memory_occupation", body))
        self.released = {server: server.incarnation for server in update.live}
        self._report(update)
        self.fleet.forbid_starts()  # waits for those that failed

    def close(self) -> None:
        """Leave the process group and stop the servers of the run."""
        if isinstance(self.transport, Broadcast):
            self.transport.close()
        self.fleet.close()

    def transport_for(self, settings: RolloutSection) -> Transport:
        """Return the transport for rollout.sglang.update."""
        sglang = settings.section(SGLangSettings)
        if sglang.update == "disk":
            return self.disk
        limit = min(sglang.bucket_mib * 2**20, self._model_bytes)
        if sglang.update == "tensor":
            return SharedMemory(limit, self.device, self._tensor_parallel_size)
        host, timeout = sglang.trainer_host, sglang.update_timeout
        return Broadcast(limit, self.device, host, timeout, self._tensor_parallel_size, self.say)

    def _tensor_parallel_size(self, server: SGLangServer) -> int:
        return self.capabilities[server.url].tensor_parallel_size

    def _update(self, handles: Iterable[ServerHandle[SGLangServer]], version: str) -> Update:
        servers = [handle.server for handle in handles]
        needs_session = any(found.needs_session for found in self.capabilities.values())
        return Update(servers, version, needs_session, lambda server: self._resume_memory(server, "kv_cache"))

    def _send(self, update: Update, tensors: Iterable[tuple[str, Tensor]], transport: Transport) -> None:
        update.each(lambda server: self._resume_memory(server, "weights"))
        transport.send(update, tensors)
        self.released = {}
        update.each(lambda server: None if server in update.missed else server.check_version(update.version))

    def _resume_memory(self, server: SGLangServer, tag: str) -> None:
        if self.released.get(server) == server.incarnation:
            server.post("/resume_memory_occupation", {"tags": [tag]})

    def _record(self, update: Update) -> None:
        """Record in the fleet which servers have the weights, and which failed."""
        for handle in self.fleet.handles:
            if handle.server in update.live and handle.server not in update.missed:
                self.fleet.updated(handle)
        self._report(update)

    def _report(self, update: Update) -> None:
        for server, reason in update.failures.items():
            self.fleet.report_failure(server.url, reason, is_invalid=False)
        update.close()

    def _compare(
        self, before: dict[SGLangServer, str | None], after: dict[SGLangServer, str | None], version: str
    ) -> str | None:
        """Return the problem that checksums show, or None. Servers of the run start with version "0"."""
        by_size: dict[int, dict[str, str]] = {}
        for server, checksum in after.items():
            if checksum is not None:
                by_size.setdefault(self._tensor_parallel_size(server), {})[server.url] = checksum
        for checksums in by_size.values():
            if len(set(checksums.values())) > 1:
                problem = "servers hold different weights, by their checksums"
                return f"after the first update, {problem}: {checksums}"
        if self.fleet.launch is None or version != "0":
            return None
        changed = [server.url for server, checksum in after.items() if checksum != before.get(server)]
        if not changed:
            return None
        where = f"on {', '.join(changed)}, by their checksums"
        return f"the first update changed the start model's weights {where}"


def _checksum(server: SGLangServer) -> str | None:
    """Return one checksum of all the server's weights; None if it offers none."""
    try:
        return server.post("/weights_checker", {"action": "checksum"}).get("per_engine_checksum")
    except ServerFailed:
        return None


def _responds(server: SGLangServer) -> bool:
    try:
        server.version()
    except ServerFailed:
        return False
    return True
