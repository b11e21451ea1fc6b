"""Test the guard process of a server."""

from __future__ import annotations

import os
import subprocess
import sys

from megatron_srpo.rollout.servers import guard


def test_slurms_warning_ends_neither_guard_nor_server():
    # SIGUSR1 is meant for the run, whose last step still samples; the guard exits with the command's status.
    command = [
        sys.executable,
        "-P",
        guard.__file__,
        str(os.getpid()),
        "sh",
        "-c",
        "kill -USR1 $PPID; kill -USR1 $$; exit 7",
    ]
    assert subprocess.run(command, timeout=60).returncode == 7
