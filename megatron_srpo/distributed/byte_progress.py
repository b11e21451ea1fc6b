"""Progress over bytes: a bar on a terminal, else a plain line per tenth, at least two seconds apart."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text


class ByteProgress:
    """Progress over `total` bytes, shown on standard error; `enabled` is False on all ranks but the first."""

    def __init__(self, title: str, total: int, enabled: bool = True):
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self.title, self.total, self.done = title, total, 0
        self.started = self.reported = time.perf_counter()
        self.tenths = 0
        size, speed, left = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        columns = "{task.description}", BarColumn(None), size, speed, left
        disable = not (enabled and self.console.is_terminal)
        self.bar = Progress(*columns, console=self.console, disable=disable)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> ByteProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def advance(self, size: int) -> None:
        """Add `size` bytes to the progress."""
        self.done += size
        self.bar.update(self.task, completed=self.done)
        now, tenths = time.perf_counter(), 10 * self.done // max(1, self.total)
        if self.bar.disable and tenths > self.tenths and (tenths == 10 or now - self.reported >= 2):
            self.tenths, self.reported = tenths, now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            done, total, second = (decimal(int(size)) for size in (self.done, self.total, rate))
            self.say(f"{self.title}: {done} of {total}, {second}/s, {left:.0f} s left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(Text(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning above the bar, from any rank."""
        if self.console.quiet:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            self.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)
