"""What this process is doing, for whoever watches it: step, phase, signs of life, the last collective.

One record a process: everything that takes long calls `beat` as it gets on. It costs less than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist


class Progress:
    """beats: signs of life so far. collective: name, shape, dtype, ranks, time.monotonic() of the last one
    begun.
    """

    def __init__(self):
        self.step, self.phase, self.beats = 0, "start", 0
        self.last_beat = time.monotonic()
        self.collective: tuple[Any, ...] | None = None
        self.is_in_collective = False

    def beat(self) -> None:
        """A sign of life."""
        self.beats += 1
        self.last_beat = time.monotonic()

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.phase = phase
        self.beat()

    def describe(self) -> str:
        """One line for people."""
        now = time.monotonic()
        text = f"step {self.step}, phase {self.phase}, last sign of life {now - self.last_beat:.0f} s ago"
        if self.collective is None:
            return f"{text}, no collective so far"
        name, shape, dtype, ranks, begun = self.collective
        what = f"{name}{f' of {list(shape)} {dtype}' if shape is not None else ''} among {ranks} ranks"
        return f"{text}, {'waiting in' if self.is_in_collective else 'last collective'} {what}, begun {now - begun:.0f} s ago"


PROGRESS = Progress()
beat = PROGRESS.beat

# What torch and Megatron call by these names at run time; a name taken at import time is not seen, and that
# does no harm.
_COLLECTIVES = (
    *(
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    ),
    *("broadcast", "all_to_all_single", "barrier", "batch_isend_irecv", "send", "recv"),
)


@contextmanager
def collectives_noted() -> Iterator[None]:
    """While entered, each collective of torch.distributed is a sign of life, before and after."""
    before = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
    for name, function in before.items():
        setattr(dist, name, _noted(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def _noted(name: str, function: Callable) -> Callable:
    @wraps(function)
    def collective(*arguments, **options):
        tensor = next((value for value in arguments if isinstance(value, torch.Tensor)), None)
        shape, dtype = (
            (None, None)
            if tensor is None
            else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        )
        group = next(
            (value for value in (*arguments, *options.values()) if isinstance(value, dist.ProcessGroup)), None
        )
        PROGRESS.collective = (name, shape, dtype, dist.get_world_size(group), time.monotonic())
        PROGRESS.is_in_collective = True
        PROGRESS.beat()
        result = function(*arguments, **options)
        PROGRESS.is_in_collective = False
        PROGRESS.beat()
        return result

    return collective
