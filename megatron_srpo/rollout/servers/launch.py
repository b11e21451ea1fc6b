"""How server processes are started: under a guard, with a log file each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.rollout.servers import guard

_LOG_TAIL = 1500  # characters of a server's log in a message
# torchrun's variables are for the trainer's processes, and so is the trainer's Python path
_NOT_INHERITED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONPATH", "VIRTUAL_ENV"),
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Starts the servers of a run; a subclass for each kind of server.

    Attributes:
        logs: folder of their output.
        start_timeout: seconds a server has to start.
        max_restarts: failed starts in a row after which a server is marked failed.
        secret: API key, which no message may contain.
    """

    logs: Path
    start_timeout: float
    max_restarts: int
    secret: str | None = None

    def command(self, number: int) -> Sequence[str]:
        """Return the command line of server `number`."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return environment variables in addition to this process's."""
        return {}

    def start(self, number: int) -> subprocess.Popen:
        """Start server `number`; its output is appended to its log."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in _NOT_INHERITED and not name.startswith("TORCHELASTIC")
        }
        mode = 0o666 if self.secret is None else 0o600  # servers print their arguments, the key among them
        with open(self.log(number), "ab", opener=lambda path, flags: os.open(path, flags, mode)) as log:
            return subprocess.Popen(
                [sys.executable, "-P", guard.__file__, str(os.getpid()), *self.command(number)],
                env={**inherited, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the first Ctrl-C asks the trainer, not servers, to stop
            )

    def log(self, number: int) -> Path:
        return self.logs / f"server_{number}.log"

    def log_tail(self, number: int) -> str:
        """Return the end of a server's log, without the secret."""
        log = self.log(number)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            tail = file.read().decode(errors="replace")
        return tail if self.secret is None else tail.replace(self.secret, "…")
