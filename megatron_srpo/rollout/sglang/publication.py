"""One update of the weights on several servers: pause → begin → send → end → continue; three ways to send.

The stream of tensors is always consumed to its end: other ranks take part in making each tensor.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import shutil
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, uint8
from torch.distributed import distributed_c10d
from torch.multiprocessing import reductions

from megatron_srpo.config.schema import is_loopback
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang.server import SGLangServer
from megatron_srpo.weights.transfer import save_hf

Stream = Iterable[tuple[str, Tensor]]
Result = TypeVar("Result")
_REFUSAL = 0.01  # seconds in which a server that does not take a broadcast says so


class Update:
    """One update of several servers at once. A server that fails is left out of what follows.

    Args:
        servers: to be updated.
        version: of the weights.
        needs_session: the servers want begin and end around tensors.
        before_resume: called for each server before it resumes sampling.

    Attributes:
        live: servers that have not failed.
        failures: the reason of each that has.
        missed: live servers that the failure of another one has kept from the update.
    """

    def __init__(
        self,
        servers: Sequence[SGLangServer],
        version: str,
        needs_session: bool,
        before_resume: Callable[[SGLangServer], Any] = lambda server: None,
    ):
        self.version = version
        self.needs_session = needs_session
        self.before_resume = before_resume
        self.live = list(servers)
        self.failures: dict[SGLangServer, str] = {}
        self.missed: set[SGLangServer] = set()
        self._pool = ThreadPoolExecutor(max(1, len(servers)), "publication")

    def begin(self, call: Callable[[SGLangServer], Result]) -> dict[Future[Result], SGLangServer]:
        """Start `call` for every live server, without waiting."""
        return {self._pool.submit(call, server): server for server in self.live}

    def end(self, calls: dict[Future[Result], SGLangServer]) -> dict[SGLangServer, Result]:
        """Wait for the calls. Returns the results of the servers that are still live."""
        results = {}
        for call, server in calls.items():
            try:
                results[server] = call.result()
                beat()
            except ServerFailed as failure:
                self.fail(server, str(failure))
        return {server: result for server, result in results.items() if server in self.live}

    def each(self, call: Callable[[SGLangServer], Result]) -> dict[SGLangServer, Result]:
        """Run `call` for every live server in parallel. Returns the results."""
        return self.end(self.begin(call))

    def fail(self, server: SGLangServer, reason: str) -> None:
        """Leave the server out of what follows."""
        if server in self.live:
            self.live.remove(server)
            self.failures[server] = reason

    def pause(self) -> None:
        """Pause generation; new requests wait."""
        self.each(lambda server: server.post("/pause_generation", {"mode": "retract"}))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause running requests, which continue with the new weights: their spans name both versions."""
        self.pause()
        try:
            yield
        finally:
            self.each(self.before_resume)
            for server in self.failures:  # an external one must not stay paused
                with contextlib.suppress(ServerFailed):
                    server.post("/continue_generation", {}, timeout=2)
            self.each(lambda server: server.post("/continue_generation", {}))

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Open a session: between begin and end, servers take tensors (needed from SGLang 0.5.21 on)."""
        if self.needs_session:
            self.each(lambda server: server.post("/begin_weight_update", {}))
        yield
        if self.needs_session:
            self.each(lambda server: server.post("/end_weight_update", {}))

    def close(self) -> None:
        self._pool.shutdown(wait=False)


class Transport(Protocol):
    """How tensors get to servers."""

    def send(self, update: Update, tensors: Stream) -> None:
        """Consume the stream and update the live servers. `update` records failures."""


class Disk:
    """Through a Hugging Face folder in `directory`, which servers must see under the same path.

    Args:
        reference: the model.
        directory: holds at most two versions.
        on_disk: called with folder and version when the folder is complete.
    """

    def __init__(self, reference: HFFolder, directory: Path, on_disk: Callable[[Path, str], None]):
        self.reference = reference
        self.directory = directory
        self.on_disk = on_disk

    def send(self, update: Update, tensors: Stream) -> None:
        path = self.directory / f"version_{update.version}"
        folders = sorted(self.directory.glob("*"), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-1]:  # a server that restarts may be reading the last one
            shutil.rmtree(old, ignore_errors=True)
        save_hf(tensors, self.reference, path, write=True)
        self.on_disk(path, update.version)
        with update.paused():
            update.each(lambda server: server.load(path, update.version))


class Entry(NamedTuple):
    """Bytes start … end - 1 of a bucket are this tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Bucket(NamedTuple):
    """Tensors of one dtype, one behind the other. data: uint8 [bytes]."""

    data: Tensor
    entries: list[Entry]
    is_last: bool

    def version(self, version: str) -> str | None:
        """What a server is told with it: a server that has not got everything must not call itself
        `version`.
        """
        return version if self.is_last else None


