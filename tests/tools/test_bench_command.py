"""The benchmark of the command line runs and says which commands import torch. Timings are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_report(tmp_path):
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "tools/bench/bench_command.py", "--rounds", "1", "--json", "--output", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert json.loads(file.read_text()) == report
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["python -c pass", "srpo --help", "srpo config", "srpo plan", "srpo train"]
    for row in rows.values():
        assert set(row) == {"name", "seconds", "cpu_seconds", "ratio", "extra_bytes", "imports_torch"}
        assert row["seconds"] > 0 and row["extra_bytes"] > 0
    assert not rows["srpo --help"]["imports_torch"] and not rows["srpo config"]["imports_torch"]
