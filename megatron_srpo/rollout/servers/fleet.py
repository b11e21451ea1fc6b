"""The servers as the first rank keeps them: ours are started, watched, restarted and ended; others' can only
be asked.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_srpo.config.schema import ConfigError, SGLangSection
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.rollout.servers import guard
from megatron_srpo.rollout.servers.http import Server, ServerFailed

_TEND = 0.2  # seconds between looks at a process
_LOG_TAIL = 1500  # characters of a server's log in a message
# what torchrun tells the trainer's processes is not for servers, nor is the trainer's Python path
_NOT_PASSED_ON = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


@dataclass(frozen=True)
class Launch:
    """How to start our servers. model: folder of the start model; dtype: the trainer's; logs: folder of
    their output.
    """

    settings: SGLangSection
    model: Path
    dtype: str
    has_gpus: bool
    saves_memory: bool
    logs: Path

    def urls(self, count: int) -> list[str]:
        """Where `count` servers will listen, as seen from this machine; from others when they listen to the
        network.
        """
        host = self.settings.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return [f"http://{host}:{self.settings.port + number}" for number in range(count)]

    def command(self, number: int) -> list[str]:
        """The command line of server `number`."""
        settings, gpus = self.settings, self.settings.tensor_parallel_size
        words = [
            settings.python,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(self.model.resolve()),
            "--dtype",
            self.dtype,
        ]
        words += ["--host", settings.host, "--port", str(settings.port + number), "--tp-size", str(gpus)]
        if self.has_gpus:
            words += ["--base-gpu-id", str(settings.base_gpu_id + number * gpus)]
        if self.saves_memory:
            words += ["--enable-memory-saver"]
        if settings.api_key_env is not None:
            words += ["--api-key", os.environ[settings.api_key_env]]
        return [*words, *settings.arguments]

    def start(self, number: int) -> subprocess.Popen:
        """Start server `number` under a guard; its output goes to logs/server_<number>.log."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _NOT_PASSED_ON and not name.startswith("TORCHELASTIC")
        }
        patience = {
            "SGLANG_HEALTH_CHECK_TIMEOUT": str(math.ceil(self.settings.health_timeout))
        }  # one setting for both sides
        mode = (
            0o666 if self.settings.api_key_env is None else 0o600
        )  # SGLang writes its arguments there, and the key is one
        with open(self.log(number), "ab", opener=lambda path, flags: os.open(path, flags, mode)) as log:
            return subprocess.Popen(
                [sys.executable, "-S", guard.__file__, str(os.getpid()), *self.command(number)],
                env={**kept, **patience, **self.settings.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # the first Ctrl-C asks the trainer to leave in good order: not for servers
                start_new_session=True,
            )

    def log(self, number: int) -> Path:
        """Where server `number` writes."""
        return self.logs / f"server_{number}.log"

    def check(self, count: int) -> None:
        """Raises ConfigError for an interpreter that is not there and for ports that are taken."""
        if not os.access(self.settings.python, os.X_OK):
            raise ConfigError(
                f"rollout.sglang.python: {self.settings.python} is no interpreter; name that of an environment with SGLang"
                " (bash tools/install_sglang.sh makes one for CPUs)"
            )
        for number in range(count):
            port = self.settings.port + number
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    raise ConfigError(
                        f"rollout.sglang.port: something listens on {port} already; {count} ports are needed from here on"
                    )


@dataclass
class Member:
    """One server. state:

    starting    not there yet, or not again; ours
    behind      answers, and has other weights than the newest
    ready       has the newest weights
    out         does not answer, or lied; others' may be back at the next publication, but for liars
    given up    ours, after too many failed starts; or others', after a lie
    """

    server: Server
    number: int
    state: str
    process: subprocess.Popen | None = None
    why: str = ""
    complaint: str | None = None
    deadline: float = 0.0
    failed_starts: int = 0
    has_started: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Fleet:
    """All servers. `launch`: None when others run them. `say`: tells the user. `newest`: (folder, version) of
    weights on disk, when those are the newest there are.
    """

    def __init__(
        self, urls: Sequence[str], settings: SGLangSection, launch: Launch | None, say: Callable[[str], None]
    ):
        self.settings, self.launch, self.say = settings, launch, say
        self.newest: tuple[Path, str] | None = None
        self.holds_back = False  # colocated: while the trainer has the memory, nothing is started
        self._closing = threading.Event()
        state = "behind" if launch is None else "starting"
        self.members = [Member(Server(url, settings), number, state) for number, url in enumerate(urls)]
        self._threads = []
        if launch is not None:
            launch.logs.mkdir(parents=True, exist_ok=True)
            for member in self.members:
                self._start(member)
                self._threads.append(
                    threading.Thread(
                        target=self._tend, args=(member,), daemon=True, name=f"server {member.number}"
                    )
                )
                self._threads[-1].start()

    def given_up(self) -> str | None:
        """Why no server is left and none will be, or None."""
        if all(member.state == "given up" for member in self.members):
            return "; ".join(f"{member.server.url}: {member.why}" for member in self.members)
        return None

    def is_starting(self) -> bool:
        """Whether some server is not there yet."""
        return any(member.state == "starting" or member.complaint for member in self.members)

    def wait(self, seconds: float) -> None:
        """Until every server is there or given up, at most `seconds`."""
        until = time.monotonic() + seconds
        while self.is_starting() and time.monotonic() < until:
            beat()
            time.sleep(0.05)

    def hold_back(self) -> None:
        """Until `go_on` nothing starts, and what is starting is ended: the memory that it would take is the
        trainer's.
        """
        self.holds_back = True
        for member in self.members:
            with member.lock:  # nobody is about to start it
                pass
        while any(
            member.process and (member.state == "starting" or member.complaint) for member in self.members
        ):
            time.sleep(0.05)

    def go_on(self) -> None:
        """Servers may start."""
        self.holds_back = False

    def reachable(self) -> list[Member]:
        """Those to be given weights."""
        return [
            member
            for member in self.members
            if member.state in ("behind", "ready", "out") and member.complaint is None
        ]

    def complain(self, url: str, reason: str, is_lie: bool) -> None:
        """A server did not do what it should. Ours is ended and started anew, beside everything else."""
        member = next(member for member in self.members if member.server.url == url)
        with member.lock:
            if self.launch is not None:
                if member.state in ("behind", "ready"):
                    member.complaint = reason
            elif member.state != "given up":
                member.state, member.why = "given up" if is_lie else "out", reason
                member.server.incarnation += 1
                self.say(f"{url} is taken out: {reason}")

    def renew(self, newest: tuple[Path, str] | None) -> None:
        """There are newer weights, on disk when `newest` says where: nobody has them yet."""
        self.newest = newest
        for member in self.members:
            with member.lock:
                if member.state == "ready":
                    member.state = "behind"

    def updated(self, member: Member) -> None:
        """The member has the newest weights."""
        with member.lock:
            if member.state in ("behind", "out") and member.complaint is None:
                member.state, member.why, member.failed_starts = "ready", "", 0

    def states(self) -> dict[str, str | None]:
        """Of every server, why it is not to be used, None when it is."""
        return {
            member.server.url: None if member.state == "ready" else member.why or member.state
            for member in self.members
        }

    def close(self) -> None:
        """End our servers and their processes."""
        self._closing.set()
        for member in self.members:  # so that a thread's call to a server ends, too
            self._end(member)
        for thread in self._threads:
            thread.join()
        for member in self.members:
            self._end(member)
            member.server.close()

    # ---- our servers, a thread each
    # ------------------------------------------------------------------------------------

    def _start(self, member: Member) -> None:
        member.server.incarnation += 1
        member.process = self.launch.start(member.number)
        member.deadline = time.monotonic() + self.settings.start_timeout

    def _start_again(self, member: Member) -> None:
        try:
            self._start(member)
        except OSError as error:  # no memory for a process, no room for its log: nobody else would hear of it in this thread
            member.state, member.why = "given up", f"it could not be started: {error}"
            self.say(f"server {member.number} is given up: {member.why}")

    def _end(self, member: Member) -> None:
        """The guard ends the server's whole tree; without it, Linux does."""
        if (process := member.process) is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _tend(self, member: Member) -> None:
        while not self._closing.wait(_TEND) and member.state != "given up":
            if member.process is None:
                with member.lock:
                    if not self.holds_back:
                        self._start_again(member)
            elif (problem := self._problem(member)) is not None:
                self._restart(member, problem)
            elif member.state == "starting" and self.holds_back:
                self._end(member)
                member.process = None
            elif member.state == "starting" and self._is_up(member):
                self._catch_up(member)

    def _problem(self, member: Member) -> str | None:
        if member.complaint is not None:
            return member.complaint
        if (status := member.process.poll()) is not None:
            return f"its process ended with status {status}"
        if member.state == "starting" and time.monotonic() > member.deadline:
            return f"it did not start in {self.settings.start_timeout:g} s (rollout.sglang.start_timeout)"
        return None

    def _restart(self, member: Member, problem: str) -> None:
        failed_start = member.state == "starting"
        with member.lock:
            member.state, member.why, member.complaint = "starting", problem, None
        self._end(member)
        member.process, log = None, self.launch.log(member.number)
        member.failed_starts += failed_start
        if failed_start and (not member.has_started or member.failed_starts > self.settings.max_restarts):
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - _LOG_TAIL))
                tail = file.read().decode(errors="replace")
            if self.settings.api_key_env is not None:
                tail = tail.replace(os.environ[self.settings.api_key_env], "…")
            with member.lock:
                member.state, member.why = "given up", f"{problem}; {log} ends with:\n{tail}"
            self.say(f"server {member.number} is given up: {problem} ({log})")
        else:
            self.say(
                f"server {member.number} is started anew: {problem}"
                + (f" while it started ({log})" if failed_start else "")
            )

    def _is_up(self, member: Member) -> bool:
        try:
            member.server.get("/model_info", timeout=2)
            member.server.check_health()
        except ServerFailed:
            return False
        return True

    def _catch_up(self, member: Member) -> None:
        """Load the newest weights from disk, where they are there; others come with the next publication."""
        newest = self.newest
        try:
            if newest is not None:
                load_from_disk(member.server, *newest)
        except ServerFailed as failure:
            member.complaint = str(failure)
            return
        with member.lock:
            if newest == self.newest:  # else once more
                member.has_started, member.state = True, "behind"
                if newest is not None:
                    member.state, member.why, member.failed_starts = "ready", "", 0
                    self.say(f"server {member.number} is back, with version {newest[1]}")


def load_from_disk(server: Server, folder: Path, version: str) -> None:
    """Have the server read the weights in `folder`.

    Raises ServerFailed, also when it has another version then.
    """
    server.post(
        "/update_weights_from_disk",
        {"model_path": str(folder.resolve()), "weight_version": version, "flush_cache": True},
    )
    check_version(server, version)


def check_version(server: Server, version: str) -> None:
    """Raises ServerFailed unless the server says that it has `version`."""
    if (found := server.version()) != version:
        raise ServerFailed(f"{server.url} has weight version {found!r} after an update to {version!r}")
