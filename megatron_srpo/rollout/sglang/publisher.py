"""The first rank's part: the servers, and every version of the weights brought to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.sglang.capabilities import Capabilities, inspect
from megatron_srpo.rollout.sglang.fleet import Fleet, Launch, Member, check_version
from megatron_srpo.rollout.sglang.http import Server, ServerFailed
from megatron_srpo.rollout.sglang.publication import Broadcast, Disk, SharedMemory, Transport, Update


class Publisher:
    """Keeps the fleet and updates it. `device`: where the stream's tensors are."""

    def __init__(
        self,
        config: Config,
        folder: HFFolder,
        urls: list[str],
        launch: Launch | None,
        device: torch.device,
        say: Callable,
    ):
        self.settings, self.folder, self.say = config.rollout, folder, say
        self.fleet = Fleet(urls, self.settings.sglang, launch, say)
        self.capabilities: dict[str, Capabilities] = {}
        self._disk = Disk(folder, config.logging.dir / "servers" / "weights", self._on_disk)
        self._transport = self._transport_for(config, device)
        self._version: str | None = None  # the last one published
        self._released: dict[
            Server, int
        ] = {}  # servers without their memory, by incarnation: another one has it

    def inspect(self) -> None:
        """Look at every server once all are there.

        Raises ConfigError for what one cannot do or for one that is not there.
        """
        for member in self.fleet.members:
            if member.state == "given up":
                raise ConfigError(
                    f"rollout.servers: server {member.number} could not be started: {member.why}"
                )
            try:
                self.capabilities[member.server.url] = inspect(member.server, self.settings, self.folder)
            except ServerFailed as failure:
                raise ConfigError(f"rollout.engine: {failure}") from None
        versions = sorted({found.version for found in self.capabilities.values()})
        self.say(
            f"SGLang {', '.join(versions)} on {len(self.capabilities)} servers; weights by {self.settings.sglang.update}"
        )
        if not self.is_seeded:
            self.say(
                "the servers draw with seeds of their own (but for --enable-deterministic-inference): no two runs are alike"
            )

    @property
    def is_seeded(self) -> bool:
        """Whether all servers keep to sampling_seed."""
        return all(found.is_seeded for found in self.capabilities.values())

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> str | None:
        """Bring every server to `version`, waiting for those that are being restarted. Consumes `tensors`.

        Returns what is wrong when the first update has not left the same weights everywhere.
        """
        self.fleet.go_on()
        self.fleet.wait(self.settings.sglang.return_timeout)
        self.fleet.renew(None)
        update = self._update(self.fleet.reachable(), version)
        found = update.each(Server.version)
        for server in [server for server, had in found.items() if self._version not in (None, had)]:
            server.incarnation += (
                1  # others have started it anew: another process, though it is where the old one was
            )
        before = update.each(_checksum) if self._version is None else {}
        self._send(update, tensors, self._transport)
        problem = (
            self._compare(before, update.each(_checksum), version)
            if self._version is None and not update.missed
            else None
        )
        self._version = version
        self._settle(update)
        return problem

    def needs_disk(self) -> bool:
        """Whether a server that missed the last update could load it, were it on disk."""
        if self.fleet.newest is not None:
            return False
        if self.fleet.launch is None:
            return any(
                member.state in ("behind", "out") and _answers(member.server) for member in self.fleet.members
            )
        return any(member.state not in ("ready", "given up") for member in self.fleet.members)

    def publish_through_disk(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """The last version once more, for those that missed it. Consumes `tensors`."""
        update = self._update(
            [member for member in self.fleet.reachable() if member.state != "ready"], version
        )
        self._send(update, tensors, self._disk)
        self._settle(update)

    def release_memory(self) -> None:
        """Servers give their GPU memory away until the next publication, and are paused: a token would touch
        what is not there.
        """
        self.fleet.hold_back()
        update = self._update([member for member in self.fleet.reachable() if member.state != "out"], "")
        update.pause()
        update.each(
            lambda server: server.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
        )
        self._released = {server: server.incarnation for server in update.live}
        for server, reason in update.failures.items():
            self.fleet.complain(server.url, reason, is_lie=False)
        update.close()
        self.fleet.hold_back()  # those that failed are gone, too

    def close(self) -> None:
        """Stop our servers."""
        if isinstance(self._transport, Broadcast):
            self._transport.close()
        self.fleet.close()

    def _transport_for(self, config: Config, device: torch.device) -> Transport:
        settings, dtype = self.settings.sglang, model_dtype(config.model)
        elements = sum(
            torch.Size(shape).numel() for shape in self.folder.architecture.tensor_shapes().values()
        )
        limit = min(settings.bucket_mib * 2**20, elements * dtype.itemsize)
        if settings.update == "disk":
            return self._disk
        if settings.update == "tensor":
            return SharedMemory(limit, device, self._tensor_parallel_size)
        return Broadcast(
            limit,
            device,
            settings.trainer_host,
            settings.update_timeout,
            self._tensor_parallel_size,
            self.say,
        )

    def _tensor_parallel_size(self, server: Server) -> int:
        return self.capabilities[server.url].tensor_parallel_size

    @property
    def _needs_session(self) -> bool:
        return any(found.needs_session for found in self.capabilities.values())

    def _on_disk(self, path: Path, version: str) -> None:
        self.fleet.renew((path, version))

    def _update(self, members: Iterable[Member], version: str) -> Update:
        return Update(
            [member.server for member in members],
            version,
            self._needs_session,
            lambda server: self._resume(server, "kv_cache"),
        )

    def _send(self, update: Update, tensors: Iterable[tuple[str, Tensor]], transport: Transport) -> None:
        update.each(lambda server: self._resume(server, "weights"))
        transport.send(update, tensors)
        self._released = {}
        update.each(lambda server: None if server in update.missed else check_version(server, update.version))

    def _resume(self, server: Server, what: str) -> None:
        """A server that gave memory away takes it back."""
        if self._released.get(server) == server.incarnation:
            server.post("/resume_memory_occupation", {"tags": [what]})

    def _settle(self, update: Update) -> None:
        """Tell the fleet who has the weights, and who failed."""
        for member in self.fleet.members:
            if member.server in update.live and member.server not in update.missed:
                self.fleet.updated(member)
        for server, reason in update.failures.items():
            self.fleet.complain(server.url, reason, is_lie=False)
        update.close()

    def _compare(
        self, before: dict[Server, str | None], after: dict[Server, str | None], version: str
    ) -> str | None:
        """What the checksums of the first update give away, or None.

        Version "0" is the start model, which ours held before.
        """
        by_size: dict[int, dict[str, str]] = {}
        for server, checksum in after.items():
            if checksum is not None:
                by_size.setdefault(self._tensor_parallel_size(server), {})[server.url] = checksum
        if different := [checksums for checksums in by_size.values() if len(set(checksums.values())) > 1]:
            return (
                f"after the first update, servers hold different weights, by their checksums: {different[0]}"
            )
        is_same = self.fleet.launch is not None and version == "0"
        changed = [
            server.url for server, checksum in after.items() if is_same and checksum != before.get(server)
        ]
        return (
            f"the first update changed the start model's weights on {', '.join(changed)}, by their checksums"
            if changed
            else None
        )


def _checksum(server: Server) -> str | None:
    """One of all the server's weights; None where it offers none."""
    try:
        return server.post("/weights_checker", {"action": "checksum"}).get("per_engine_checksum")
    except ServerFailed:
        return None


def _answers(server: Server) -> bool:
    try:
        server.version()
    except ServerFailed:
        return False
    return True
