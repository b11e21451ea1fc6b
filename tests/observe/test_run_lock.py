"""Test that one run at a time is started in a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe import run_lock

HOLD = """import sys
from pathlib import Path
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.observe.run_lock import run_lock
with run_lock(Path(sys.argv[1]), Layout()):
    print("held", flush=True)
    sys.stdin.read()
"""
LAYOUT = Layout()


def test_a_second_start_is_refused_until_the_first_is_gone(tmp_path, monkeypatch):
    # The first one ends by SIGKILL, which leaves the file there.
    monkeypatch.setattr(run_lock, "LOCK_SECONDS", 0.0)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"process {first.pid} on .* uses this folder"),
            run_lock.run_lock(tmp_path, LAYOUT),
        ):
            pass
    finally:
        first.kill()
        first.wait()
    with run_lock.run_lock(tmp_path, LAYOUT):
        assert (tmp_path / "lock").read_text().startswith("process ")