def buckets(
    tensors: Stream, limit: int, allocate: Callable[[int], Tensor], memories: int = 1
) -> Iterator[Bucket]:
    """The stream in pieces of at most `limit` bytes; a larger tensor is a piece of its own.

    memories: places where the pieces lie in turn; a piece is gone when so many others have been made after
    it.
    allocate: makes such a place, uint8 [bytes]; once each, but for larger tensors.
    """
    buffers, entries, used = deque([torch.empty(0, dtype=uint8)] * memories), list[Entry](), 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if entries and (used + size > limit or tensor.dtype != entries[0].dtype):
            yield Bucket(buffers[0][:used], entries, is_last=False)
            buffers.rotate()
            entries, used = [], 0
        if used + size > len(buffers[0]):  # only ever with an empty bucket
            buffers[0] = allocate(max(limit, size))
        buffers[0][used : used + size].copy_(tensor.detach().reshape(-1).view(uint8))
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), used, used + size))
        used += size
    if entries:
        yield Bucket(buffers[0][:used], entries, is_last=True)


class SharedMemory:
    """Through memory that servers of this machine map: CUDA's IPC, or /dev/shm on CPUs. limit: bytes a
    bucket.
    """

    def __init__(self, limit: int, device: torch.device, tensor_parallel_size: Callable[[SGLangServer], int]):
        self.limit, self.device, self.tensor_parallel_size = limit, device, tensor_parallel_size

    def send(self, update: Update, tensors: Stream) -> None:
        """See `Transport`."""
        # A server answers when its first worker has copied a bucket; the others have when it takes the next
        # one.
        memories = 1 + (
            self.device.type == "cuda"
            and any(self.tensor_parallel_size(server) > 1 for server in update.live)
        )
        with update.paused(), update.session(), _named_files():
            for bucket in buckets(tensors, self.limit, self._allocate, memories):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                update.each(lambda server, bucket=bucket: self._post(server, bucket, update.version))

    def _allocate(self, size: int) -> Tensor:
        """Shared from the start on a CPU: sharing what is filled would copy it."""
        memory = torch.empty(size, dtype=uint8, device=self.device)
        return memory if self.device.type == "cuda" else memory.share_memory_()

    def _post(self, server: SGLangServer, bucket: Bucket, version: str) -> None:
        # every reader needs a handle of its own: they are counted
        handles = [_pickled(bucket) for _ in range(self.tensor_parallel_size(server))]
        body = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", "flush_cache": True}
        server.post("/update_weights_from_tensor", {**body, "weight_version": bucket.version(version)})


class _Handle:
    """Pickles as the tensor does, but for a GPU's number, which may be another one's to the reader: its
    UUID, as SGLang takes it.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self):
        rebuild, arguments = reductions.reduce_tensor(self.tensor)
        if not self.tensor.is_cuda:
            return rebuild, arguments
        before, number, after = arguments[:6], arguments[6], arguments[7:]
        return rebuild, (*before, str(torch.cuda.get_device_properties(number).uuid), *after)


def _pickled(bucket: Bucket) -> str:
    """A handle to the bucket as SGLang's allow-list of pickled types lets it in."""
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=entry.dtype,
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in bucket.entries
    ]
    return base64.b64encode(
        ForkingPickler.dumps({"flattened_tensor": _Handle(bucket.data), "metadata": metadata})
    ).decode()


