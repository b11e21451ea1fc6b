"""The verifier pool: worker processes that can be killed, so that no response can hang a run, exhaust its
memory or end it.

JSON lines over pipes, no pickle. A worker answers its jobs in order, so the job that hung or killed it is the
first without an answer: that one is given up, the rest go to its replacement.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_srpo.config.schema import ConfigError, TaskSection
from megatron_srpo.data.records import Verdict

START_SECONDS = 120  # to import a verifier, on the busiest machine
LARGEST_CHUNK = (
    32  # jobs a worker holds at once: enough that it never waits, few enough to share the work evenly
)
CHUNK_BYTES = 1 << 20
_PACKAGE = Path(__file__).parents[2]


class Job(NamedTuple):
    """One response to judge by its task's verifier."""

    task: str
    answer: str
    text: str


class Pool:
    """`settings.verifier_workers` processes, each with every task's verifier.

    They end with the pool or by `close()`.
    """

    def __init__(self, verifiers: Mapping[str, str], settings: TaskSection):
        """`verifiers`: task name → reference (see `Task`).

        Raises ConfigError when a verifier cannot be loaded.
        """
        self.verifiers, self.settings = dict(verifiers), settings
        self.workers = [_Worker(self.verifiers, settings) for _ in range(settings.verifier_workers)]
        self.close = weakref.finalize(
            self, _end, self.workers
        )  # at the latest when nobody holds the pool, or at exit
        for worker in self.workers:
            worker.wait_until_ready()

    def verify(self, jobs: Sequence[Job]) -> list[Verdict]:
        """One verdict a job, in order.

        A job that nobody could judge has `verifier_failed`, reward 0, and is `excluded` as configured.
        """
        waiting = deque(enumerate(jobs))
        verdicts: list[Verdict | None] = [None] * len(jobs)
        chunk = min(LARGEST_CHUNK, math.ceil(len(jobs) / len(self.workers)))
        try:
            while waiting or any(worker.held for worker in self.workers):
                self._hand_out(waiting, chunk)
                self._exchange()
                self._take_in(waiting, verdicts)
        except BaseException:  # answers still to come belong to nobody
            for place, worker in enumerate(self.workers):
                if worker.held:
                    self._replace(place)
            raise
        return verdicts

    def _hand_out(self, waiting: deque[tuple[int, Job]], chunk: int) -> None:
        """A chunk of jobs to every worker that has none."""
        for place, worker in enumerate(self.workers):
            if waiting and not worker.held:
                if worker.process.poll() is not None:  # while it had nothing to do
                    worker = self._replace(place)
                worker.give(waiting, chunk)

    def _take_in(self, waiting: deque[tuple[int, Job]], verdicts: list[Verdict | None]) -> None:
        """The answers that have come; what a lost worker held goes back, but for the job that lost it."""
        for place, worker in enumerate(self.workers):
            answers = worker.take_answers()
            for number, row in answers:
                verdicts[number] = self._verdict(row)
            is_lost = any(row.get("failed") == "memory" for _, row in answers)  # it leaves after that
            if worker.held and not is_lost and (failure := worker.failure()):
                number, _ = worker.held.popleft()
                verdicts[number] = self._verdict({"failed": failure})
                is_lost = True
            if is_lost:
                waiting.extendleft(reversed(worker.held))
                self._replace(place)

    def _replace(self, place: int) -> _Worker:
        self.workers[place].kill()
        self.workers[place] = _Worker(self.verifiers, self.settings)
        return self.workers[place]

    def _exchange(self) -> None:
        """Wait until a pipe can take or give something, or a deadline passes; move what can be moved without
        waiting.
        """
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.held:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker.read)
                    if worker.unsent:
                        selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker.write)
            deadline = min(
                (worker.deadline for worker in self.workers if worker.held), default=time.monotonic()
            )
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                key.data()

    def _verdict(self, row: dict) -> Verdict:
        if "failed" not in row:
            return Verdict.model_validate(row)
        excluded = self.settings.verifier_failed == "exclude"
        return Verdict(
            reward=0.0, correct=False, format_ok=False, verifier_failed=row["failed"], excluded=excluded
        )


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


class _Worker:
    """One process. `held`: jobs given and not answered, oldest first."""

    def __init__(self, verifiers: Mapping[str, str], settings: TaskSection):
        path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_srpo.tasks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self.seconds = settings.verifier_seconds
        start = {
            "verifiers": verifiers,
            "memory_bytes": settings.verifier_memory_mib << 20,
            "seconds": settings.verifier_seconds + 5,
        }
        self.unsent = memoryview(json.dumps(start).encode() + b"\n")
        self.received = b""
        self.held: deque[tuple[int, Job]] = deque()
        self.ready, self.ended = False, False
        self.deadline = time.monotonic() + START_SECONDS

    def wait_until_ready(self) -> None:
        """Returns when the verifiers are loaded. Raises ConfigError when they cannot be."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not self.ready:
                self.write()
                selector.select(max(self.deadline - time.monotonic(), 0))
                self.read()
                self.take_answers()
                if not self.ready and (failure := self.failure()):
                    self.kill()
                    raise ConfigError(f"task.verifier: a verifier process did not start ({failure})")

    def give(self, waiting: deque[tuple[int, Job]], chunk: int) -> None:
        """Take at most `chunk` jobs from `waiting`, to be answered within `seconds` each."""
        lines: list[bytes] = []
        while waiting and len(lines) < chunk and sum(map(len, lines)) < CHUNK_BYTES:
            self.held.append(waiting.popleft())
            lines.append(json.dumps(self.held[-1][1]).encode() + b"\n")
        self.unsent = memoryview(bytes(self.unsent) + b"".join(lines))
        if self.ready:
            self.deadline = time.monotonic() + self.seconds

    def write(self) -> None:
        """Send what the pipe takes now."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.process.stdin.fileno(), self.unsent) :]
                if self.ready:  # it is reading, so it is not stuck
                    self.deadline = time.monotonic() + self.seconds
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.unsent = memoryview(b"")  # it is dead; reading will tell

    def read(self) -> None:
        """Receive what the pipe holds now."""
        try:
            while data := os.read(self.process.stdout.fileno(), 1 << 16):
                self.received += data
            self.ended = True
        except BlockingIOError:
            pass

    def take_answers(self) -> list[tuple[int, dict]]:
        """(job number, row) of every job answered since the last call.

        Raises ConfigError when the verifiers cannot be loaded.
        """
        *lines, self.received = self.received.split(b"\n")
        answers = []
        for line in lines:
            row = json.loads(line)
            if not self.ready:
                if "refused" in row:
                    self.kill()
                    raise ConfigError(f"task.verifier: a verifier cannot be loaded: {row['refused']}")
                self.ready = True
            else:
                answers.append((self.held.popleft()[0], row))
            self.deadline = time.monotonic() + self.seconds
        return answers

    def failure(self) -> str | None:
        """Why the oldest job will never be answered, if so."""
        if self.ended:
            try:
                return "timeout" if self.process.wait(1) == -signal.SIGALRM else "died"
            except subprocess.TimeoutExpired:  # it only closed its output
                return "died"
        return "timeout" if time.monotonic() > self.deadline else None

    def kill(self) -> None:
        """End the process and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
