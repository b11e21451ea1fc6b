"""One update of the weights on several servers: pause → begin → send → end → continue; three transports.

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
from dataclasses import dataclass
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

from megatron_srpo.config.engines import is_loopback
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang.server import SGLangServer
from megatron_srpo.weights.transfer import save_hf

Stream = Iterable[tuple[str, Tensor]]
Result = TypeVar("Result")
_REFUSAL = 0.01  # seconds within which a server refuses a broadcast


@dataclass(eq=False)
class Update:
    """One update of several servers at once. A server that fails is excluded from later calls."""

    servers: Sequence[SGLangServer]
    version: str
    needs_session: bool  # tensors need a begin and an end call
    before_resume: Callable[[SGLangServer], Any] = lambda server: None  # for each, before it samples again

    def __post_init__(self) -> None:
        self.live = list(self.servers)  # those that have not failed
        self.failures: dict[SGLangServer, str] = {}  # reasons
        self.missed: set[SGLangServer] = set()  # live, but not updated because another one failed
        self._pool = ThreadPoolExecutor(max(1, len(self.servers)), "publication")

    def begin(self, call: Callable[[SGLangServer], Result]) -> dict[Future[Result], SGLangServer]:
        """Start `call` for every live server, without waiting."""
        return {self._pool.submit(call, server): server for server in self.live}

    def end(self, calls: dict[Future[Result], SGLangServer]) -> dict[SGLangServer, Result]:
        """Wait for the calls; return the results of the servers that are still live."""
        results = {}
        for call, server in calls.items():
            try:
                results[server] = call.result()
                beat()
            except ServerFailed as failure:
                self.fail(server, str(failure))
        return {server: result for server, result in results.items() if server in self.live}

    def each(self, call: Callable[[SGLangServer], Result]) -> dict[SGLangServer, Result]:
        """Run `call` for every live server in parallel; return the results."""
        return self.end(self.begin(call))

    def fail(self, server: SGLangServer, reason: str) -> None:
        """Exclude a live server from later calls, for `reason`."""
        if server in self.live:
            self.live.remove(server)
            self.failures[server] = reason

    def pause(self) -> None:
        """Pause all live servers; their running requests wait (mode "retract")."""
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
        """End the threads, without waiting for running calls."""
        self._pool.shutdown(wait=False)


class Transport(Protocol):
    """A way to send tensors to servers."""

    def send(self, update: Update, tensors: Stream) -> None:
        """Consume the stream and update the live servers. `update` records failures."""


@dataclass(eq=False)
class Disk:
    """Transport by a Hugging Face folder in `directory`, which servers see under the same path."""

    reference: HFFolder  # the model
    directory: Path  # holds at most two versions
    on_disk: Callable[[Path, str], None]  # called with folder and version when the folder is complete

    def send(self, update: Update, tensors: Stream) -> None:
        """Save the tensors, and let all live servers load them."""
        path = self.directory / f"version_{update.version}"
        folders = sorted(self.directory.glob("*"), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-1]:  # a server that restarts may be reading the last one
            shutil.rmtree(old, ignore_errors=True)
        save_hf(tensors, self.reference, path, write=True)
        self.on_disk(path, update.version)
        with update.paused():
            update.each(lambda server: server.load(path, update.version))


class Entry(NamedTuple):
    """One tensor's place in a bucket: bytes start … end - 1."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Bucket(NamedTuple):
    """Consecutive tensors of one dtype. data: uint8 [bytes]."""

    data: Tensor
    entries: list[Entry]
    is_last: bool

    def version(self, version: str) -> str | None:
        """Return the version to send with it: None before the last bucket."""
        return version if self.is_last else None


