"""A short soak (see tests/soak.py): two ranks, killed five times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "soak.py"


def test_a_run_survives_being_killed_again_and_again():
    done = subprocess.run([sys.executable, str(SOAK), "--kills", "5", "--steps", "8"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("5 kills survived: "), done.stdout
