"""Runs a command and ends it, with every process it has made, when the parent is gone or SIGTERM comes.

    python guard.py PARENT_PID COMMAND …

Run by its path and with the standard library alone, so that it costs nothing. Should the guard itself be
killed, Linux kills the command's first process, and SGLang's workers go with theirs.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LINUX = sys.platform == "linux"


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2); nothing elsewhere."""
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def children() -> list[int]:
    """This process's children: as the subreaper, every orphan below it, too."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def end_all(group: int) -> None:
    """SIGKILL to the command's process group, then to whatever else is left below this process, until
    nothing is.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while True:
        for process in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
        except ChildProcessError:
            return


def main() -> int:
    """Returns the command's exit status, 1 when it was ended."""
    parent = int(sys.argv[1])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # Slurm's to the run, which every process gets; the command ignores it, too
    command = subprocess.Popen(
        sys.argv[2:], start_new_session=True, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    )
    status = None
    try:
        while status is None and os.getppid() == parent:
            time.sleep(0.1)
            status = command.poll()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would leave processes behind
        end_all(command.pid)
    return 1 if status is None else status & 0xFF


if __name__ == "__main__":
    sys.exit(main())
