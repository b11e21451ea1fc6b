"""All servers, managed by the first rank: it starts, monitors, restarts and stops those of the run."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.rollout.servers import guard
from megatron_srpo.rollout.servers.http import Server, ServerFailed

_LOG_TAIL = 1500  # characters of a server's log in a message
_POLL = 0.2  # seconds between checks of a process
# torchrun's variables are for the trainer's processes, and so is the trainer's Python path
_NOT_INHERITED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONPATH", "VIRTUAL_ENV"),
)
State = Literal["starting", "outdated", "ready", "quarantined", "failed"]
AnyServer = TypeVar("AnyServer", bound=Server)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Start the servers of a run, each under a guard; subclassed for each kind of server."""

    logs: Path  # folder of their output
    start_timeout: float  # seconds a server has to start
    max_restarts: int  # failed starts in a row after which a server is marked failed
    secret: str | None = None  # API key, which no message may contain

    def command(self, number: int) -> Sequence[str]:
        """Return the command line of server `number`."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return environment variables in addition to this process's."""
        return {}

    def start(self, number: int) -> subprocess.Popen:
        """Start server `number`; its output is appended to its log."""
        inherited = dict(os.environ)
        for name in os.environ:
            if name in _NOT_INHERITED or name.startswith("TORCHELASTIC"):
                del inherited[name]
        mode = 0o666 if self.secret is None else 0o600  # servers print their arguments, including the key
        with open(self.log(number), "ab", opener=lambda path, flags: os.open(path, flags, mode)) as log:
            if self.secret is not None:
                os.fchmod(log.fileno(), mode)  # the log of an earlier start keeps its mode when it is opened
            return subprocess.Popen(
                [sys.executable, "-P", guard.__file__, str(os.getpid()), *self.command(number)],
                env={**inherited, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the first Ctrl-C asks the trainer, not servers, to stop
            )

    def log(self, number: int) -> Path:
        """Return the file with the output of server `number`."""
        return self.logs / f"server_{number}.log"

    def log_tail(self, number: int) -> str:
        """Return the end of a server's log, without the secret."""
        try:
            with self.log(number).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
                tail = file.read().decode(errors="replace")
        except OSError as error:
            tail = str(error)
        return tail if self.secret is None else tail.replace(self.secret, "…")


@dataclass
class ServerHandle(Generic[AnyServer]):
    """One server and its state.

    starting     of the run: starting or restarting
    outdated     responds, but does not have the newest weights
    ready        has the newest weights
    quarantined  external: does not respond; tried again at the next publication
    failed       of the run: after too many failed starts; external: after an invalid reply
    """

    server: AnyServer
    number: int
    state: State
    process: subprocess.Popen | None = None
    reason: str = ""  # of quarantine or failure
    failure: str | None = None  # reported, not handled yet
    deadline: float = 0.0  # of its start
    failed_starts: int = 0  # in a row
    has_started: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Weights(NamedTuple):
    """Published weights on disk, as a Hugging Face folder."""

    folder: Path
    version: str


class Fleet(Generic[AnyServer]):
    """All servers, in the order of their numbers. launch: starts them; None if they are external."""

    def __init__(self, servers: Sequence[AnyServer], launch: Launch | None, say: Callable[[str], None]):
        self.launch = launch
        self._print = say
        self.newest: Weights | None = None  # the newest weights, if they are on disk
        self.starts_allowed = True
        self._closing = threading.Event()
        state: State = "outdated" if launch is None else "starting"
        self.handles = [ServerHandle(server, number, state) for number, server in enumerate(servers)]
        self.threads: list[threading.Thread] = []
        if launch is None:
            return
        launch.logs.mkdir(parents=True, exist_ok=True)
        for handle in self.handles:
            self._start(handle, launch)
            name = f"server {handle.number}"
            thread = threading.Thread(target=self._supervise, args=(handle, launch), daemon=True, name=name)
            self.threads.append(thread)
            thread.start()

    def say(self, text: str) -> None:
        """Print a line; a full disk or a closed terminal must not end a supervising thread."""
        with contextlib.suppress(OSError):
            self._print(text)

    def failed(self) -> str | None:
        """Return the reasons if every server has failed for good, else None."""
        if all(handle.state == "failed" for handle in self.handles):
            return "; ".join(f"{handle.server.url}: {handle.reason}" for handle in self.handles)
        return None

    def is_starting(self) -> bool:
        """Return True while a server is starting or a failure is not handled yet."""
        return any(handle.state == "starting" or handle.failure for handle in self.handles)

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` until every server has started or failed."""
        until = time.monotonic() + seconds
        while self.is_starting() and time.monotonic() < until:
            beat()
            time.sleep(0.05)

    def forbid_starts(self) -> None:
        """End servers that are starting, and start none until `allow_starts`: the trainer uses the memory."""
        self.starts_allowed = False
        for handle in self.handles:
            with handle.lock:  # wait for a thread that is about to start it
                pass
        while any(_is_ending(handle) for handle in self.handles):
            time.sleep(0.05)

    def allow_starts(self) -> None:
        """Let supervision start servers again after `forbid_starts`."""
        self.starts_allowed = True

    def reachable(self) -> list[ServerHandle[AnyServer]]:
        """Return the servers that weights can be sent to."""
        states = ("outdated", "ready", "quarantined")
        return [handle for handle in self.handles if handle.state in states and handle.failure is None]

    def report_failure(self, url: str, reason: str, is_invalid: bool) -> None:
        """Restart a server of the run in the background; quarantine an external one, for good if invalid."""
        handle = next(handle for handle in self.handles if handle.server.url == url)
        with handle.lock:
            if self.launch is not None:
                if handle.state in ("outdated", "ready"):
                    handle.failure = reason
            elif handle.state != "failed":
                handle.state, handle.reason = "failed" if is_invalid else "quarantined", reason
                handle.server.incarnation += 1
                self.say(f"quarantined {url}: {reason}")

    def weights_changed(self, newest: Weights | None) -> None:
        """Mark every server outdated. newest: the new weights, if they are on disk."""
        self.newest = newest
        for handle in self.handles:
            with handle.lock:
                if handle.state == "ready":
                    handle.state = "outdated"

    def updated(self, handle: ServerHandle[AnyServer]) -> None:
        """Mark a server ready, as it has the newest weights, unless it has failed meanwhile."""
        with handle.lock:
            if handle.state in ("outdated", "quarantined") and handle.failure is None:
                self._set_ready(handle)

    def states(self) -> dict[str, str | None]:
        """Return by URL why a server must not be used, or None if it may be."""
        found: dict[str, str | None] = {}
        for handle in self.handles:
            found[handle.server.url] = None if handle.state == "ready" else handle.reason or handle.state
        return found

    def close(self) -> None:
        """Stop the servers of the run and all their processes."""
        self._closing.set()
        for handle in self.handles:  # ends a supervising thread's call to a server, too
            self._end(handle)
        for thread in self.threads:
            thread.join()
        for handle in self.handles:
            self._end(handle)

    def _set_ready(self, handle: ServerHandle[AnyServer]) -> None:
        handle.state, handle.reason, handle.failed_starts = "ready", "", 0

    def _start(self, handle: ServerHandle[AnyServer], launch: Launch) -> None:
        handle.server.incarnation += 1
        handle.process = launch.start(handle.number)
        handle.deadline = time.monotonic() + launch.start_timeout

    def _end(self, handle: ServerHandle[AnyServer]) -> None:
        """Stop a server: its guard kills all its processes; without a guard, Linux does."""
        process = handle.process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # ---- supervision: a thread for each server that the run started

    def _supervise(self, handle: ServerHandle[AnyServer], launch: Launch) -> None:
        while not self._closing.wait(_POLL) and handle.state != "failed":
            if handle.process is None:
                with handle.lock:
                    if self.starts_allowed:
                        self._start_again(handle, launch)
                continue
            problem = self._problem(handle, launch)
            if problem is not None:
                self._restart(handle, launch, problem)
            elif handle.state == "starting" and not self.starts_allowed:
                self._end(handle)
                handle.process = None
            elif handle.state == "starting" and _is_up(handle.server):
                self._catch_up(handle)

    def _start_again(self, handle: ServerHandle[AnyServer], launch: Launch) -> None:
        try:
            self._start(handle, launch)
        except OSError as error:  # out of processes or disk space; an error in this thread would be lost
            handle.state, handle.reason = "failed", f"it could not be started: {error}"
            self.say(f"giving up on server {handle.number}: {handle.reason}")

    def _problem(self, handle: ServerHandle[AnyServer], launch: Launch) -> str | None:
        if handle.failure is not None:
            return handle.failure
        status = None if handle.process is None else handle.process.poll()
        if status is not None:
            return f"exited with status {status}"
        if handle.state == "starting" and time.monotonic() > handle.deadline:
            return f"did not start in {launch.start_timeout:g} s (start_timeout)"
        return None

    def _restart(self, handle: ServerHandle[AnyServer], launch: Launch, problem: str) -> None:
        failed_start = handle.state == "starting"
        with handle.lock:
            handle.state, handle.reason, handle.failure = "starting", problem, None
        self._end(handle)
        handle.process = None
        handle.failed_starts += failed_start
        log = launch.log(handle.number)
        if failed_start and (not handle.has_started or handle.failed_starts > launch.max_restarts):
            tail = launch.log_tail(handle.number)
            with handle.lock:
                handle.state, handle.reason = "failed", f"{problem}; {log} ends with:\n{tail}"
            self.say(f"giving up on server {handle.number}: {problem} ({log})")
        else:
            during = f" during its start ({log})" if failed_start else ""
            self.say(f"restarting server {handle.number}: {problem}{during}")

    def _catch_up(self, handle: ServerHandle[AnyServer]) -> None:
        """Load the newest weights if they are on disk; otherwise the next publication sends them."""
        newest = self.newest
        try:
            if newest is not None:
                handle.server.load(*newest)
        except ServerFailed as failure:
            handle.failure = str(failure)
            return
        with handle.lock:
            if newest != self.newest:  # try again with the newer ones
                return
            handle.has_started, handle.state = True, "outdated"
            if newest is not None:
                self._set_ready(handle)
                self.say(f"server {handle.number} is ready again, with weight version {newest.version}")


def _is_ending(handle: ServerHandle) -> bool:
    return handle.process is not None and (handle.state == "starting" or handle.failure is not None)


def _is_up(server: Server) -> bool:
    try:
        server.check_up()
    except ServerFailed:
        return False
    return True