def buckets(
    tensors: Stream, limit: int, allocate: Callable[[int], Tensor], memories: int = 1
) -> Iterator[Bucket]:
    """Cut the stream into buckets of at most `limit` bytes; a larger tensor gets its own bucket.

    `memories` buckets are valid at a time; the next overwrites the oldest. allocate: returns uint8 [bytes].
    """
    buffers, entries, used = deque([torch.empty(0, dtype=uint8)] * memories), list[Entry](), 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if entries and (used + size > limit or tensor.dtype != entries[0].dtype):
            yield Bucket(buffers[0][:used], entries, is_last=False)
            buffers.rotate()
            entries, used = [], 0
        if used + size > len(buffers[0]):  # only while the bucket is empty
            buffers[0] = allocate(max(limit, size))
        buffers[0][used : used + size].copy_(tensor.detach().reshape(-1).view(uint8))
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), used, used + size))
        used += size
    if entries:
        yield Bucket(buffers[0][:used], entries, is_last=True)


@dataclass(eq=False)
class SharedMemory:
    """Transport by memory that servers of this machine map: CUDA IPC, or /dev/shm on CPUs."""

    limit: int  # bytes a bucket
    device: torch.device
    tensor_parallel_size: Callable[[SGLangServer], int]

    def send(self, update: Update, tensors: Stream) -> None:
        """Copy one bucket after another into shared memory; all live servers read each."""
        # a server responds once its first worker has copied a bucket; the others have when it takes the next
        has_workers = any(self.tensor_parallel_size(server) > 1 for server in update.live)
        memories = 2 if self.device.type == "cuda" and has_workers else 1
        with update.paused(), update.session(), _named_files():
            for bucket in buckets(tensors, self.limit, self._allocate, memories):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                update.each(lambda server, bucket=bucket: self._post(server, bucket, update.version))

    def _allocate(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=uint8, device=self.device)
        if self.device.type != "cuda":
            memory.share_memory_()  # sharing it later would copy it
        return memory

    def _post(self, server: SGLangServer, bucket: Bucket, version: str) -> None:
        # a handle for each reader: handles are counted
        handles = [_pickled(bucket) for _ in range(self.tensor_parallel_size(server))]
        body = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", "flush_cache": True}
        server.post("/update_weights_from_tensor", {**body, "weight_version": bucket.version(version)})


class _Handle:
    """A tensor, pickled with the UUID of its GPU, as the reader may number GPUs differently."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self):
        reduced: Any = reductions.reduce_tensor(self.tensor)  # its type depends on the kind of tensor
        rebuild, arguments = reduced
        if not self.tensor.is_cuda:
            return rebuild, arguments
        before, number, after = arguments[:6], arguments[6], arguments[7:]
        return rebuild, (*before, str(torch.cuda.get_device_properties(number).uuid), *after)


def _pickled(bucket: Bucket) -> str:
    """Return a handle to the bucket, of types on SGLang's allow-list for pickles."""
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
    pickled = ForkingPickler.dumps({"flattened_tensor": _Handle(bucket.data), "metadata": metadata})
    return base64.b64encode(pickled).decode()


