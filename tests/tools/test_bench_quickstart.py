"""Run the benchmark of the quick start's step without TRL, which it must report as skipped.

Timings are not judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_bench(tmp_path):
    # One step a row, one row for each algorithm of ours.
    (tmp_path / "trl.py").write_text("raise ImportError('no TRL in this test')")
    (tmp_path / "datasets.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [
        sys.executable,
        "tools/bench/bench_quickstart.py",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--rows",
        "ours srpo",
        "TRL grpo",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert set(report) == {"device", "date", "shape", "rows", "skipped"}
    assert report["skipped"] == {"TRL grpo": "ImportError: no TRL in this test"}
    (row,) = report["rows"]
    assert row["name"] == "ours srpo" and row["median"] >= row["seconds"] > 0 and row["ratio"] is None
