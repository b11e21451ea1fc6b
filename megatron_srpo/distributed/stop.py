"""Early exit: after a signal or at the time limit, all ranks stop after the same step."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from megatron_srpo.distributed.layout import Layout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CLOCK = 1 << 16  # above any signal's number


class StopRequest:
    """A handler of SIGTERM, SIGUSR1 and Ctrl-C while entered; a second Ctrl-C interrupts at once."""

    def __init__(self, layout: Layout, limit_minutes: float | None):
        """Start the time limit, in wall-clock minutes from now by the first rank's clock; None: no limit."""
        self.layout, self._received, self._before = layout, 0, {}
        self._deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self._received == number:
            raise KeyboardInterrupt
        self._received = number

    def reason(self) -> str | None:
        """Return the reason to stop now, or None; the same on every rank. One small all-reduce."""
        late = self.layout.rank == 0 and self._deadline is not None and time.monotonic() >= self._deadline
        request = torch.tensor(_CLOCK if late else self._received, device=self.layout.device)
        if self.layout.world_size > 1:
            dist.all_reduce(request, op=dist.ReduceOp.MAX)
        if (number := int(request)) == 0:
            return None
        if number == _CLOCK:
            return "checkpoint.exit_duration_in_mins has passed"
        return f"{signal.Signals(number).name} was received"
