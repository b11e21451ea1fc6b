"""Run a short soak (see tests/helpers/soak.py): two ranks, killed at most five times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "helpers" / "soak.py"


def test_a_run_survives_being_killed_again_and_again():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "5", "--steps", "10"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    survived = re.match(r"(\d) kills survived: ", done.stdout.splitlines()[-1])
    assert survived and int(survived[1]) >= 3, done.stdout
