"""The log of each rank, in logs/ of the run folder."""

import faulthandler
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import override

from megatron_srpo.data.visible import visible
from megatron_srpo.distributed.layout import Layout

LOG = logging.getLogger("megatron_srpo")


class _Formatter(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def rank_log(directory: Path, layout: Layout) -> Iterator[None]:
    """Write the package's log, and the stack of a crash (SIGSEGV and similar), to logs/rank_NNNNN.log."""
    path = directory / "logs" / f"rank_{layout.rank:05d}.log"
    file = path.open("a", encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(file)
    handler.setFormatter(_Formatter("%(asctime)s.%(msecs)03d %(message)s", "%Y-%m-%d %H:%M:%S"))
    level, propagate = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    catches_crashes = not faulthandler.is_enabled()
    if catches_crashes:
        faulthandler.enable(file)
    try:
        where = f"on {socket.gethostname()}, process {os.getpid()}, {layout.device}"
        LOG.info("rank %d of %d %s", layout.rank, layout.world_size, where)
        yield
    except BaseException as error:
        LOG.error("exiting: %s", error, exc_info=not isinstance(error, KeyboardInterrupt))
        raise
    finally:
        if catches_crashes:
            faulthandler.disable()
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate
        file.close()
