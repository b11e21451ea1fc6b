"""report.html in a process of its own: its memory, and an error in it, are not the trainer's."""

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_srpo.distributed.heartbeat import beat

_SECONDS = 300  # a run of 10,000 large steps takes a minute; the other ranks wait for this one


class ReportProcess:
    """`srpo report RUN` at the lowest priority."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_srpo", "report", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)

    def wait(self) -> str | None:
        """Wait until the page is written; return what went wrong, or None."""
        end = time.monotonic() + _SECONDS
        while True:
            try:
                _, errors = self._process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                beat()
                if time.monotonic() > end:
                    self.stop()
                    return f"it took more than {_SECONDS} seconds; srpo report {self._directory} writes it"
        if not self._process.returncode:
            return None
        return (errors.strip() or f"exit status {self._process.returncode}").splitlines()[-1]

    def stop(self) -> None:
        """End the process if it is running."""
        self._process.kill()
        self._process.communicate()
