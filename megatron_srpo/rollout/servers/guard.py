"""Run a command, and kill it with all its processes when the parent is gone or SIGTERM arrives.

`python guard.py PARENT_PID COMMAND …`. If the guard itself is killed, Linux kills the first process.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LINUX = sys.platform == "linux"


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process on Linux; do nothing elsewhere."""
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def kill_descendants() -> None:
    """Kill all processes below this one until none is left: as a subreaper, it inherits their orphans."""
    while processes := psutil.Process().children(recursive=True):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=0.1)


def main() -> int:
    """Run the command; return its exit status, 1 if it was killed."""
    parent = int(sys.argv[1])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Slurm sends SIGUSR1 to every process of the run; the command inherits that it is ignored
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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
        kill_descendants()
    return 1 if status is None else status & 0xFF


if __name__ == "__main__":
    sys.exit(main())
