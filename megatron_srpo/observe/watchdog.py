"""The watchdog: when no rank makes progress, every rank dumps its state and stacks to the run and exits."""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.heartbeat import PROGRESS, collectives_noted
from megatron_srpo.distributed.layout import Layout

STALLED = 1  # the exit status
_GRACE_SECONDS = 10  # the rank that ends a stalled run waits so long for the other ranks' stacks


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
        self._written = -1  # heartbeats in the file
        self._seen: list[int | str] = []
        self._moved_at = 0.0
        self._reason = ""

    def __enter__(self) -> Watchdog:
        if self.limit < math.inf:
            self.folder.mkdir(exist_ok=True)
            self._collectives.__enter__()
            PROGRESS.enter("start")
            self._log = self._file(self.layout.rank, ".stacks.txt").open("w", encoding="utf-8")
            self._interval = min(15.0, self.limit / 10)
            self._moved_at = time.monotonic()
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
        """Look at the run at every interval. An error of the disk ends neither this thread nor the run."""
        try:
            while not self._stop.wait(self._interval):
                # The interpreter's timer needs no GIL: it is for a main thread that never releases it.
                faulthandler.dump_traceback_later(self.limit + _GRACE_SECONDS, exit=True, file=self._log)
                self._write_state()
                if self._verdict.exists():
                    self._end_run(leads=False)
                reason = self._find_stall()
                if reason is not None:
                    self._end_run(leads=self._claim(reason))
        finally:
            faulthandler.cancel_dump_traceback_later()  # without this thread it would not be set again

    def _write_state(self) -> None:
        """Write this rank's state (`distributed/heartbeat.py`) if it changed, else only the file's time."""
        beats, file = PROGRESS.beats, self._file(self.layout.rank)
        with suppress(OSError):
            if beats != self._written:
                write_text(file, f"{self.session} {beats}\n{self._describe()}\n")
                self._written = beats
            elif self.layout.rank == 0:
                os.utime(file)

    def _find_stall(self) -> str | None:
        """Return why the run must end, or None.

        The first rank reads the states of all. The others read only whether the first rank's watchdog is
        alive, which finds a first rank whose process is stopped.
        """
        if self.layout.rank == 0:
            states = [self._read(rank) for rank in range(1, self.layout.world_size)]
        else:
            states = [self._modified(0)]
        now = [PROGRESS.beats, *states]
        if now != self._seen:
            self._seen, self._moved_at = now, time.monotonic()
        if time.monotonic() - self._moved_at < self.limit:
            return None
        minutes = f"{self.limit / 60:g} minutes (logging.watchdog_minutes)"
        if self.layout.rank == 0:
            return f"no rank made progress for {minutes}"
        return f"rank 0 did not respond for {minutes}, and rank {self.layout.rank} made no progress"

    def _claim(self, reason: str) -> bool:
        """Record that the run stalled; return False if another rank has done so."""
        self._reason = reason
        try:
            with self._verdict.open("x", encoding="utf-8") as file:
                file.write(reason + "\n")
        except FileExistsError:
            return False
        except OSError:  # the other ranks will be ended with this one
            pass
        return True

    def _read(self, rank: int) -> str:
        try:
            return self._file(rank).read_text(encoding="utf-8")
        except OSError:
            return ""  # not yet written

    def _modified(self, rank: int) -> str:
        try:
            return str(self._file(rank).stat().st_mtime_ns)
        except OSError:
            return ""

    def _describe(self) -> str:
        process = f"rank {self.layout.rank} on {socket.gethostname()}, process {os.getpid()}"
        return f"{process}: {PROGRESS.describe()}"

    def _end_run(self, leads: bool) -> None:
        """Write state and stacks, then end this process, whatever its main thread waits for."""
        try:
            faulthandler.dump_traceback(self._log, all_threads=True)
            with suppress(OSError):
                write_text(self._file(self.layout.rank), f"{self.session} stalled\n{self._describe()}\n")
            end = time.monotonic() + _GRACE_SECONDS + self._interval
            if leads:
                self._print_all(end)
            else:  # the leading rank prints first: torchrun ends all ranks when one exits
                while time.monotonic() < end + 1 and not self._is_printed():
                    time.sleep(0.05)
        finally:
            os._exit(STALLED)

    def _print_all(self, end: float) -> None:
        """Print the state of every rank; wait until `end` for those that have not written it."""
        ranks = range(self.layout.world_size)
        expected = ranks if self.layout.rank == 0 else ranks[1:]  # else the first rank does not respond
        while time.monotonic() < end and not all(map(self._has_stalled, expected)):
            time.sleep(0.05)
        lines = [self._reason]
        for rank in ranks:
            state = self._read(rank).partition("\n")[2].strip() or f"rank {rank}: no state written"
            silent = "" if self._has_stalled(rank) else "; did not respond: is its process stopped or lost?"
            lines.append(state + silent)
        text = "\n".join([*lines, f"stacks: {self.folder}/rank_*.stacks.txt"])
        print(f"stopped: {text}", file=sys.stderr, flush=True)
        write_text(self._verdict, text + "\n")

    def _has_stalled(self, rank: int) -> bool:
        # rank is this one: its state may not have been written, on a full disk
        return rank == self.layout.rank or self._read(rank).startswith(f"{self.session} stalled")

    def _is_printed(self) -> bool:
        with suppress(OSError):
            return "stacks:" in self._verdict.read_text(encoding="utf-8")
        return False
