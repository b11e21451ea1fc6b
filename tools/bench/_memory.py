"""Measure this process's memory by /proc/self, and control what glibc does with freed tensors."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD


def status_bytes(process: int | str, *fields: str) -> int:
    """Return the sum of such fields of /proc/<process>/status as VmRSS, in bytes; 0 without that file."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        return 0
    total = 0
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            total += int(value.split()[0]) * 1024
    return total


def peak_resident_bytes() -> int:
    """Return the most resident memory, mapped files included, since `reset_peak`."""
    return status_bytes("self", "VmHWM")


def reset_peak() -> None:
    """Reset the peak to the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_above(size: int) -> None:
    """Let glibc return freed tensors of `size` bytes or more to the system at once."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, size)


def trim_heap_above(size: int) -> None:
    """Let glibc return the top of its heap to the system when `size` bytes of it are free."""
    ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, size)


def trim_heap() -> None:
    """Return the free memory of glibc's heap to the system."""
    ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Growth:
    """Hold the largest growth of this process's memory, in bytes."""

    bytes: int = 0


@contextmanager
def memory_growth() -> Iterator[Growth]:
    """Sample memory every 2 ms in the block: own pages, also those swapped out, and shared ones it maps.

    Yields:
        What holds the largest growth when the block ends.
    """
    fields = ("RssAnon", "RssShmem", "VmSwap")
    before, growth, is_over = status_bytes("self", *fields), Growth(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            growth.bytes = max(growth.bytes, status_bytes("self", *fields) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        is_over.set()
        watcher.join()
