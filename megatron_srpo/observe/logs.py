"""The run folder's beginning, and what each rank writes about itself in logs/."""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_srpo.config.schema import ConfigError
from megatron_srpo.distributed.layout import Layout

LOCK_SECONDS = 120.0  # NFS keeps the locks of a lost host for 90
LOG = logging.getLogger("megatron_srpo")


def open_run_folder(directory: Path, layout: Layout) -> str:
    """Make the run folder (the first rank does); returns a name for this start of the run, the same on all
    ranks.

    All ranks together. Raises ConfigError where a rank does not see the folder.
    """
    if layout.rank == 0:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    session = layout.broadcast(f"{time.time_ns():x}")
    if not (directory / "logs").is_dir():
        raise ConfigError(
            f"logging.dir: {directory} was made by the first rank, but rank {layout.rank} does not see it"
        )
    return session


@contextmanager
def alone(directory: Path, layout: Layout) -> Iterator[None]:
    """While entered, no other start of the run works in the folder: two would remove each other's checkpoints
    and metrics.

    The first rank holds a lock on RUN/lock, which ends with its process, however it ends; where the file
    system has no locks, nothing is held. All ranks together. Raises ConfigError when another process holds it
    for longer than a lost host's lock lasts.
    """
    file, problem = None, ""
    if layout.rank == 0:
        file = (directory / "lock").open("a+", encoding="utf-8")
        problem = _lock(file)
    try:
        if problem := layout.broadcast(problem):
            raise ConfigError(problem)
        yield
    finally:
        if file is not None:
            file.close()


def _lock(file: TextIO) -> str:
    """Lock the file for this process and write its name into it; returns why that cannot be, or nothing."""
    until, is_told = time.monotonic() + LOCK_SECONDS, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() < until:
                if not is_told:
                    print(
                        f"{file.name} is held by {holder}: waiting up to {LOCK_SECONDS:.0f} s for it to end",
                        file=sys.stderr,
                    )
                is_told = True
                time.sleep(0.5)
                continue
            return f"logging.dir: {file.name} is locked: {holder} works in this folder; end it first (if it is long gone, delete the file)"
        except OSError:
            pass  # no locks here
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return ""


@contextmanager
def rank_log(directory: Path, layout: Layout) -> Iterator[None]:
    """While entered, what the package logs goes to logs/rank_NNNNN.log, and so does the stack of a crash
    (SIGSEGV and kin).
    """
    file = (directory / "logs" / f"rank_{layout.rank:05d}.log").open(
        "a", encoding="utf-8", errors="backslashreplace"
    )
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%Y-%m-%d %H:%M:%S"))
    level, propagate = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if catches_crashes := not faulthandler.is_enabled():
        faulthandler.enable(file)
    try:
        LOG.info(
            "rank %d of %d on %s, process %d, %s",
            layout.rank,
            layout.world_size,
            socket.gethostname(),
            os.getpid(),
            layout.device,
        )
        yield
    except BaseException as error:
        LOG.error("leaving: %s", error, exc_info=not isinstance(error, KeyboardInterrupt))
        raise
    finally:
        if catches_crashes:
            faulthandler.disable()
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate
        file.close()