@contextlib.contextmanager
def _named_files() -> Iterator[None]:
    """Share memory through named files, in all threads: a descriptor cannot be sent over HTTP."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class _BroadcastFailed(Exception):
    """The process group can no longer be used; the message has the reason."""


@dataclass(eq=False)
class Broadcast:
    """Transport by a process group of this process (rank 0) and all servers: NCCL, or gloo on CPUs."""

    limit: int  # bytes a bucket
    device: torch.device
    host: str | None  # this process's address for servers; None: loopback or the host name
    timeout: float  # seconds for each broadcast
    tensor_parallel_size: Callable[[SGLangServer], int]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        self._incarnations: dict[SGLangServer, int] = {}  # of the members

    def send(self, update: Update, tensors: Stream) -> None:
        """Broadcast one bucket after another. If a server fails, all others miss the update."""
        stream = buckets(tensors, self.limit, lambda size: torch.empty(size, dtype=uint8, device=self.device))
        with update.paused(), update.session():
            try:
                if self._incarnations != {server: server.incarnation for server in update.live}:
                    self.close()
                    self._group = self._form_group(update)
                for bucket in stream:
                    if self._group is not None:
                        self._broadcast(self._group, update, bucket)
            except _BroadcastFailed as failure:
                self.close(is_broken=True)
                self.say(f"falling back to disk weight sync: {failure}")
                update.missed.update(update.live)
            for _ in stream:  # to its end
                pass

    def _form_group(self, update: Update) -> dist.ProcessGroup | None:
        """Create the group with all live servers. If that is impossible, fail them all and return None.

        Raises:
            _BroadcastFailed: A server did not join.
        """
        if not update.live:
            return None
        is_local = all(is_loopback(server.host) for server in update.live)
        host = self.host or ("127.0.0.1" if is_local else socket.gethostname())
        timeout, name = datetime.timedelta(seconds=self.timeout), f"srpo-{uuid.uuid4().hex}"
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, 0, is_master=True, wait_for_workers=False, timeout=timeout
        )
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        offsets, size = {}, 1
        for server in update.live:
            offsets[server] = size
            size += self.tensor_parallel_size(server)
        body = {
            "master_address": host,
            "master_port": store.port,
            "world_size": size,
            "group_name": name,
            "backend": backend,
        }
        calls = update.begin(
            lambda server: server.post("/init_weights_update_group", {**body, "rank_offset": offsets[server]})
        )
        if backend == "nccl":  # it ends this process after the timeout; that of `_broadcast` is shorter
            timeout += datetime.timedelta(seconds=60)
        try:
            group = _group(store, size, backend, name, timeout)
        except (RuntimeError, ValueError) as error:  # of gloo, NCCL and the store
            # members block until all have joined: none can be used
            for server in list(update.live):
                update.fail(server, f"the group for weight updates could not be created: {error}")
            return None
        self._group = group
        if len(update.end(calls)) < len(calls):  # NCCL's first broadcast would wait forever
            raise _BroadcastFailed("a server did not join the group")
        self._name = name
        self._incarnations = {server: server.incarnation for server in update.live}
        return group

    def _broadcast(self, group: dist.ProcessGroup, update: Update, bucket: Bucket) -> None:
        body = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [entry.shape for entry in bucket.entries],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
            "weight_version": bucket.version(update.version),
        }
        calls = update.begin(lambda server: server.post("/update_weights_from_distributed", body))
        # a server that refuses responds at once and does not take part: the broadcast would wait forever
        if wait(calls, _REFUSAL, FIRST_COMPLETED).done:
            update.end(_done(calls))
            raise _BroadcastFailed("a server refused the update")
        try:
            work = group.broadcast(bucket.data, 0)
        except RuntimeError as error:
            raise _BroadcastFailed(f"a broadcast could not start: {error}") from None
        until = time.monotonic() + self.timeout
        while not work.is_completed():
            if any(call.exception() for call in _done(calls)):
                update.end(_done(calls))
                raise _BroadcastFailed("a server failed during a broadcast")
            if time.monotonic() > until:
                reason = f"a broadcast took longer than {self.timeout:g} s (rollout.sglang.update_timeout)"
                for call, server in calls.items():
                    if not call.done():
                        update.fail(server, reason)
                raise _BroadcastFailed("a broadcast took too long")
            time.sleep(0.0005)
        try:
            work.wait()
        except RuntimeError as error:
            raise _BroadcastFailed(f"a broadcast failed: {error}") from None
        update.end(calls)
        if len(update.live) < len(self._incarnations):
            raise _BroadcastFailed("a server failed after a broadcast")

    def close(self, is_broken: bool = False) -> None:
        """Leave the group. is_broken: do not wait for its work, which for NCCL may never end."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                if is_broken and self.device.type == "cuda":
                    distributed_c10d._abort_process_group(self._group)
                else:
                    dist.destroy_process_group(self._group)
        self._group, self._incarnations = None, {}


def _done(calls: dict[Future[Result], SGLangServer]) -> dict[Future[Result], SGLangServer]:
    return {call: server for call, server in calls.items() if call.done()}


def _group(
    store: distributed_c10d.Store, size: int, backend: str, name: str, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """Create rank 0 of a group outside the trainer's, as SGLang creates its ranks (no public API)."""
    made: Any = distributed_c10d._new_process_group_helper(
        size,
        0,
        [],
        distributed_c10d.Backend(backend),
        distributed_c10d.PrefixStore(name, store),
        group_name=name,  # pyright: ignore[reportArgumentType]  (a NewType of str since torch 2.13)
        timeout=timeout,
    )
    group = made[0]
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
