"""Progress of this process, for the watchdog: step, phase, heartbeats, last collective.

There is one record per process. All long operations call `beat`, which costs less than a microsecond. This
module imports torch only when a watchdog is entered: processes without torch import modules that beat.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple


class Collective(NamedTuple):
    """A call of torch.distributed."""

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    ranks: int
    started: float  # time.monotonic()


class Progress:
    """The state that the watchdog reads."""

    def __init__(self):
        self.step = 0
        self.phase = "start"
        self.beats = 0
        self.last_beat = time.monotonic()
        self.collective: Collective | None = None
        self.is_in_collective = False

    def beat(self) -> None:
        """Record that this process is making progress."""
        self.beats += 1
        self.last_beat = time.monotonic()

    def enter(self, phase: str) -> None:
        """Record the start of a phase, which counts as a heartbeat."""
        self.phase = phase
        self.beat()

    def describe(self) -> str:
        """Describe the progress in one line, for the watchdog's report."""
        now = time.monotonic()
        text = f"step {self.step}, phase {self.phase}, last heartbeat {now - self.last_beat:.0f} s ago"
        if self.collective is None:
            return f"{text}, no collective so far"
        call = self.collective
        size = f" of {list(call.shape)} {call.dtype}" if call.shape is not None else ""
        state = "waiting in" if self.is_in_collective else "last collective"
        started = f"started {now - call.started:.0f} s ago"
        return f"{text}, {state} {call.name}{size} among {call.ranks} ranks, {started}"


PROGRESS = Progress()
beat = PROGRESS.beat

# Patched in torch.distributed at run time. Calls of a function imported by name earlier are missed: harmless.
_GATHERS = "all_gather all_gather_into_tensor all_gather_single reduce_scatter_tensor reduce_scatter_single"
_OTHERS = "all_reduce broadcast all_to_all_single barrier batch_isend_irecv send recv"
_COLLECTIVES = f"{_GATHERS} {_OTHERS}".split()


@contextmanager
def collectives_noted() -> Iterator[None]:
    """Count each collective of torch.distributed as two heartbeats, before and after, while entered."""
    import torch.distributed as dist

    before = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
    for name, function in before.items():
        setattr(dist, name, _noted(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def _noted(name: str, function: Callable) -> Callable:
    import torch
    import torch.distributed as dist

    @wraps(function)
    def collective(*arguments, **options):
        tensor = next((value for value in arguments if isinstance(value, torch.Tensor)), None)
        shape = None if tensor is None else tuple(tensor.shape)
        dtype = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
        values = (*arguments, *options.values())
        group = next((value for value in values if isinstance(value, dist.ProcessGroup)), None)
        ranks = dist.get_world_size(group)
        PROGRESS.collective = Collective(name, shape, dtype, ranks, time.monotonic())
        PROGRESS.is_in_collective = True
        PROGRESS.beat()
        result = function(*arguments, **options)
        PROGRESS.is_in_collective = False
        PROGRESS.beat()
        return result

    return collective