@contextlib.contextmanager
def _named_files() -> Iterator[None]:
    """Memory is shared through files with a name, which can be told over HTTP; a descriptor cannot.

    For all threads alike.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class Broadcast:
    """Through a process group of this process (rank 0) and all servers, NCCL on GPUs, gloo on CPUs.

    host: this process's address as servers see it. limit: bytes a bucket. timeout: seconds for each
    broadcast.
    """

    def __init__(
        self,
        limit: int,
        device: torch.device,
        host: str | None,
        timeout: float,
        tensor_parallel_size: Callable[[SGLangServer], int],
        say: Callable[[str], None],
    ):
        self.limit, self.device, self.host, self.timeout = limit, device, host, timeout
        self.tensor_parallel_size, self.say = tensor_parallel_size, say
        self._group: dist.ProcessGroup | None = None
        self._name, self._members = "", dict[SGLangServer, int]()  # each with its incarnation

    def send(self, update: Update, tensors: Stream) -> None:
        """See `Transport`. When one server fails, the group is broken, and the others miss the update."""
        with update.paused(), update.session():
            if self._members != {server: server.incarnation for server in update.live}:
                self.close()
                self._give_up(update, self._meet(update))
            for bucket in buckets(
                tensors, self.limit, lambda size: torch.empty(size, dtype=uint8, device=self.device)
            ):
                if self._group is not None:
                    self._give_up(update, self._broadcast(update, bucket))

    def _give_up(self, update: Update, problem: str | None) -> None:
        """After a problem the group is of no use, and who is live has missed the update."""
        if problem is not None:
            self.close(is_broken=True)
            self.say(f"weights go by disk this time: {problem}")
            update.missed.update(update.live)

    def _meet(self, update: Update) -> str | None:
        """Make the group; what went wrong, or None.

        Nobody is live when it cannot be made: who waits for others does nothing else.
        """
        if not update.live:
            return None
        here = all(is_loopback(server.host) for server in update.live)
        host = self.host or ("127.0.0.1" if here else socket.gethostname())
        timeout, name = datetime.timedelta(seconds=self.timeout), f"srpo-{uuid.uuid4().hex}"
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        backend, offset, offsets = ("nccl" if self.device.type == "cuda" else "gloo"), 1, {}
        for server in update.live:
            offsets[server], offset = offset, offset + self.tensor_parallel_size(server)
        body = {
            "master_address": host,
            "master_port": store.port,
            "world_size": offset,
            "group_name": name,
            "backend": backend,
        }
        calls = update.begin(
            lambda server: server.post("/init_weights_update_group", {**body, "rank_offset": offsets[server]})
        )
        # NCCL ends this process when a broadcast takes longer than its group's time-out: `_broadcast` shall
        # notice before
        patience = timeout + datetime.timedelta(seconds=60) if backend == "nccl" else timeout
        try:
            self._group = _group(store, offset, backend, name, patience)
        except (RuntimeError, ValueError) as error:  # gloo, NCCL and the store say everything with these
            for server in list(update.live):
                update.fail(server, f"the group for weight updates could not be made: {error}")
            return None
        if len(update.end(calls)) < len(
            calls
        ):  # NCCL would wait for its members at the first broadcast, for ever
            return "a server did not join the group"
        self._name, self._members = name, {server: server.incarnation for server in update.live}
        return None

    def _broadcast(self, update: Update, bucket: Bucket) -> str | None:
        """Send one bucket; what went wrong, or None."""
        body = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [entry.shape for entry in bucket.entries],
            **{"group_name": self._name, "load_format": "flattened_bucket", "flush_cache": True},
            "weight_version": bucket.version(update.version),
        }
        calls = update.begin(lambda server: server.post("/update_weights_from_distributed", body))
        # A server that refuses says so at once, and takes part in nothing: who broadcasts then waits for
        # ever.
        if wait(calls, _REFUSAL, FIRST_COMPLETED).done:
            update.end({call: server for call, server in calls.items() if call.done()})
            return "a server refused the update"
        try:
            work, until = self._group.broadcast(bucket.data, 0), time.monotonic() + self.timeout
        except RuntimeError as error:
            return f"a broadcast could not begin: {error}"
        while not work.is_completed():
            if any(call.done() and call.exception() for call in calls):
                update.end({call: server for call, server in calls.items() if call.done()})
                return "a server failed during a broadcast"
            if time.monotonic() > until:
                for server in [server for call, server in calls.items() if not call.done()]:
                    update.fail(
                        server,
                        f"a broadcast took longer than {self.timeout:g} s (rollout.sglang.update_timeout)",
                    )
                return "a broadcast took too long"
            time.sleep(0.0005)
        try:
            work.wait()
        except RuntimeError as error:
            return f"a broadcast failed: {error}"
        update.end(calls)
        return None if len(update.live) == len(self._members) else "a server failed after a broadcast"

    def close(self, is_broken: bool = False) -> None:
        """Leave the group. Servers forget it when they are restarted or meet in another one. is_broken:
        without waiting for what it still does, which for NCCL may be never.
        """
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                if is_broken and self.device.type == "cuda":
                    distributed_c10d._abort_process_group(self._group)
                else:
                    dist.destroy_process_group(self._group)
        self._group, self._members = None, {}


def _group(
    store: dist.Store, size: int, backend: str, name: str, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """This process's end of a group that is no part of the trainer's: made as SGLang makes its end, PyTorch
    has no public way.
    """
    group, _ = distributed_c10d._new_process_group_helper(
        size,
        0,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
