"""The first rank's part: the servers, and every version of the weights brought to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


class Publisher:
    """Keeps the fleet and updates it.

    Args:
        settings: section `rollout`.
        folder: the model's architecture and tokenizer.
        urls: of all servers.
        launch: starts them; None if they are external.
        device: of the published tensors.
        dtype: of the published tensors.
        weights: folder for weights that go by disk.
        say: prints a line for the user.
    """

    def __init__(
        self,
        settings: RolloutSection,
        folder: HFFolder,
        urls: Sequence[str],
        launch: SGLangLaunch | None,
        device: torch.device,
        dtype: torch.dtype,
        weights: Path,
        say: Callable[[str], None],
    ):
        self.settings = settings
        self.folder = folder
        self.device = device
        shapes = folder.architecture.tensor_shapes().values()
        self._model_bytes = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
        self.say = say
        self.fleet = Fleet([SGLangServer(url, settings.sglang) for url in urls], launch, say)
        self.capabilities: dict[str, Capabilities] = {}
        self.disk = Disk(
            folder, weights, lambda path, version: self.fleet.weights_changed(Weights(path, version))
        )
        self.transport = self.transport_for(settings)
        self._version: str | None = None  # published last
        self.released: dict[SGLangServer, int] = {}  # without memory: by incarnation, as a new one has it

    def inspect(self) -> None:
        """Check every server once all have started.

        Raises ConfigError for a missing server and for what one cannot do.
        """
        for handle in self.fleet.handles:
            if handle.state == "failed":
                raise ConfigError(
                    f"rollout.servers: server {handle.number} could not be started: {handle.reason}"
                )
            try:
                self.capabilities[handle.server.url] = inspect(handle.server, self.settings, self.folder)
            except ServerFailed as failure:
                raise ConfigError(f"rollout.engine: {failure}") from None
        versions = ", ".join(sorted({found.version for found in self.capabilities.values()}))
        way = self.settings.sglang.update
        self.say(f"SGLang {versions} on {len(self.capabilities)} servers; weights by {way}")
        if not self.is_seeded:
            self.say(
                "sampling is not reproducible: start the servers with --enable-deterministic-inference to use"
                " our seeds"
            )

    @property
    def is_seeded(self) -> bool:
        """True if all servers use sampling_seed."""
        return all(found.is_seeded for found in self.capabilities.values())

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> str | None:
        """Bring every server to `version`, after waiting for those that restart. Consumes `tensors`.

        Returns what is wrong if the first update has not left the same weights everywhere.
        """
        self.fleet.allow_starts()
        self.fleet.wait(self.settings.sglang.return_timeout)
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
        self._settle(update)
        return problem

    def forget(self) -> None:
        """Treat the next update as the first one: its checksums are compared."""
        self._version = None

    def needs_disk(self) -> bool:
        """Return True if a server that missed the last update could load it, were it on disk."""
        if self.fleet.newest is not None:
            return False
        handles = self.fleet.handles
        if self.fleet.launch is not None:
            return any(handle.state not in ("ready", "failed") for handle in handles)
        missed = [handle for handle in handles if handle.state in ("outdated", "quarantined")]
        return any(_answers(handle.server) for handle in missed)

    def publish_through_disk(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Publish the last version again, for servers that missed it. Consumes `tensors`."""
        handles = [handle for handle in self.fleet.reachable() if handle.state != "ready"]
        update = self._update(handles, version)
        self._send(update, tensors, self.disk)
        self._settle(update)

    def release_memory(self) -> None:
        """Release the servers' GPU memory until the next publication, and pause them meanwhile."""
        self.fleet.forbid_starts()
        handles = [handle for handle in self.fleet.reachable() if handle.state != "quarantined"]
        update = self._update(handles, "")
        update.pause()  # a token would touch memory that is not there
        update.each(
            lambda server: server.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
        )
        self.released = {server: server.incarnation for server in update.live}
        self._report(update)
        self.fleet.forbid_starts()  # waits for those that failed

    def close(self) -> None:
        """Stop our servers."""
        if isinstance(self.transport, Broadcast):
            self.transport.close()
        self.fleet.close()

    def transport_for(self, settings: RolloutSection) -> Transport:
        """Return the way of rollout.sglang.update."""
        sglang = settings.sglang
        if sglang.update == "disk":
            return self.disk
        limit = min(sglang.bucket_mib * 2**20, self._model_bytes)
        if sglang.update == "tensor":
            return SharedMemory(limit, self.device, self._tensor_parallel_size)
        return Broadcast(
            limit,
            self.device,
            sglang.trainer_host,
            sglang.update_timeout,
            self._tensor_parallel_size,
            self.say,
        )

    def _tensor_parallel_size(self, server: SGLangServer) -> int:
        return self.capabilities[server.url].tensor_parallel_size

    def _update(self, handles: Iterable[ServerHandle[SGLangServer]], version: str) -> Update:
        return Update(
            [handle.server for handle in handles],
            version,
            any(found.needs_session for found in self.capabilities.values()),
            lambda server: self._take_back(server, "kv_cache"),
        )

    def _send(self, update: Update, tensors: Iterable[tuple[str, Tensor]], transport: Transport) -> None:
        update.each(lambda server: self._take_back(server, "weights"))
        transport.send(update, tensors)
        self.released = {}
        update.each(lambda server: None if server in update.missed else server.check_version(update.version))

    def _take_back(self, server: SGLangServer, what: str) -> None:
        """Make a server allocate memory that it has released."""
        if self.released.get(server) == server.incarnation:
            server.post("/resume_memory_occupation", {"tags": [what]})

    def _settle(self, update: Update) -> None:
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
        """Return what the checksums of the first update say is wrong, or None.

        Version "0" is the start model, which servers of the run hold before.
        """
        by_size: dict[int, dict[str, str]] = {}
        for server, checksum in after.items():
            if checksum is not None:
                by_size.setdefault(self._tensor_parallel_size(server), {})[server.url] = checksum
        for checksums in by_size.values():
            if len(set(checksums.values())) > 1:
                return (
                    f"after the first update, servers hold different weights, by their checksums: {checksums}"
                )
        if self.fleet.launch is None or version != "0":
            return None
        changed = [server.url for server, checksum in after.items() if checksum != before.get(server)]
        if not changed:
            return None
        return (
            f"the first update changed the start model's weights on {', '.join(changed)}, by their checksums"
        )


def _checksum(server: SGLangServer) -> str | None:
    """Return one checksum of all the server's weights; None where it offers none."""
    try:
        return server.post("/weights_checker", {"action": "checksum"}).get("per_engine_checksum")
    except ServerFailed:
        return None


def _answers(server: SGLangServer) -> bool:
    try:
        server.version()
    except ServerFailed:
        return False
    return True
