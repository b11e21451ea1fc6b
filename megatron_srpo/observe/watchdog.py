"""The watchdog: when no rank makes progress, every rank dumps its state and stacks to the run and exits."""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.heartbeat import PROGRESS, collectives_noted
from megatron_srpo.distributed.layout import Layout

STALLED = 1  # the exit status
_GRACE_SECONDS = 10  # rank 0 of a stalled run waits so long for the other ranks' stacks


class Watchdog:
    """End the run (start `session`) after `minutes` without progress on any rank, while entered."""

    def __init__(self, folder: Path, layout: Layout, minutes: float | None, session: str):
        self.folder = folder
        self.layout = layout
        self.session = session
        self.limit = math.inf if minutes is None else 60 * minutes
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._collectives = collectives_noted()

    def __enter__(self) -> Watchdog:
        if self.limit < math.inf:
            self.folder.mkdir(exist_ok=True)
            self._collectives.__enter__()
            PROGRESS.enter("start")
            self._log = self._file(self.layout.rank, ".stacks.txt").open("w", encoding="utf-8")
            self._interval = min(15.0, self.limit / 10)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._collectives.__exit__(*exception)
            self._log.close()
            self._file(self.layout.rank, ".stacks.txt").unlink()

    def _file(self, rank: int, suffix: str = ".txt") -> Path:
        return self.folder / f"rank_{rank:05d}{suffix}"

    @property
    def _verdict(self) -> Path:
        return self.folder / f"stalled-{self.session}.txt"

    def _watch(self) -> None:
        """Write this rank's state (`distributed/heartbeat.py`) while it runs; rank 0 reads all of them."""
        written: int | None = None
        seen: list[str] = []
        moved_at = time.monotonic()
        while not self._stop.wait(self._interval):
            # The interpreter's timer, which does not need the GIL: for a main thread that never releases it.
            faulthandler.dump_traceback_later(self.limit + _GRACE_SECONDS, exit=True, file=self._log)
            if written != PROGRESS.beats:
                written = PROGRESS.beats
                write_text(self._file(self.layout.rank), f"{self.session} {written}\n{self._describe()}\n")
            if self._verdict.exists():
                self._dump_and_exit()
            if self.layout.rank == 0:
                states = [self._read(rank) for rank in range(self.layout.world_size)]
                if states != seen:
                    seen, moved_at = states, time.monotonic()
                elif time.monotonic() - moved_at >= self.limit:
                    minutes = f"{self.limit / 60:g} minutes (logging.watchdog_minutes)"
                    write_text(self._verdict, f"no rank made progress for {minutes}\n")
                    self._dump_and_exit()

    def _read(self, rank: int) -> str:
        try:
            return self._file(rank).read_text(encoding="utf-8")
        except OSError:
            return ""  # not yet written

    def _describe(self) -> str:
        process = f"rank {self.layout.rank} on {socket.gethostname()}, process {os.getpid()}"
        return f"{process}: {PROGRESS.describe()}"

    def _dump_and_exit(self) -> None:
        """Write state and stacks, then end this process, whatever its main thread waits for."""
        faulthandler.dump_traceback(self._log, all_threads=True)
        self._log.flush()
        write_text(self._file(self.layout.rank), f"{self.session} stalled\n{self._describe()}\n")
        end = time.monotonic() + _GRACE_SECONDS + self._interval
        if self.layout.rank == 0:
            ranks = range(self.layout.world_size)
            stalled = f"{self.session} stalled"
            while time.monotonic() < end and not all(self._read(rank).startswith(stalled) for rank in ranks):
                time.sleep(0.05)
            lines = [self._verdict.read_text(encoding="utf-8").strip()]
            for rank in ranks:
                lines.append(self._read(rank).partition("\n")[2].strip() or f"rank {rank}: no state written")
            text = "\n".join([*lines, f"stacks: {self.folder}/rank_*.stacks.txt"])
            print(f"stopped: {text}", file=sys.stderr, flush=True)
            write_text(self._verdict, text + "\n")
        else:  # rank 0 prints first: torchrun ends all ranks when one exits
            while time.monotonic() < end and "stacks:" not in self._verdict.read_text(encoding="utf-8"):
                time.sleep(0.05)
        os._exit(STALLED)
