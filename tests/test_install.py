"""Test tools/install.sh with a stub for Python: nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# venv leaves an interpreter without pip where ensurepip is missing, as on Debian, and one with pip where the
# file $HAS_ENSUREPIP exists
FAKE = """#!/usr/bin/env bash
case "$*" in
-m\\ venv*)
    mkdir -p "$3/bin"
    printf '#!/usr/bin/env bash\\necho "$*" >>"$LOG"; [ -e "$HAS_ENSUREPIP" ]\\n' >"$3/bin/python"
    chmod +x "$3/bin/python"
    [ -e "$HAS_ENSUREPIP" ] ;;
esac
"""


def test_a_folder_with_a_space_after_a_first_attempt_without_ensurepip(tmp_path):
    # The first attempt lacks python3-venv; once it is there, the environment is completed, and every package
    # is installed into that folder.
    python, ensurepip, venv, log = (
        tmp_path / "python",
        tmp_path / "ensurepip",
        tmp_path / "my venv",
        tmp_path / "log",
    )
    python.write_text(FAKE)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "HAS_ENSUREPIP": str(ensurepip), "LOG": str(log)}
    command = ["bash", "tools/install.sh", str(venv), "test"]
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 1
    (venv / "bin" / "python").write_text("#!/usr/bin/env bash\nexit 1\n")  # without pip
    ensurepip.touch()
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    assert [line.split()[-1] for line in log.read_text().splitlines() if "install" in line] == [
        "torch==2.13.0",
        ".[test]",
    ]
    assert (venv / ".installed-test").exists()
