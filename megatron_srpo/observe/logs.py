"""The run folder's beginning, and what each rank writes about itself in logs/."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_srpo.config import ConfigError
from megatron_srpo.runtime.parallel import Layout

LOG = logging.getLogger("megatron_srpo")


def open_run_folder(directory: Path, layout: Layout) -> str:
    """Make the run folder (the first rank does); returns a name for this start of the run, the same on all ranks.

    All ranks together. Raises ConfigError where a rank does not see the folder.
    """
    if layout.rank == 0:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    session = layout.gather_bytes(f"{time.time_ns():x}".encode())[0].decode()
    if not (directory / "logs").is_dir():
        raise ConfigError(f"logging.dir: {directory} was made by the first rank, but rank {layout.rank} does not see it")
    return session


@contextmanager
def rank_log(directory: Path, layout: Layout) -> Iterator[None]:
    """While entered, what the package logs goes to logs/rank_NNNNN.log, and so does the stack of a crash (SIGSEGV and kin)."""
    file = (directory / "logs" / f"rank_{layout.rank:05d}.log").open("a", encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%Y-%m-%d %H:%M:%S"))
    level, propagate = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if catches_crashes := not faulthandler.is_enabled():
        faulthandler.enable(file)
    try:
        LOG.info("rank %d of %d on %s, process %d, %s", layout.rank, layout.world_size, socket.gethostname(), os.getpid(), layout.device)
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
