"""Create a run's folder, and lock it for one start of the run at a time."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.layout import Layout

LOCK_SECONDS = 120.0  # NFS keeps the locks of a lost host for 90


def open_run_folder(directory: Path, layout: Layout) -> str:
    """Create the run folder and return a name for this start, the same on all ranks. A collective call."""
    if layout.rank == 0:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    session = layout.gather_bytes(f"{time.time_ns():x}".encode())[0].decode()
    if not (directory / "logs").is_dir():
        problem = f"was created by rank 0, but rank {layout.rank} does not see it"
        raise ConfigError(f"logging.dir: {directory} {problem}")
    return session


@contextmanager
def run_lock(directory: Path, layout: Layout) -> Iterator[None]:
    """Hold an exclusive lock on the run folder: two starts would remove each other's checkpoints.

    A collective call; a file system without locks is accepted. Raises ConfigError after LOCK_SECONDS.
    """
    lock = FileLock(directory / "lock")
    problem = _acquire(lock) if layout.rank == 0 else ""
    try:
        if problem := layout.gather_bytes(problem.encode())[0].decode():
            raise ConfigError(problem)
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock) -> str:
    """Lock the file and write this process's name into it; return why that is not possible, or ""."""
    file = Path(lock.lock_file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting = f"waiting up to {LOCK_SECONDS:.0f} s for it to end"
            print(f"{file} is locked by {_holder(file)}: {waiting}", file=sys.stderr)
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.5)
    except Timeout:
        holder = f"{_holder(file)} uses this folder"
        hint = "stop it first (if it no longer exists, delete the file)"
        return f"logging.dir: {file} is locked: {holder}; {hint}"
    except (OSError, NotImplementedError):
        return ""  # no locks here
    file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return ""


def _holder(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() or "another process"
