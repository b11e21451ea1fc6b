"""Measure the peak memory of a process on a CPU or GPU."""

from __future__ import annotations

import gc

import torch
from _memory import peak_resident_bytes, reset_peak, return_freed_above, trim_heap, trim_heap_above


def start_peak(device: torch.device) -> int:
    """Forget the peak so far, and return the bytes in use; freed tensors no longer hide what is allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return_freed_above(2**20)
    trim_heap()
    reset_peak()
    return peak_resident_bytes()


def read_peak(device: torch.device) -> int:
    """Return the most bytes in use since `start_peak`; timings are the usual ones from here on."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return_freed_above(32 * 2**20)  # the largest that glibc comes to by itself
    trim_heap_above(64 * 2**20)
    return peak_resident_bytes()
