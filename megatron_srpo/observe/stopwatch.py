"""Seconds of each phase of a training step, measured where the phase happens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_srpo.distributed.heartbeat import PROGRESS

PHASES = ("rollout", "verify", "teacher", "update", "publish", "checkpoint")


class Stopwatch:
    """Measure phases, an outer one without its inner ones; `announce` gets each outermost one's name."""

    def __init__(self, announce: Callable[[str], None] = PROGRESS.enter):
        self._announce = announce
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure phase `name` while entered."""
        self._count()
        if self._open:
            PROGRESS.enter(name)
        else:
            self._announce(name)
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()
            if self._open:
                PROGRESS.enter(self._open[-1])

    def _count(self) -> None:
        """Add the time since the last change of phase to the phase that is open."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def read(self) -> dict[str, float]:
        """Return seconds_<phase> since the last reading, and their sum as seconds."""
        row = {f"seconds_{name}": self._seconds.pop(name, 0.0) for name in PHASES}
        return {"seconds": sum(row.values()), **row}
