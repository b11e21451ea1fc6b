"""The verifier pool: killable worker processes, so that no response can hang, exhaust or crash a run.

JSON messages, no pickle, over one connection per worker. A worker judges its jobs in order, so the job that
hung or killed it is the first without an answer: only that one fails, the others are queued again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSection
from megatron_srpo.data.records import Verdict
from megatron_srpo.distributed.heartbeat import beat

START_SECONDS = 120  # to import a verifier, on the busiest machine
LARGEST_CHUNK = 32  # jobs a worker holds at once: it never waits, and the work is still shared evenly
CHUNK_BYTES = 1 << 20
_PACKAGE = Path(__file__).parents[2]


class Job(NamedTuple):
    """One response to judge by its task's verifier."""

    task: str
    answer: str
    text: str


class _Numbered(NamedTuple):
    """A job and its index among the jobs of one call of `Pool.verify`."""

    index: int
    job: Job


class Pool:
    """Processes that have every task's verifier; they end with the pool or with `close()`."""

    def __init__(self, verifiers: Mapping[str, str], settings: TaskSection):
        """Start workers that load `verifiers` (task → reference, see `Task`). Raises ConfigError."""
        self.verifiers = dict(verifiers)
        self.settings = settings
        self.workers = [_Worker(self.verifiers, settings) for _ in range(settings.verifier_workers)]
        self.close = weakref.finalize(self, _kill_all, self.workers)
        for worker in self.workers:
            worker.wait_until_ready()

    def verify(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Judge jobs in order; failed ones get `verifier_failed`, reward 0, `excluded` as configured."""
        waiting = deque(_Numbered(index, job) for index, job in enumerate(jobs))
        verdicts: dict[int, Verdict] = {}
        chunk = min(LARGEST_CHUNK, math.ceil(len(jobs) / len(self.workers)))
        try:
            while len(verdicts) < len(jobs):
                self._dispatch(waiting, chunk)
                self._collect(waiting, verdicts)
                beat()  # it returns at a verdict, or at the end of a time limit
        except BaseException:  # pending answers belong to no later job
            for index, worker in enumerate(self.workers):
                if worker.held:
                    self._replace(index)
            raise
        return [verdicts[index] for index in range(len(jobs))]

    def _dispatch(self, waiting: deque[_Numbered], chunk: int) -> None:
        """Send a chunk of jobs to every idle worker."""
        for index, worker in enumerate(self.workers):
            if waiting and not worker.held:
                if worker.process.poll() is not None:  # it exited while it was idle
                    worker = self._replace(index)
                if worker.ready:
                    worker.give(waiting, chunk)

    def _collect(self, waiting: deque[_Numbered], verdicts: dict[int, Verdict]) -> None:
        """Wait for an answer or a deadline; queue a lost worker's jobs again, except the one that failed."""
        active = [worker for worker in self.workers if worker.held or not worker.ready]
        seconds = min(worker.deadline for worker in active) - time.monotonic()
        connection.wait([worker.connection for worker in active], max(seconds, 0))
        for index, worker in enumerate(self.workers):
            if worker not in active:
                continue
            out_of_memory = False  # then the worker exits after its answer
            for row in worker.answers():
                verdicts[worker.held.popleft().index] = self._verdict(row)
                out_of_memory = row.get("failed") == "memory"
            failure = None if out_of_memory else worker.failure()
            if failure and (worker.held or waiting):
                lost = (worker.held or waiting).popleft()
                verdicts[lost.index] = self._verdict({"failed": failure})
            if failure or out_of_memory:
                waiting.extendleft(reversed(worker.held))
                self._replace(index)

    def _replace(self, index: int) -> _Worker:
        self.workers[index].kill()
        self.workers[index] = _Worker(self.verifiers, self.settings)
        return self.workers[index]

    def _verdict(self, row: dict[str, Any]) -> Verdict:
        if "failed" not in row:
            return Verdict.model_validate(row)
        excluded, why = self.settings.verifier_failed == "exclude", row["failed"]
        return Verdict(reward=0.0, correct=False, format_ok=False, verifier_failed=why, excluded=excluded)


def _kill_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


class _Worker:
    """One process. `held`: unanswered jobs, oldest first; `deadline`: of the oldest one, or of the start."""

    def __init__(self, verifiers: Mapping[str, str], settings: TaskSection):
        self.connection, remote = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "megatron_srpo.tasks.worker", str(remote.fileno())]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, pass_fds=[remote.fileno()], stdin=null, stdout=null, stderr=null, env=environment
        )
        remote.close()
        self._poller = select.poll()  # Connection.poll makes a selector per call
        self._poller.register(self.connection.fileno(), select.POLLIN)
        self.seconds = settings.verifier_seconds
        self.held: deque[_Numbered] = deque()
        self.ready = self.ended = False
        self.deadline = time.monotonic() + START_SECONDS
        memory = settings.verifier_memory_mib << 20
        self._send({"verifiers": verifiers, "memory_bytes": memory, "seconds": self.seconds + 5})

    def wait_until_ready(self) -> None:
        """Return when the verifiers are loaded; raise ConfigError if they cannot be."""
        self.connection.poll(max(self.deadline - time.monotonic(), 0))
        list(self.answers())  # none, but it reads the answer to the start message
        if not self.ready:
            failure = self.failure() or "timeout"
            self.kill()
            raise ConfigError(f"task.verifier: a verifier process did not start ({failure})")

    def give(self, waiting: deque[_Numbered], chunk: int) -> None:
        """Send at most `chunk` jobs of `waiting`, as one message, which the idle worker reads at once."""
        size = 0
        while waiting and len(self.held) < chunk and size < CHUNK_BYTES:
            self.held.append(waiting.popleft())
            size += len(self.held[-1].job.text)
        self._send([numbered.job for numbered in self.held])
        self.deadline = time.monotonic() + self.seconds

    def _send(self, message: object) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError:
            self.ended = True

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the verdicts received so far, as plain data; raise ConfigError if loading failed."""
        try:
            while self._poller.poll(0):
                row = json.loads(self.connection.recv_bytes())
                self.deadline = time.monotonic() + self.seconds
                if self.ready:
                    yield row
                elif "refused" in row:
                    self.kill()
                    raise ConfigError(f"task.verifier: a verifier cannot be loaded: {row['refused']}")
                self.ready = True
        except (EOFError, ConnectionError):
            self.ended = True

    def failure(self) -> str | None:
        """Return why the oldest job will never be answered, or None."""
        if self.ended:
            try:
                return "timeout" if self.process.wait(1) == -signal.SIGALRM else "died"
            except subprocess.TimeoutExpired:  # it only closed its connection
                return "died"
        return "timeout" if time.monotonic() > self.deadline else None

    def kill(self) -> None:
        """Kill the process and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
